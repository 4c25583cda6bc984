"""The exchanges of chunk parallel as autograd functions, each with a collective in its backward.

Every rank of the group must call every function, in the same order. The results enter the graph of every rank's loss.
The backward of an exchange needs the backward of the next exchange, so backwards, too, have one order on all ranks.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from .rank_checks import all_gather


def send_to_all(value: Tensor, start: Tensor | None, group: ProcessGroup) -> tuple[Tensor, Tensor | None, dist.Work]:
    """Send a real tensor, which has the same shape on all ranks, to all ranks, without waiting.

    Gradients of a received tensor return to its rank. `start` is equal on all ranks and is returned unchanged; its
    gradient is the mean over ranks, so the gradient is the same on every rank.

    Returns:
        the tensors of all ranks (P, ...), valid after `work.wait()`; `start`; and `work`.
    """
    works: list[dist.Work] = []
    return *_SendToAll.apply(value, start, group, works), works[0]


class _SendToAll(torch.autograd.Function):
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
        dvalues = dvalues.contiguous()
        parts = torch.empty_like(dvalues)
        dist.all_to_all_single(parts.view(-1), dvalues.view(-1), group=ctx.group)
        if ctx.start_is_given and ctx.needs_input_grad[1]:
            dstart = dstart.contiguous().clone()
            dist.all_reduce(dstart, group=ctx.group)
            dstart /= dist.get_world_size(ctx.group)
        return parts.sum(0), dstart, None, None


def send_to_next(value: Tensor, next_rank: int | None, previous_rank: int | None, group: ProcessGroup) -> Tensor:
    """Send a tensor (R, n, ...) to `next_rank`, and return the tensor of the same shape that `previous_rank` sends.

    Gradients return the same way. Without a `next_rank` nothing is sent, without a `previous_rank` n is 0.
    """
    return _SendToNext.apply(value, next_rank, previous_rank, group)


class _SendToNext(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, next_rank, previous_rank, group):
        ctx.next_rank, ctx.previous_rank, ctx.group, ctx.shape = next_rank, previous_rank, group, value.shape
        received = value.new_empty(value.shape if previous_rank is not None else (len(value), 0, *value.shape[2:]))
        _shift(received, previous_rank, value, next_rank, group)
        return received

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dreceived):
        dvalue = dreceived.new_zeros(ctx.shape)
        _shift(dvalue, ctx.next_rank, dreceived, ctx.previous_rank, ctx.group)
        return dvalue, None, None, None


def _shift(received: Tensor, source: int | None, value: Tensor, target: int | None, group: ProcessGroup) -> None:
    """Send `value` to the rank `target`, and receive into `received` from the rank `source`; each rank calls this."""
    ranks = range(dist.get_world_size(group))
    arriving = [received.numel() if rank == source else 0 for rank in ranks]
    leaving = [value.numel() if rank == target else 0 for rank in ranks]
    flat, sent = received.view(-1)[: sum(arriving)], value.contiguous().view(-1)[: sum(leaving)]
    dist.all_to_all_single(flat, sent, arriving, leaving, group=group)


def gather_rows(own: Tensor, own_rows: Tensor, others: Tensor, other_rows: Tensor, group: ProcessGroup) -> Tensor:
    """Gather S rows from all ranks on every rank; a row's gradients return to the rank that has the row.

    Args:
        own: (n, F), the rows of this rank.
        own_rows: (n,), their indices.
        others: (S, F), equal on all ranks.
        other_rows: indices of the rows that no rank has; they are taken from `others`.
    """
    result = _Sum.apply(torch.zeros_like(others).index_copy(0, own_rows, own), group)  # exact: other ranks add 0
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
    """Sum or mean of the losses of all ranks, from each rank's sum and count: () in the dtype of the sum.

    The backward multiplies a rank's gradient by the number of ranks, so the mean of the ranks' gradients, which data
    parallel computes, is the gradient of the result.
    """

    @staticmethod
    def forward(ctx, loss_sum, count, group, mean):
        ranks = dist.get_world_size(group)
        total = torch.stack([loss_sum.double(), count.double()])
        dist.all_reduce(total, group=group)
        ctx.save_for_backward(ranks / total[1] if mean else torch.full_like(total[1], ranks))
        return (total[0] / total[1] if mean else total[0].clone()).to(loss_sum.dtype)  # no view

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss):
        (scale,) = ctx.saved_tensors
        return (dloss.double() * scale).to(dloss.dtype), None, None, None


class Tied(torch.autograd.Function):
    """Identity of several tensors. If one result gets a gradient, every argument does, zeros where there is none."""

    @staticmethod
    def forward(ctx, *tensors):
        return tuple(tensor.detach() for tensor in tensors)  # no views, of which FSDP2 warns

    @staticmethod
    def backward(ctx, *gradients):
        return gradients
