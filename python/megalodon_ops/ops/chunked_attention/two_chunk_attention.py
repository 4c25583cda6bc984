"""Attention to a step's chunk and the one before it, by attention inside windows of two chunks on two grids.

    steps, in chunks      0    1    2    3    4
    early windows      [  .    o ][  .    o ][  .      o: sees two chunks, as it is to
    late windows            [  .    o ][  .    o ]     .: sees its own chunk alone

The first chunk of all, and of each early window the second, take what the early windows give; all others what the late
ones do. Both windows compute their first halves in vain: 4 pairs of a query and a key where 3 would do. In the backward
those halves have no incoming gradients, and the log-sum-exp of the other grid.

A state keeps up to two chunks, the last complete one and the unfinished one: in the cache's 2 C rows the grid begins anew
whenever they are full. Calls whose steps fit the cache, as those of decoding, have no late windows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.definition import accumulation_dtype, define_op, empty_like, num_sequences
from ..common.checks import sequence_spans
from .attention_flops import attention_bwd_flops, attention_flops, pairs_in_two_chunks

ops = torch.ops.megalodon_ops  # chunked_attention.py, which imports this file, defines those of windows


class _Grids:
    """Where the sequences' steps lie on the early grid, and the late windows of those that reach beyond one."""

    def __init__(
        self, x: Tensor, C: int, position: Tensor | None, cu_seqlens: Tensor | None, lengths: Tensor | None,
        *, of_state: bool = False,
    ) -> None:  # fmt: skip
        """x (B, L, ...); position (S,) how many rows of the cache are kept. of_state: what is wanted is the state after x."""
        B, L = x.shape[:2]
        spans = sequence_spans("chunked_attention", x, cu_seqlens, lengths)
        kept = [0] * len(spans) if position is None else position.tolist()
        self._C, self._position = C, position
        self.rows = [have + end - begin for have, (begin, end) in zip(kept, spans)]  # of the early grid
        self.is_late = max(self.rows, default=0) >= 2 * C + (not of_state)
        if not self.is_late:
            return
        # Late windows begin with a sequence's second chunk. What lies between sequences, and their first chunks, are
        # sequences of their own, whose results are not used.
        bounds, self.number, steps = [0], [], torch.full((B * L,), -1)
        for have, (begin, end) in zip(kept, spans):
            start = min(begin + max(C - have, 0), end)
            self.number.append(len(bounds) + 1)
            bounds += [begin, start, end]
            steps[begin:end] = torch.arange(have, have + end - begin)
        self.cu_seqlens = torch.tensor([*bounds, B * L], device=x.device)
        self.number = torch.tensor(self.number, device=x.device)
        steps = steps.view(B, L, 1, 1).to(x.device)
        self.is_padding, self.takes_early = steps < 0, (steps < 2 * C) | (steps % (2 * C) >= C)

    def late(self, *tensors: Tensor) -> list[Tensor]:
        """Tensors (B, L, ...) as one row."""
        return [x.contiguous().flatten(0, 1)[None] for x in tensors]

    def late_state(self, *caches: Tensor | None) -> tuple[Tensor | None, ...]:
        """The caches (S, 2 C, ...) less their first chunk, and the position, by the numbers of late sequences."""
        if self._position is None:
            return *caches, None
        position = (self._position - self._C).clamp(min=0)
        moved = [torch.cat((x[:, self._C :], x[:, : self._C]), 1) for x in caches]
        return tuple(map(self._by_number, (*moved, position)))

    def _by_number(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(self.cu_seqlens) - 1, *x.shape[1:]).index_copy_(0, self.number, x)


def _fwd(q, k, v, cache_k, cache_v, position, chunk_size, scale, cu_seqlens, lengths):
    def attend(q, k, v, cache_k, cache_v, position, cu_seqlens, lengths):
        windows = (2 * chunk_size, True, scale, 0.0, None)
        return ops.chunked_attention_fwd(q, k, v, cache_k, cache_v, position, *windows, cu_seqlens, lengths)

    o, lse = attend(q, k, v, cache_k, cache_v, position, cu_seqlens, lengths)
    grids = _Grids(q, chunk_size, position, cu_seqlens, lengths)
    if not grids.is_late:
        return o, lse
    late_o, late_lse = attend(*grids.late(q, k, v), *grids.late_state(cache_k, cache_v), grids.cu_seqlens, None)
    early = grids.takes_early
    return o.where(early, late_o.view_as(o)), lse.where(early[..., 0], late_lse.view_as(lse))


def _fwd_fake(q, k, v, *_):
    return empty_like(v), q.new_empty(q.shape[:-1], dtype=accumulation_dtype(q.dtype))


def _bwd(do, q, k, v, o, lse, cache_k, cache_v, position, chunk_size, scale, cu_seqlens, lengths):
    def differentiate(do, q, k, v, o, lse, cache_k, cache_v, position, cu_seqlens, lengths):
        windows = (2 * chunk_size, True, scale, 0.0, None)
        return ops.chunked_attention_bwd(do, q, k, v, o, lse, cache_k, cache_v, position, *windows, cu_seqlens, lengths)

    grids = _Grids(q, chunk_size, position, cu_seqlens, lengths)
    if not grids.is_late:
        return differentiate(do, q, k, v, o, lse, cache_k, cache_v, position, cu_seqlens, lengths)
    of_early, of_late = do.where(grids.takes_early, 0), do.where(~grids.takes_early, 0)
    grads = differentiate(of_early, q, k, v, o, lse, cache_k, cache_v, position, cu_seqlens, lengths)
    late = differentiate(
        *grids.late(of_late, q, k, v, o, lse), *grids.late_state(cache_k, cache_v), grids.cu_seqlens, None
    )
    return tuple(grad.add_(more.view_as(grad).masked_fill_(grids.is_padding, 0)) for grad, more in zip(grads, late))


def _state(k, v, cache_k, cache_v, position, chunk_size, cu_seqlens, lengths):
    size = 2 * chunk_size
    early = ops.chunked_attention_state(k, v, cache_k, cache_v, position, size, cu_seqlens, lengths)
    grids = _Grids(k, chunk_size, position, cu_seqlens, lengths, of_state=True)
    if not grids.is_late:
        return early
    late = ops.chunked_attention_state(
        *grids.late(k, v), *grids.late_state(cache_k, cache_v), size, grids.cu_seqlens, None
    )
    begins_anew = torch.tensor([rows >= size and rows % size < chunk_size for rows in grids.rows], device=k.device)
    return tuple(
        torch.where(begins_anew.view(-1, *(1,) * (kept.dim() - 1)), of_late[grids.number], kept)
        for kept, of_late in zip(early, late)
    )


def _state_fake(k, v, cache_k, cache_v, position, chunk_size, cu_seqlens, lengths):
    sequences = num_sequences(len(k), cu_seqlens)
    caches = (x.new_empty(sequences, 2 * chunk_size, *x.shape[2:]) for x in (k, v))
    return *caches, k.new_empty(sequences, dtype=torch.int64)


_SEQUENCES = "Tensor? cu_seqlens, Tensor? lengths"
_CACHES = "Tensor? cache_k, Tensor? cache_v, Tensor? position, int chunk_size"
two_chunk_attention_bwd = define_op(
    f"two_chunk_attention_bwd(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, {_CACHES}, float scale, "
    f"{_SEQUENCES}) -> (Tensor dq, Tensor dk, Tensor dv)",
    kernel=_bwd,
    flops=lambda q, v, position, chunk_size, cu_seqlens, lengths: attention_bwd_flops(
        q, v, pairs_in_two_chunks(q, position, chunk_size, cu_seqlens, lengths)
    ),
)
two_chunk_attention_fwd = define_op(
    f"two_chunk_attention_fwd(Tensor q, Tensor k, Tensor v, {_CACHES}, float scale, {_SEQUENCES}) -> (Tensor o, Tensor lse)",
    kernel=_fwd,
    fake=_fwd_fake,
    backward=two_chunk_attention_bwd,
    flops=lambda q, v, position, chunk_size, cu_seqlens, lengths: attention_flops(
        q, v, pairs_in_two_chunks(q, position, chunk_size, cu_seqlens, lengths)
    ),
)
two_chunk_attention_state = define_op(
    f"two_chunk_attention_state(Tensor k, Tensor v, {_CACHES}, {_SEQUENCES}) "
    "-> (Tensor cache_k_out, Tensor cache_v_out, Tensor position_out)",
    kernel=_state,
    fake=_state_fake,
    flops=lambda: 0,
)
