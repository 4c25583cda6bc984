"""The layers of a model that is split by tensor parallel, each with its rank's own part; see tensor.py."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from ..model.blocks import NormalizedAttention, NormalizedFFN
from ..model.layers import ComplexEMA, Embedding, LayerNorm, Linear, RMSNorm, TimestepNorm
from ..ops.linear import linear

Placement = Shard | Replicate | Partial
CHANNELS = Shard(-1)


def exchanged(
    x: Tensor, mesh: DeviceMesh, has: Placement, wanted: Placement, gradient: Placement | None = None
) -> Tensor:
    """A plain tensor placed otherwise over the ranks.

    Args:
        x: what this rank has of it.
        has, wanted: how ranks hold it now, and how they shall.
        gradient: how ranks will hold the gradient of the result; None: as the result.
    """
    placed = DTensor.from_local(x, mesh, [has], run_check=False).redistribute(placements=[wanted])
    return placed.to_local(grad_placements=None if gradient is None else [gradient])


def all_channels(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """(..., D) of (..., D / n), for ranks that each use it in their own way: gradients are summed and scattered."""
    return exchanged(x, mesh, CHANNELS, Replicate(), Partial())


class OwnPart:
    """A layer whose forward computes with what its rank holds of its parameters."""

    mesh: DeviceMesh
    """of the ranks that share the layer"""
    of_shared_head: dict[str, tuple[int, int, int]]
    """by name of a parameter that is whole on every rank: dimension, begin and length of what this rank uses"""

    def forward(self, *args: Any, **options: Any) -> Any:
        with self._own_parameters():
            return super().forward(*args, **options)

    @contextlib.contextmanager
    def _own_parameters(self) -> Iterator[None]:
        """Plain tensors in the place of the parameters. What every rank has whole gets a part of its gradient on each."""
        given = dict(self._parameters)
        try:
            for name, parameter in given.items():
                if isinstance(parameter, DTensor):
                    is_whole = parameter.placements[-1].is_replicate()
                    own = parameter.to_local(grad_placements=[Partial()] if is_whole else None)
                    self._parameters[name] = (
                        own.narrow(*self.of_shared_head[name]) if name in self.of_shared_head else own
                    )
            yield
        finally:
            self._parameters.update(given)


class OwnTimestepNorm(OwnPart, TimestepNorm):
    """The norm of a rank's own groups."""


class OwnComplexEMA(OwnPart, ComplexEMA):
    """CEMA of a rank's own channels."""

    def coefficients(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with self._own_parameters():
            return super().coefficients()


class OwnAttention(OwnPart, NormalizedAttention):
    """The first half of a block with a rank's own heads and values."""

    first_head: int
    """number of the first of this rank's heads, among those of all"""
    heads_of_all: int

    def forward(self, x: Tensor, **options: Any) -> Any:
        if not draws(self):
            return super().forward(x, **options)
        with random_again(x.device) as seed:
            streams = (self.wz, 1 + self.first_head), (self.wr, 1 + self.heads_of_all + self.mesh.get_local_rank())
            hooks = [
                layer.register_forward_pre_hook(lambda *_, number=number: set_seed(x.device, seed, number))
                for layer, number in streams
            ]
            set_seed(x.device, seed, 0)  # for m
            try:
                return super().forward(x, **options)
            finally:
                for hook in hooks:
                    hook.remove()


class OwnFFN(OwnPart, NormalizedFFN):
    """The second half of a block with a rank's own hidden units."""

    def forward(self, y: Tensor) -> Tensor:
        if not draws(self):
            return super().forward(y)
        with random_again(y.device) as seed:
            set_seed(y.device, seed, self.mesh.get_local_rank())
            return super().forward(y)


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


def set_seed(device: torch.device, seed: int, number: int) -> None:
    """Makes torch's generators draw the stream `number` of a seed."""
    seed = (seed + number * 0x9E3779B97F4A7C15) % 2**63
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)


class OwnEmbedding(OwnPart, Embedding):
    """A rank's own channels of the embedding."""


class OwnLinear(OwnPart, Linear):
    """A rank's own rows of a matrix, times an input that all ranks have whole."""


class GatheringLinear(OwnLinear):
    """A rank's own rows of a matrix, times an input whose channels are gathered."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(all_channels(x, self.mesh))


class SummingLinear(OwnLinear):
    """A rank's own columns of a matrix, times its part of the input: own channels of the sum over ranks."""

    def forward(self, x: Tensor) -> Tensor:
        return exchanged(
            super().forward(x), self.mesh, Partial(), CHANNELS
        ).clone()  # FSDP2 warns of outputs that are views


class GatheringRMSNorm(OwnPart, RMSNorm):
    """The norm of all channels, which are gathered."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(all_channels(x, self.mesh))


class GatheringLayerNorm(OwnPart, LayerNorm):
    """The norm of all channels, which are gathered."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(all_channels(x, self.mesh))


class SharedOutput(OwnPart, Linear):
    """The output matrix, split by its columns, whose product each rank computes for its share of the tokens."""

    def forward(self, hidden: Tensor) -> Tensor:
        """All logits (B, L, V), on every rank, of a rank's own channels (B, L, D / n)."""
        logits = linear(self.own_tokens(hidden), self.whole_weight())
        return self.all_tokens(logits, hidden.shape[:2])

    def whole_weight(self) -> Tensor:
        """(V, D), of which every rank makes a part of the gradient."""
        return self.weight.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])

    def own_tokens(self, hidden: Tensor) -> Tensor:
        """(T / n, D), this rank's share of the tokens with all channels; zeros follow the last token."""
        return self.share(all_channels(hidden, self.mesh).flatten(0, 1), 0)

    def share(self, tokens: Tensor, filling: float) -> Tensor:
        """This rank's equal share (T / n, ...) of what every rank has of all tokens (T, ...)."""
        ranks, rank = self.mesh.size(), self.mesh.get_local_rank()
        size = -(-len(tokens) // ranks)
        padding = [0, 0] * (tokens.dim() - 1) + [0, ranks * size - len(tokens)]
        return F.pad(tokens, padding, value=filling).narrow(0, rank * size, size)

    def all_tokens(self, own: Tensor, shape: torch.Size) -> Tensor:
        """(B, L, ...) on every rank, of which all ranks make the same use."""
        whole = exchanged(own, self.mesh, Shard(0), Replicate())
        return whole[: shape.numel()].unflatten(0, shape).clone()
