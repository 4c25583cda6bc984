"""The exchanges of chunk parallel as functions of autograd: each has a collective in its backward, too.

Every rank of the group runs every function, in one order: a function's result is in the graph of every rank's loss,
and the backward of one needs that of the next, so that all ranks come by in one order then, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from .vote import Members, all_gather, clear_errors, device_of

_OP = "Megalodon"


@dataclass
class Arriving:
    """Tensors of all ranks that may still be on their way."""

    values: Tensor
    """(P, ...) real, not to be read before `wait`"""
    start: Tensor | None
    work: dist.Work
    members: Members

    def wait(self) -> tuple[Tensor, Tensor | None]:
        """The tensors (P, ...), and the state that was handed over with them."""
        with clear_errors(_OP, self.members.group):
            self.work.wait()
        return self.values, self.start


def send_to_all(value: Tensor, start: Tensor | None, members: Members) -> Arriving:
    """Sends a real tensor, of one shape on all ranks, to all members; the call returns at once.

    Gradients of the results go back to the rank that they came from. `start`, which is equal on all ranks, passes
    through; its gradient is the mean over ranks, so that it is the same on every rank.
    """
    works: list[dist.Work] = []
    values, start = _ToAll.apply(value, start, members, works)
    return Arriving(values, start, works[0], members)


class _ToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, start, members, works):
        ctx.members, ctx.start_is_given = members, start is not None
        value = value.contiguous()
        values = value.new_empty((dist.get_world_size(members.group), *value.shape))
        with clear_errors(_OP, members.group):
            works.append(all_gather(values.view(-1), value.view(-1), group=members.group, async_op=True))
        return values, None if start is None else start.view_as(start)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dvalues, dstart):
        parts = torch.empty_like(dvalues := dvalues.contiguous())
        with clear_errors(_OP, ctx.members.group):
            dist.all_to_all_single(parts.view(-1), dvalues.view(-1), group=ctx.members.group)
            if ctx.start_is_given and ctx.needs_input_grad[1]:
                dstart = _mean_over_ranks(dstart, ctx.members)
        return parts.sum(0), dstart, None, None


def rows_of_owners(own: Tensor, others: Tensor, owners: Mapping[int, Sequence[int]], members: Members) -> Tensor:
    """Puts together the rows that ranks own, on every rank.

    Args:
        own: (n, F), the rows that this rank owns.
        others: (S, F), equal on all ranks: the rows that nobody owns; its other rows are not read.
        owners: by rank of the group, the numbers of the rows that the rank owns.

    Returns:
        (S, F). A row's gradients from all ranks go to its owner.
    """
    return _OfOwners.apply(own, others, owners, members)


class _OfOwners(torch.autograd.Function):
    @staticmethod
    def forward(ctx, own, others, owners, members):
        ctx.owners, ctx.members, ctx.own_shape = owners, members, own.shape
        result = others.clone(memory_format=torch.contiguous_format)
        with clear_errors(_OP, members.group):
            broadcast_rows(result, own, owners, members)
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dresult):
        down, dothers = dresult.new_zeros(ctx.own_shape), dresult.clone()
        with clear_errors(_OP, ctx.members.group):
            for owner, rows in ctx.owners.items():
                index = torch.tensor(rows, device=dresult.device)
                grads = dresult[index].contiguous()
                dist.reduce(grads, dist.get_global_rank(ctx.members.group, owner), group=ctx.members.group)
                if owner == dist.get_rank(ctx.members.group):
                    down = grads
                dothers[index] = 0
            dothers = _mean_over_ranks(dothers, ctx.members) if ctx.needs_input_grad[1] else None
        return down, dothers, None, None


def broadcast_rows(into: Tensor, own: Tensor, owners: Mapping[int, Sequence[int]], members: Members) -> None:
    """Writes the rows `own` (n, ...) of each owner to their places in `into` (S, ...), on every rank; bit by bit."""
    for owner, rows in sorted(owners.items()):
        is_own = owner == dist.get_rank(members.group)
        sent = own.contiguous() if is_own else into.new_empty((len(rows), *into.shape[1:]))
        dist.broadcast(sent.view(-1).view(torch.uint8), dist.get_global_rank(members.group, owner), group=members.group)
        into[torch.tensor(rows, device=into.device)] = sent


def whole_rows(piece: Tensor, widths: Sequence[int], members: Members) -> Tensor:
    """The rows (B, L) whose columns, `widths` of them, the ranks have as their pieces (B, l)."""
    device, sent = piece.device, piece.long()
    sent = torch.nn.functional.pad(sent, (0, max(widths) - sent.shape[1])).contiguous().to(device_of(members.group))
    everyone = sent.new_empty((len(widths), *sent.shape))
    with clear_errors(_OP, members.group):
        all_gather(everyone.view(-1), sent.view(-1), group=members.group)
    return torch.cat([rows[:, :width] for rows, width in zip(everyone, widths)], 1).to(device, piece.dtype)


def total_loss(loss_sum: Tensor, count: Tensor, group: ProcessGroup | None, *, mean: bool) -> Tensor:
    """The sum or the mean over all ranks of losses whose sum and number each rank has; () in the dtype of `loss_sum`.

    Backward, the gradient of a rank's own losses comes times the number of ranks, so that a mean of the ranks'
    gradients, as of data parallel, is the gradient of the result.
    """
    return _TotalLoss.apply(loss_sum, count, group, mean)


class _TotalLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss_sum, count, group, mean):
        total = torch.stack([loss_sum.double(), count.double()])
        if group is not None:
            with clear_errors(_OP, group):
                dist.all_reduce(total, group=group)
        ranks = 1 if group is None else dist.get_world_size(group)
        ctx.save_for_backward(ranks / total[1] if mean else torch.full_like(total[1], ranks))
        return (total[0] / total[1] if mean else total[0].clone()).to(loss_sum.dtype)  # no view

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss):
        (scale,) = ctx.saved_tensors
        return (dloss.double() * scale).to(dloss.dtype), None, None, None


def _mean_over_ranks(tensor: Tensor, members: Members) -> Tensor:
    tensor = tensor.contiguous().clone()
    dist.all_reduce(tensor, group=members.group)
    return tensor / dist.get_world_size(members.group)
