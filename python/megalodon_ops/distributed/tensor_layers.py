"""The layers of a model that is split by tensor parallel, each with its rank's own part; see tensor.py."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from ..model.layers import ComplexEMA, Linear
from ..ops.linear import linear
from ..ops.loss import linear_cross_entropy

Placement = Shard | Replicate | Partial
CHANNELS = Shard(-1)


def exchanged(
    x: Tensor, mesh: DeviceMesh, has: Placement, wanted: Placement, gradient: Placement | None = None
) -> Tensor:
    """A plain tensor placed otherwise over the ranks.

    Args:
        x: what this rank has of it.
        has, wanted: how ranks hold it now, and how they shall.
        gradient: how ranks will hold the gradient of the result; None: as the result. `Partial()`: each has made a use
            of its own of a whole result, and the sum counts.
    """
    placed = DTensor.from_local(x, mesh, [has], run_check=False).redistribute(placements=[wanted])
    return placed.to_local(grad_placements=None if gradient is None else [gradient])


class OwnPart:
    """A layer that computes with what its rank holds of its parameters; a base in front of the layer's class."""

    mesh: DeviceMesh  # of the ranks that share the layer
    gathers: bool  # whether the layer takes all channels of an input of which each rank has its own
    sums: bool  # whether the outputs are summed over ranks, each of which keeps its own channels of the sum
    part: (
        tuple[int, int, int] | None
    )  # dimension, begin and length of what the rank uses of whole parameters; None: all
    streams: dict[str, int]  # from which layer inside on dropout draws which stream; ranks with one number drop alike

    def forward(self, x: Tensor, **options: Any) -> Any:
        x = exchanged(x, self.mesh, CHANNELS, Replicate(), Partial()) if self.gathers else x
        with self._own_parameters(), self._own_streams(x.device):
            y = super().forward(x, **options)
        return exchanged(y, self.mesh, Partial(), CHANNELS).clone() if self.sums else y  # FSDP2 warns of views

    @contextlib.contextmanager
    def _own_parameters(self) -> Iterator[None]:
        """Plain tensors in the place of the parameters. What all have whole gets a part of its gradient on each."""
        given = dict(self._parameters)
        try:
            for name, parameter in given.items():
                if isinstance(parameter, DTensor):
                    is_whole = parameter.placements[-1].is_replicate()
                    own = parameter.to_local(grad_placements=[Partial()] if is_whole else None)
                    self._parameters[name] = own if self.part is None else own.narrow(*self.part)
            yield
        finally:
            self._parameters.update(given)

    @contextlib.contextmanager
    def _own_streams(self, device: torch.device) -> Iterator[None]:
        """Dropout draws stream 0, which is the same on all ranks, and then what `streams` says."""
        if not self.streams or not draws(self):
            yield
            return
        with random_again(device) as seed:
            hooks = [
                getattr(self, name).register_forward_pre_hook(lambda *_, number=number: set_seed(device, seed, number))
                for name, number in self.streams.items()
            ]
            set_seed(device, seed, 0)
            try:
                yield
            finally:
                for hook in hooks:
                    hook.remove()


class OwnComplexEMA(OwnPart, ComplexEMA):
    """CEMA of a rank's own channels, whose coefficients are also asked for outside of its forward."""

    def coefficients(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with self._own_parameters():
            return super().coefficients()


class OwnOutput(OwnPart, Linear):
    """The output matrix, split by its columns, whose product each rank computes for its share of the tokens."""

    def forward(self, hidden: Tensor) -> Tensor:
        """All logits (B, L, V), on every rank, of a rank's own channels (B, L, D / n)."""
        logits = linear(self._own_tokens(hidden), self._whole_weight())
        return self._all_tokens(logits, hidden.shape[:2])

    def cross_entropy(self, hidden: Tensor, targets: Tensor, reduction: str, ignore_index: int) -> Tensor:
        """The loss of a rank's own channels (B, L, D / n); `reduction` is "sum" or "none"."""
        loss = linear_cross_entropy(
            self._own_tokens(hidden), self._whole_weight(), self._share(targets.flatten(), ignore_index),
            reduction=reduction, ignore_index=ignore_index,
        )  # fmt: skip
        if reduction == "none":
            return self._all_tokens(loss, targets.shape)
        return exchanged(loss, self.mesh, Partial(), Replicate()).clone()

    def _whole_weight(self) -> Tensor:
        """(V, D), of which every rank makes a part of the gradient."""
        return self.weight.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])

    def _own_tokens(self, hidden: Tensor) -> Tensor:
        """(T / n, D), this rank's share of the tokens with all channels; zeros follow the last token."""
        return self._share(exchanged(hidden, self.mesh, CHANNELS, Replicate(), Partial()).flatten(0, 1), 0)

    def _share(self, tokens: Tensor, filling: float) -> Tensor:
        """This rank's equal share (T / n, ...) of what every rank has of all tokens (T, ...)."""
        ranks, rank = self.mesh.size(), self.mesh.get_local_rank()
        size = -(-len(tokens) // ranks)
        padding = [0, 0] * (tokens.dim() - 1) + [0, ranks * size - len(tokens)]
        return F.pad(tokens, padding, value=filling).narrow(0, rank * size, size)

    def _all_tokens(self, own: Tensor, shape: torch.Size) -> Tensor:
        """(B, L, ...) on every rank, of which all ranks make the same use."""
        whole = exchanged(own, self.mesh, Shard(0), Replicate())
        return whole[: shape.numel()].unflatten(0, shape).clone()


def draws(module: nn.Module) -> bool:
    """Whether the module drops anything now."""
    config = module.config
    return module.training and max(config.dropout, config.hidden_dropout, config.attention_dropout) > 0


@contextlib.contextmanager
def random_again(device: torch.device) -> Iterator[int]:
    """A seed from torch's generator, which goes on after the block as it was when the seed was drawn."""
    seed = int(torch.randint(2**62, ()))
    with torch.random.fork_rng([] if device.type == "cpu" else [device]):
        yield seed


@contextlib.contextmanager
def one_generator(model: nn.Module, mesh: DeviceMesh | None) -> Iterator[None]:
    """Makes dropout draw on every rank of the mesh, if there is one, what it draws on the first rank."""
    if mesh is None or not draws(model):
        yield
        return
    device = model.embed.weight.device
    with random_again(device) as seed:
        shared = torch.tensor(seed, device=device)
        dist.broadcast(shared, group=mesh.get_group(), group_src=0)
        set_seed(device, int(shared), 0)
        yield


def set_seed(device: torch.device, seed: int, number: int) -> None:
    """Makes torch's generators draw the stream `number` of a seed."""
    seed = (seed + number * 0x9E3779B97F4A7C15) % 2**63
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)
