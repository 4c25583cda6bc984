"""The exchanges of chunk parallel as functions of autograd: each has a collective in its backward, too.

Every rank of the group runs every function, in one order: a function's result is in the graph of every rank's loss,
and the backward of one needs that of the next, so that all ranks come by in one order then, too.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from .rank_checks import all_gather


def send_to_all(value: Tensor, start: Tensor | None, group: ProcessGroup) -> tuple[Tensor, Tensor | None, dist.Work]:
    """Sends a real tensor, of one shape on all ranks, to all ranks; the call returns at once.

    Gradients of the results go back to the rank that they came from. `start`, which is equal on all ranks, passes
    through; its gradient is the mean over ranks, so that it is the same on every rank.

    Returns:
        (P, ...), not to be read before the third result's `wait`, and `start`.
    """
    works: list[dist.Work] = []
    return *_ToAll.apply(value, start, group, works), works[0]


class _ToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, start, group, works):
        ctx.group, ctx.start_is_given = group, start is not None
        value = value.contiguous()
        values = value.new_empty((dist.get_world_size(group), *value.shape))
        works.append(all_gather(values.view(-1), value.view(-1), group=group, async_op=True))
        return values, None if start is None else start.view_as(start)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dvalues, dstart):
        parts = torch.empty_like(dvalues := dvalues.contiguous())
        dist.all_to_all_single(parts.view(-1), dvalues.view(-1), group=ctx.group)
        if ctx.start_is_given and ctx.needs_input_grad[1]:
            dstart = dstart.contiguous().clone()
            dist.all_reduce(dstart, group=ctx.group)
            dstart /= dist.get_world_size(ctx.group)
        return parts.sum(0), dstart, None, None


def hand_on(value: Tensor, after: int | None, before: int | None, group: ProcessGroup) -> Tensor:
    """Sends a tensor (R, n, ...) to the rank `after`, and gives what the rank `before` sends, of the same shape.

    Gradients go back the same way. Where `after` is None, nothing is sent; where `before` is, the result is (R, 0, ...).
    """
    return _HandOn.apply(value, after, before, group)


class _HandOn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, after, before, group):
        ctx.after, ctx.before, ctx.group, ctx.shape = after, before, group, value.shape
        received = value.new_empty(value.shape if before is not None else (len(value), 0, *value.shape[2:]))
        _to_one(received, before, value, after, group)
        return received

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dreceived):
        dvalue = dreceived.new_zeros(ctx.shape)
        _to_one(dvalue, ctx.after, dreceived, ctx.before, ctx.group)
        return dvalue, None, None, None


def _to_one(received: Tensor, source: int | None, value: Tensor, target: int | None, group: ProcessGroup) -> None:
    """Writes what the rank `source` sends to `received`, and sends `value` to the rank `target`; each rank calls this."""
    ranks = range(dist.get_world_size(group))
    arriving, leaving = ([x.numel() * (r == rank) for r in ranks] for x, rank in ((received, source), (value, target)))
    flat, sent = received.view(-1)[: sum(arriving)], value.contiguous().view(-1)[: sum(leaving)]
    dist.all_to_all_single(flat, sent, arriving, leaving, group=group)


def rows_of_all(own: Tensor, own_rows: Tensor, others: Tensor, other_rows: Tensor, group: ProcessGroup) -> Tensor:
    """Puts together the rows that ranks have, on every rank; a row's gradients go to the rank that has it.

    Args:
        own: (n, F), the rows that this rank has, and own_rows: (n,), their numbers.
        others: (S, F), equal on all ranks, and other_rows: the numbers of its rows that no rank has.
    """
    result = _Sum.apply(torch.zeros_like(others).index_copy(0, own_rows, own), group)  # exact: all but one add zeros
    return result.index_copy(0, other_rows, others[other_rows])


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, group):
        ctx.group, value = group, value.clone(memory_format=torch.contiguous_format)
        if value.numel():
            dist.all_reduce(value, group=group)
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dvalue):
        return _Sum.forward(ctx, dvalue, ctx.group), None


class TotalLoss(torch.autograd.Function):
    """The sum or the mean over all ranks of losses whose sum and number each rank has; () in the dtype of the sum.

    Backward, the gradient of a rank's own losses comes times the number of ranks, so that a mean of the ranks'
    gradients, as of data parallel, is the gradient of the result.
    """

    @staticmethod
    def forward(ctx, loss_sum, count, group, mean):
        total = torch.stack([loss_sum.double(), count.double()])
        if group is not None:
            dist.all_reduce(total, group=group)
        ranks = 1 if group is None else dist.get_world_size(group)
        ctx.save_for_backward(ranks / total[1] if mean else torch.full_like(total[1], ranks))
        return (total[0] / total[1] if mean else total[0].clone()).to(loss_sum.dtype)  # no view

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss):
        (scale,) = ctx.saved_tensors
        return (dloss.double() * scale).to(dloss.dtype), None, None, None
