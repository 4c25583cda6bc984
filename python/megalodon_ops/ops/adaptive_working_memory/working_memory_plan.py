"""The order in which `adaptive_working_memory` processes its sequences' chunks, and the places of their tokens."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from ..common.definition import accumulation_dtype
from ..common.checks import sequence_spans

OP = "adaptive_working_memory"


def length(part: slice) -> int:
    return part.stop - part.start


class Chunks:
    """Chunks of W tokens each, in the order of turns: n chunks of a tensor (B, L, H, E) are (n H, W, E)."""

    def __init__(self, counts: list[int], spans: list[tuple[int, int, int]], width: int, like: Tensor) -> None:
        """counts: chunks of each turn. spans: (start, begin, end); a chunk is [start, start + W) in [begin, end)."""
        heads, device = like.shape[2], like.device
        self.turns = [slice((end - n) * heads, end * heads) for n, end in zip(counts, accumulate(counts))]
        first, begin, end = torch.tensor(spans, dtype=torch.int64).view(-1, 3, 1).unbind(1)
        tokens = first + torch.arange(width)  # (n, W)
        is_token = (tokens >= begin) & (tokens < end)
        heads_column = torch.arange(heads)[:, None]
        self.count, self._shape = len(spans), (len(spans) * heads, width)
        self.is_token = None  # all are tokens
        self._source = (tokens.where(is_token, 0)[:, None] * heads + heads_column).flatten().to(device)
        self._target = self._source
        if not is_token.all():
            spare = like.shape[0] * like.shape[1]  # a row that :meth:`put` drops
            self._target = (tokens.where(is_token, spare)[:, None] * heads + heads_column).flatten().to(device)
            self.is_token = is_token.repeat_interleave(heads, 0)[..., None].to(device)

    def take(self, x: Tensor) -> Tensor:
        """Copy the chunks of x (B, L, H, E) to (n H, W, E), zero where there is no token."""
        chunks = x.contiguous().flatten(0, 2).index_select(0, self._source).view(*self._shape, x.shape[3])
        return chunks if self.is_token is None else chunks.where(self.is_token, 0)

    def put(self, x: Tensor, like: Tensor) -> Tensor:
        """Inverse of :meth:`take`, with zeros elsewhere: (B, L, H, E), in the dtype of `like` (B, L, H, ...)."""
        B, L, H = like.shape[:3]
        rows = like.new_zeros((B * L + 1) * H, x.shape[2])
        rows.index_copy_(0, self._target, x.flatten(0, 1).to(like.dtype))
        return rows[: B * L * H].view(B, L, H, x.shape[2])


class Plan:
    """In turn t, chunk t of each sequence reads; if it is complete, chunk t - visible + 1 is then written.

    Chunk 0 is the unfinished chunk of the state. Sequences with more chunks come first. Without `to_end`, chunks that
    no later token reads are not written. An empty memory is read, too: NaN in a query gives NaN.
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
        H = q.shape[2]
        spans = sequence_spans(OP, q, cu_seqlens, lengths)
        seen = [0] * len(spans) if position is None else position.tolist()
        if wrong := [count for count in seen if not 0 <= count <= 2**62]:
            raise ValueError(f"{OP}: `state.position` must be in [0, 2^62], got {wrong[0]}.")
        lag = visible - 1
        ends = [count % C + end - begin for count, (begin, end) in zip(seen, spans)]  # counted from chunk 0
        order = sorted(range(len(spans)), key=lambda s: (-(-ends[s] // C), ends[s] // C), reverse=True)
        turns = range(-(-max(ends, default=0) // C))
        from_empty = position is None
        readers = [[s for s in order if ends[s] > t * C] for t in turns]  # sequences of each turn
        writers = [
            [s for s in order if ends[s] >= (t + 1) * C + (not to_end) and not (from_empty and t < lag)] for t in turns
        ]

        def tokens(s: int, chunk: int) -> tuple[int, int, int]:
            (begin, end), first = spans[s], spans[s][0] - seen[s] % C + chunk * C
            return first, begin, min(first + C, end)

        reads = [tokens(s, turn) for turn, sequences in enumerate(readers) for s in sequences]
        reads = [(max(first, begin), begin, end) for first, begin, end in reads]
        writes = [tokens(s, turn - lag) for turn, sequences in enumerate(writers) for s in sequences]
        self.reads = Chunks([*map(len, readers)], reads, max((end - first for first, _, end in reads), default=0), q)
        self.writes = Chunks([*map(len, writers)], writes, C, q)
        self.turns = [*zip(self.reads.turns, self.writes.turns)]
        self._shape = len(spans), H
        self._first_write = lag if from_empty else -1
        # (number, sequence, first cache row) of chunks that may begin in the cache. Row < 0: the sequence has no chunk
        # this early; zeros are written with weight 0.
        cached = [
            (number, s, (min(seen[s] // C, lag) + turn - lag) * C)
            for turn, sequences in enumerate(writers[:visible] if position is not None else [])
            for number, s in enumerate(sequences, self.writes.turns[turn].start // max(H, 1))
        ]
        self._cached = [chunk for chunk in cached if chunk[2] >= 0]
        absent = [number * H + h for number, _, first in cached if first < 0 for h in range(H)]
        self.absent = torch.tensor(absent, dtype=torch.int64, device=q.device)
        self._order = torch.tensor([s * H + h for s in order for h in range(H)], dtype=torch.int64, device=q.device)
        self._is_written, self._will_be_written = (
            torch.tensor([count >= visible * C for count in counts], dtype=torch.bool, device=q.device)[:, None, None]
            for counts in (seen, [count // C * C + end for count, end in zip(seen, ends)])
        )

    def is_empty(self, turn: int) -> bool:
        """Return True if nothing was written before this turn's chunks."""
        return turn <= self._first_write

    def start(self, q: Tensor, v: Tensor, memory: Tensor | None, mass: Tensor | None) -> tuple[Tensor, Tensor]:
        """M (S H, K, V) and z (S H, K) before the first turn, to be updated in place."""
        if memory is None:
            M = q.new_zeros(len(self._order), q.shape[3], v.shape[3], dtype=accumulation_dtype(q.dtype))
            return M, M.new_full(M.shape[:2], -torch.inf)
        return self.ordered(memory), self.ordered(mass.masked_fill(~self._is_written, -torch.inf))

    def end(self, M: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """memory (S, H, K, V) and mass (S, H, K) after the last turn."""
        return self._as_given(M), self._as_given(z).masked_fill_(~self._will_be_written, 0)

    def start_of_backward(self, M: Tensor, dmemory: Tensor | None, dmass: Tensor | None) -> tuple[Tensor, Tensor]:
        """Gradients of M and z after the last turn, to be updated in place."""
        G = torch.zeros_like(M) if dmemory is None else self.ordered(dmemory)
        if dmass is None:
            return G, M.new_zeros(M.shape[:2])
        return G, self.ordered(dmass.masked_fill(~self._will_be_written, 0))

    def end_of_backward(self, G: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        return self._as_given(G), self._as_given(g).masked_fill_(~self._is_written, 0)

    def ordered(self, x: Tensor) -> Tensor:
        """(S H, ...) of x (S, H, ...), a copy."""
        return x.contiguous().flatten(0, 1).index_select(0, self._order)

    def _as_given(self, x: Tensor) -> Tensor:
        return torch.empty_like(x).index_copy_(0, self._order, x).view(*self._shape, *x.shape[1:])

    def take_written(self, x: Tensor, cache: Tensor | None) -> Tensor:
        """Chunks to write, (n H, C, E), from x (B, L, H, E) and the state's cache (S, visible C, H, E)."""
        written = self.writes.take(x)
        if self._cached and self.writes.is_token is not None:
            (H, E), C = x.shape[2:], written.shape[1]
            chunks, sequences, first = torch.tensor(self._cached, device=x.device).unbind(1)
            rows = first[:, None] + torch.arange(C, device=x.device)
            cached = cache[sequences[:, None], rows].transpose(1, 2)  # (n, H, C, E)
            by_chunk = written.view(self.writes.count, H, C, E)
            is_token = self.writes.is_token.view(self.writes.count, H, C, 1)[chunks]
            by_chunk[chunks] = by_chunk[chunks].where(is_token, cached)
        return written
