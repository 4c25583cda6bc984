"""The layers of a model that is split by tensor parallel, each with its rank's own part; see tensor.py."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from ..model.layers import ComplexEMA, Linear
from ..ops.linear.linear import linear
from ..ops.linear_cross_entropy.linear_cross_entropy import linear_cross_entropy

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
    part: tuple[int, int, int] | None  # dimension, begin and length of the rank's part of whole parameters; None: all

    def forward(self, x: Tensor, **options: Any) -> Any:
        x = exchanged(x, self.mesh, CHANNELS, Replicate(), Partial()) if self.gathers else x
        with self._own_parameters():
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
        own = (self._own_tokens(hidden), self._whole_weight(), self._share(targets.flatten(), ignore_index))
        loss = linear_cross_entropy(*own, reduction=reduction, ignore_index=ignore_index)
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
