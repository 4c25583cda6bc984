"""Attention to a position's own chunk and the previous one, by attention inside windows of two chunks on two grids.

    chunk                 0    1    2    3    4
    early windows      [  .    o ][  .    o ][  .      o: sees two chunks, as required
    late windows            [  .    o ][  .    o ]     .: sees its own chunk alone

The first chunk of a sequence and the second chunk of each early window use the results of the early windows. All other
chunks use those of the late windows. The other results, of the windows' first halves, are not used: 4 pairs of a query
and a key are computed where 3 would suffice. In the backward the gradients of unused results are zero.

A state has up to two chunks, the last complete one and the unfinished one, in the 2 C rows of its cache. When the rows
are full, the last complete chunk moves to the front. Calls whose positions fit the cache, as in decoding, have no late
windows.
"""

import contextlib
import threading
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from ..common.definition import define_op, empty_like
from ..common.states import accumulation_dtype
from ..common.spans import num_sequences, read_spans
from .attention_flops import attention_bwd_flops, attention_flops, pairs_in_two_chunks

ops = torch.ops.megalodon_ops  # chunked_attention.py, which imports this file, defines chunked_attention_*


class _Caller(threading.local):
    knows_that_positions_fit = False


_caller = _Caller()


@contextlib.contextmanager
def positions_fit() -> Iterator[None]:
    """Declare that no call of this thread inside the context fills a cache, so that the host reads no positions."""
    _caller.knows_that_positions_fit = True
    try:
        yield
    finally:
        _caller.knows_that_positions_fit = False


class _Grids:
    """Positions of the sequences on the early grid, and the late windows of sequences of more than two chunks."""

    def __init__(
        self, x: Tensor, C: int, position: Tensor | None, spans: Tensor | None, *, state_only: bool = False
    ) -> None:
        """x (B, L, ...): new tokens. position (S,): valid rows of the cache. state_only: no outputs are computed."""
        self.has_late = False
        if _caller.knows_that_positions_fit:
            return
        B, L = x.shape[:2]
        pairs = read_spans("chunked_attention", x, spans)
        cached = [0] * len(pairs) if position is None else position.tolist()
        self._C, self._position = C, position
        self.rows = [first + end - begin for first, (begin, end) in zip(cached, pairs)]  # rows on the early grid
        self.has_late = max(self.rows, default=0) >= 2 * C + (not state_only)
        if not self.has_late:
            return
        late, rows = [], torch.full((B * L,), -1)
        for first, (begin, end) in zip(cached, pairs):
            late.append((min(begin + max(C - first, 0), end), end))
            rows[begin:end] = torch.arange(first, first + end - begin)
        self.late_spans = torch.tensor(late, device=x.device)  # without each sequence's first chunk
        rows = rows.view(B, L, 1, 1).to(x.device)
        self.takes_early = (rows < 2 * C) | (rows % (2 * C) >= C)

    def late_state(self, *caches: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the caches (S, 2 C, ...) without their first chunk, and positions, for the late windows."""
        if self._position is None:
            return *caches, None
        position = (self._position - self._C).clamp(min=0)
        return *(torch.cat((x[:, self._C :], x[:, : self._C]), 1) for x in caches), position


def _fwd(q, k, v, cache_k, cache_v, position, chunk_size, scale, spans):
    caches = (cache_k, cache_v)
    windows = (2 * chunk_size, True, scale, 0.0, None)  # chunk size, causal, scale, dropkey, its seed
    o, lse = ops.chunked_attention_fwd(q, k, v, *caches, position, *windows, spans)
    grids = _Grids(q, chunk_size, position, spans)
    if not grids.has_late:
        return o, lse
    late_o, late_lse = ops.chunked_attention_fwd(q, k, v, *grids.late_state(*caches), *windows, grids.late_spans)
    return o.where(grids.takes_early, late_o), lse.where(grids.takes_early[..., 0], late_lse)


def attention_fake(q, k, v, *_):
    """Return uninitialised o and lse."""
    return empty_like(v), q.new_empty(q.shape[:-1], dtype=accumulation_dtype(q.dtype))


def _bwd(do, q, k, v, o, lse, cache_k, cache_v, position, chunk_size, scale, spans):
    caches, tensors = (cache_k, cache_v), (q, k, v, o, lse)
    windows = (2 * chunk_size, True, scale, 0.0, None)  # as in `_fwd`
    grids = _Grids(q, chunk_size, position, spans)
    early_do = do.where(grids.takes_early, 0) if grids.has_late else do
    grads = ops.chunked_attention_bwd(early_do, *tensors, *caches, position, *windows, spans)
    if not grids.has_late:
        return grads
    late_do, late_state = do.where(~grids.takes_early, 0), grids.late_state(*caches)
    late = ops.chunked_attention_bwd(late_do, *tensors, *late_state, *windows, grids.late_spans)
    return tuple(grad.add_(more) for grad, more in zip(grads, late))


def _state(k, v, cache_k, cache_v, position, chunk_size, spans):
    size = 2 * chunk_size
    early = ops.chunked_attention_state(k, v, cache_k, cache_v, position, size, spans)
    grids = _Grids(k, chunk_size, position, spans, state_only=True)
    if not grids.has_late:
        return early
    late = ops.chunked_attention_state(k, v, *grids.late_state(cache_k, cache_v), size, grids.late_spans)
    takes_late = torch.tensor([rows >= size and rows % size < chunk_size for rows in grids.rows], device=k.device)
    return tuple(torch.where(takes_late.view(-1, *(1,) * (a.dim() - 1)), b, a) for a, b in zip(early, late))


def _state_inplace(k, v, cache_k, cache_v, position, chunk_size, spans):
    before = (cache_k, cache_v, position)
    if not _Grids(k, chunk_size, position, spans, state_only=True).has_late:
        ops.chunked_attention_state_(k, v, *before, 2 * chunk_size, spans)
        return
    for old, new in zip(before, _state(k, v, *before, chunk_size, spans)):
        old.copy_(new)


def state_fake(k, v, cache_k, cache_v, position, chunk_size, spans, visible_chunks=1):
    """Return uninitialised tensors of a state, with dtype and last dimensions of the given caches, else of k, v."""
    like = (k if cache_k is None else cache_k, v if cache_v is None else cache_v)
    sequences = num_sequences(k.shape[0], spans)
    caches = (x.new_empty((sequences, visible_chunks * chunk_size, *x.shape[2:])) for x in like)
    return *caches, k.new_empty((sequences,), dtype=torch.int64)


_CACHES = "Tensor? cache_k, Tensor? cache_v, Tensor? position, int chunk_size"
two_chunk_attention_bwd = define_op(
    f"two_chunk_attention_bwd(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, {_CACHES}, float scale, "
    f"Tensor? spans) -> (Tensor dq, Tensor dk, Tensor dv)",
    kernel=_bwd,
    flops=lambda q, v, position, chunk_size, spans: attention_bwd_flops(
        q, v, pairs_in_two_chunks(q, position, chunk_size, spans)
    ),
)
two_chunk_attention_fwd = define_op(
    f"two_chunk_attention_fwd(Tensor q, Tensor k, Tensor v, {_CACHES}, float scale, Tensor? spans) -> (Tensor o, Tensor lse)",
    kernel=_fwd,
    fake=attention_fake,
    backward=two_chunk_attention_bwd,
    flops=lambda q, v, position, chunk_size, spans: attention_flops(
        q, v, pairs_in_two_chunks(q, position, chunk_size, spans)
    ),
)
two_chunk_attention_state = define_op(
    f"two_chunk_attention_state(Tensor k, Tensor v, {_CACHES}, Tensor? spans) "
    "-> (Tensor cache_k_out, Tensor cache_v_out, Tensor position_out)",
    kernel=_state,
    fake=partial(state_fake, visible_chunks=2),
    flops=lambda: 0,
)
two_chunk_attention_state_ = define_op(
    "two_chunk_attention_state_(Tensor k, Tensor v, Tensor(a!) cache_k, Tensor(b!) cache_v, Tensor(c!) position, "
    "int chunk_size, Tensor? spans) -> ()",
    kernel=_state_inplace,
    flops=lambda: 0,
)
