"""A model whose loss is that of all ranks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..model.model import Megalodon, masked_targets
from ..model.states import MegalodonState


class Parallel(NamedTuple):
    """How a model is parallel."""

    loss_group: dist.ProcessGroup
    """The ranks that share one batch"""
    ranks: int = 1
    """How many ranks share a sequence"""


def enable(model: Megalodon, chunk_group: dist.ProcessGroup | None, loss_group: dist.ProcessGroup) -> Megalodon:
    """Makes a model one whose loss is that of all ranks of a group, in place."""
    model.__class__ = ParallelMegalodon
    model._parallel = Parallel(loss_group)
    return model


class ParallelMegalodon(Megalodon):
    """A :class:`megalodon_ops.Megalodon` over the ranks of a mesh, as :func:`parallelize` makes it.

    Every rank calls it alike, with its own rows of the batch.
    """

    _parallel: Parallel

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        reduction: str = "mean",
        ignore_index: int = -100,
        return_state: bool = False,
        **options: Any,
    ) -> Tensor | tuple[Tensor, MegalodonState]:
        """Logits of the rank's own tokens; with `targets`, the loss of all ranks' tokens.

        Args:
            reduction: "mean" over the targets of all ranks, "sum" over all of them: their gradients averaged over the
                ranks, as FSDP2 averages them, are those of one process with the whole batch, however many targets a rank
                has. "none": (B, L) of this rank.
            tokens, targets, ignore_index, return_state, options: as in :meth:`megalodon_ops.Megalodon.forward`.
        """
        if targets is None:
            return super().forward(tokens, return_state=return_state, **options)
        found = super().forward(
            tokens, targets, reduction="sum" if reduction == "mean" else reduction, ignore_index=ignore_index,
            return_state=return_state, **options,
        )  # fmt: skip
        loss, state = found if return_state else (found, None)
        sequences = {name: options.get(name) for name in ("cu_seqlens", "lengths")}
        count = (masked_targets(targets, ignore_index, **sequences) != ignore_index).sum()
        loss = _global_loss(loss, count, reduction, self._parallel.loss_group)
        return (loss, state) if return_state else loss


def _global_loss(loss: Tensor, count: Tensor, reduction: str, group: dist.ProcessGroup) -> Tensor:
    """The loss of all ranks, from this rank's sum of losses and count of targets, or its losses for "none"."""
    if reduction not in ("mean", "sum"):
        return loss
    ranks = dist.get_world_size(group)
    totals = torch.stack([loss.detach().double(), count.double()])
    dist.all_reduce(totals, group=group)
    total, targets = totals
    if reduction == "sum":
        return _ScaledGradient.apply(loss, total.to(loss.dtype), ranks)
    scale = torch.where(targets > 0, ranks / targets, 0).to(loss.dtype)
    return _ScaledGradient.apply(loss, (total / targets).to(loss.dtype), scale)


class _ScaledGradient(torch.autograd.Function):
    """Another value with the gradient of the first argument, times a factor."""

    @staticmethod
    def forward(ctx, x: Tensor, value: Tensor, factor: Tensor | int) -> Tensor:
        ctx.factor = factor
        return value.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad * ctx.factor, None, None
