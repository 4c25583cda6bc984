"""In which order `adaptive_working_memory` takes the chunks of its sequences, and where their tokens lie."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from ..common.definition import accumulation_dtype
from ..common.checks import sequence_spans

OP = "adaptive_working_memory"


def length(of: slice) -> int:
    return of.stop - of.start


class Chunks:
    """Chunks of W tokens each, those of the first turn first. n of them are (n H, W, E) of a tensor (B, L, H, E)."""

    def __init__(self, counts: list[int], spans: list[tuple[int, int, int]], width: int, like: Tensor) -> None:
        """counts: chunks of each turn. spans: of each chunk its first token, and from which to which there are tokens."""
        heads, device = like.shape[2], like.device
        self.turns = [slice((end - n) * heads, end * heads) for n, end in zip(counts, accumulate(counts))]
        first, begin, end = torch.tensor(spans, dtype=torch.int64).view(-1, 3, 1).unbind(1)
        tokens = first + torch.arange(width)  # (n, W)
        there = (tokens >= begin) & (tokens < end)
        of_heads = torch.arange(heads)[:, None]
        self.count, self._shape = len(spans), (len(spans) * heads, width)
        self.there = None
        self._from = (tokens.where(there, 0)[:, None] * heads + of_heads).flatten().to(device)
        self._to = self._from
        if not there.all():
            nowhere = like.shape[0] * like.shape[1]
            self._to = (tokens.where(there, nowhere)[:, None] * heads + of_heads).flatten().to(device)
            self.there = there.repeat_interleave(heads, 0)[..., None].to(device)

    def take(self, x: Tensor) -> Tensor:
        """A copy; zero where there is no token."""
        found = x.contiguous().flatten(0, 2).index_select(0, self._from).view(*self._shape, x.shape[3])
        return found if self.there is None else found.where(self.there, 0)

    def put(self, x: Tensor, like: Tensor) -> Tensor:
        """x where :meth:`take` takes it from, zeros elsewhere: (B, L, H, E), in the dtype of `like` (B, L, H, ...)."""
        B, L, H = like.shape[:3]
        found = like.new_zeros((B * L + 1) * H, x.shape[2])
        found.index_copy_(0, self._to, x.flatten(0, 1).to(like.dtype))
        return found[: B * L * H].view(B, L, H, x.shape[2])


class Plan:
    """In turn t, chunk t of each sequence reads; if it is complete, chunk t - visible + 1 is then written.

    Chunk 0 is the one that the state has begun. Sequences of most chunks are first. What no token reads is not written,
    but `to_end`. An empty memory is read, too, as a query may be NaN.
    """

    def __init__(
        self,
        q: Tensor,
        C: int,
        visible: int,
        position: Tensor | None,
        cu_seqlens: Tensor | None,
        lengths: Tensor | None,
        to_end: bool,
    ) -> None:
        B, L, H = q.shape[:3]
        spans = sequence_spans(OP, q, cu_seqlens, lengths)
        seen = [0] * len(spans) if position is None else position.tolist()
        if wrong := [count for count in seen if not 0 <= count <= 2**62]:
            raise ValueError(f"{OP}: `state.position` must be in [0, 2^62], got {wrong[0]}.")
        lag = visible - 1
        until = [count % C + end - begin for count, (begin, end) in zip(seen, spans)]  # counted from chunk 0
        order = sorted(range(len(spans)), key=lambda s: (-(-until[s] // C), until[s] // C), reverse=True)
        turns = range(-(-max(until, default=0) // C))
        from_empty = position is None
        of_reads = [[s for s in order if until[s] > t * C] for t in turns]
        of_writes = [
            [s for s in order if until[s] >= (t + 1) * C + (not to_end) and not (from_empty and t < lag)] for t in turns
        ]

        def tokens(s: int, chunk: int) -> tuple[int, int, int]:
            (begin, end), first = spans[s], spans[s][0] - seen[s] % C + chunk * C
            return first, begin, min(first + C, end)

        reads = [tokens(s, turn) for turn, of_turn in enumerate(of_reads) for s in of_turn]
        reads = [(max(first, begin), begin, end) for first, begin, end in reads]
        writes = [tokens(s, turn - lag) for turn, of_turn in enumerate(of_writes) for s in of_turn]
        self.reads = Chunks([*map(len, of_reads)], reads, max((end - first for first, _, end in reads), default=0), q)
        self.writes = Chunks([*map(len, of_writes)], writes, C, q)
        self.turns = [*zip(self.reads.turns, self.writes.turns)]
        self._shape = len(spans), H
        self._first_write = lag if from_empty else -1
        # The chunks that may begin in the cache: their numbers, sequences and first rows there. Where a sequence has no
        # chunk so early, a chunk of zeros is written by a share of 0.
        kept = [
            (number, s, (min(seen[s] // C, lag) + turn - lag) * C)
            for turn, of_turn in enumerate(of_writes[:visible] if position is not None else [])
            for number, s in enumerate(of_turn, self.writes.turns[turn].start // max(H, 1))
        ]
        self._kept = [chunk for chunk in kept if chunk[2] >= 0]
        absent = [number * H + h for number, _, first in kept if first < 0 for h in range(H)]
        self.absent = torch.tensor(absent, dtype=torch.int64, device=q.device)
        self._order = torch.tensor([s * H + h for s in order for h in range(H)], dtype=torch.int64, device=q.device)
        self._had, self._has = (
            torch.tensor([count >= visible * C for count in counts], dtype=torch.bool, device=q.device)[:, None, None]
            for counts in (seen, [count // C * C + end for count, end in zip(seen, until)])
        )

    def is_empty(self, turn: int) -> bool:
        """Whether nothing was written before this turn's chunks."""
        return turn <= self._first_write

    def start(self, q: Tensor, v: Tensor, memory: Tensor | None, mass: Tensor | None) -> tuple[Tensor, Tensor]:
        """M (S H, K, V) and z (S H, K) before the first turn, to be written in place."""
        if memory is None:
            M = q.new_zeros(len(self._order), q.shape[3], v.shape[3], dtype=accumulation_dtype(q.dtype))
            return M, M.new_full(M.shape[:2], -torch.inf)
        return self.ordered(memory), self.ordered(mass.masked_fill(~self._had, -torch.inf))

    def end(self, M: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """memory (S, H, K, V) and mass (S, H, K) after the last turn."""
        return self._as_given(M), self._as_given(z).masked_fill_(~self._has, 0)

    def start_of_backward(self, M: Tensor, dmemory: Tensor | None, dmass: Tensor | None) -> tuple[Tensor, Tensor]:
        """The gradients of M and z after the last turn, to be written in place."""
        if dmemory is None:
            return torch.zeros_like(M), M.new_zeros(M.shape[:2])
        return self.ordered(dmemory), self.ordered(dmass.masked_fill(~self._has, 0))

    def end_of_backward(self, G: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        return self._as_given(G), self._as_given(g).masked_fill_(~self._had, 0)

    def ordered(self, x: Tensor) -> Tensor:
        """(S H, ...) of x (S, H, ...), a copy."""
        return x.contiguous().flatten(0, 1).index_select(0, self._order)

    def _as_given(self, x: Tensor) -> Tensor:
        return torch.empty_like(x).index_copy_(0, self._order, x).view(*self._shape, *x.shape[1:])

    def take_written(self, x: Tensor, cache: Tensor | None) -> Tensor:
        """(n H, C, E) of x (B, L, H, E), and of what the state has kept (S, visible C, H, E) of them."""
        found = self.writes.take(x)
        if self._kept and self.writes.there is not None:
            (H, E), C = x.shape[2:], found.shape[1]
            chunks, sequences, first = torch.tensor(self._kept, device=x.device).unbind(1)
            rows = first[:, None] + torch.arange(C, device=x.device)
            kept = cache[sequences[:, None], rows].transpose(1, 2)  # (n, H, C, E)
            by_chunk = found.view(self.writes.count, H, C, E)
            there = self.writes.there.view(self.writes.count, H, C, 1)[chunks]
            by_chunk[chunks] = by_chunk[chunks].where(there, kept)
        return found
