"""The order in which `adaptive_working_memory` processes its sequences' chunks, and the places of their tokens."""

from collections.abc import Iterator
from itertools import accumulate

import torch
from torch import Tensor

from ..common.definition import empty_like
from ..common.states import accumulation_dtype
from ..common.spans import read_spans

OP = "adaptive_working_memory"
Index = slice | tuple[slice, int]


def matrices(*tensors: Tensor) -> list[Tensor]:
    """Return the tensors (n, H, rows, columns) as batches of matrices, (n H, rows, columns) views."""
    return [tensor.flatten(0, 1) for tensor in tensors]


class ChunkViews:
    """Chunks of W tokens each, as views: n / S chunks from the start of each of S adjacent sequences of one length.

    There is one head. Tensors of chunks are (S, n / S, 1, W, E).
    """

    def __init__(self, counts: list[int], sequences: int, length: int, width: int) -> None:
        """counts: number of chunks of each turn, `sequences` or 0. length: tokens of a sequence. width: W."""
        self._shape, self._width = (sequences, length), width
        chunks_before = [*accumulate(map(bool, counts), initial=0)]  # in each sequence, before each turn and at the end
        self.turns: list[Index] = [(slice(None), number) for number in chunks_before[:-1]]
        self._chunks = chunks_before[-1]
        # Parts of one sequence are contiguous. They are used unless they take more than four times as many calls.
        by_sequence = 4 * self._chunks >= sequences
        self._parts = [*range(sequences)] if by_sequence else [(slice(None), n) for n in range(self._chunks)]

    def take(self, x: Tensor) -> Tensor:
        """Return the chunks of x (B, L, 1, E): a view, or a copy if x is not contiguous."""
        rows = x.contiguous().view(*self._shape, x.shape[3])[:, : self._chunks * self._width]
        return rows.unflatten(1, (self._chunks, 1, self._width))

    def empty(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return a new tensor (B, L, 1, E), zero outside of its chunks, and the chunks, which the caller fills."""
        whole = empty_like(like)
        whole.view(*self._shape, like.shape[3])[:, self._chunks * self._width :] = 0
        return whole, self.take(whole)

    def put(self, whole: Tensor, chunks: Tensor) -> Tensor:
        """Return `whole`, of which the chunks are views; both are from :meth:`empty`."""
        return whole

    def matrices(self, *tensors: Tensor) -> Iterator[list[Tensor]]:
        """Yield parts of the tensors (S, n / S, 1, rows, columns), as batches of matrices."""
        return (matrices(*(tensor[part] for tensor in tensors)) for part in self._parts)


class ChunkCopies:
    """Chunks of W tokens each, in the order of turns, as copies. Tensors of chunks are (n, H, W, E)."""

    def __init__(self, counts: list[int], spans: list[tuple[int, int, int]], width: int, like: Tensor) -> None:
        """counts: number of chunks of each turn. width: W.

        spans: (start, begin, end) of each chunk, which has the tokens of [start, start + W) that are in [begin, end).
        """
        heads, device = like.shape[2], like.device
        self.turns: list[Index] = [slice(end - count, end) for count, end in zip(counts, accumulate(counts))]
        start, begin, end = torch.tensor(spans, dtype=torch.int64).view(-1, 3, 1).unbind(1)
        tokens = start + torch.arange(width)  # (n, W)
        is_token = (tokens >= begin) & (tokens < end)
        heads_column = torch.arange(heads)[:, None]
        self.count, self._width = len(spans), width
        self.is_token = None  # every place of a chunk has a token
        self._source = (tokens.where(is_token, 0)[:, None] * heads + heads_column).flatten().to(device)
        self._target = self._source
        if not is_token.all():
            spare = like.shape[0] * like.shape[1]  # additional row, which :meth:`put` drops
            self._target = (tokens.where(is_token, spare)[:, None] * heads + heads_column).flatten().to(device)
            self.is_token = is_token[:, None, :, None].to(device)

    def take(self, x: Tensor) -> Tensor:
        """Return the chunks of x (B, L, H, E), zero at places without a token."""
        shape = self.count, x.shape[2], self._width, x.shape[3]
        chunks = x.contiguous().flatten(0, 2).index_select(0, self._source).view(shape)
        return chunks if self.is_token is None else chunks.where(self.is_token, 0)

    def empty(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return a new tensor (B, L, H, E), and chunks, which the caller fills."""
        return empty_like(like), like.new_empty(self.count, like.shape[2], self._width, like.shape[3])

    def put(self, whole: Tensor, chunks: Tensor) -> Tensor:
        """Return a tensor like `whole` with the chunks, and zeros elsewhere."""
        B, L, H, E = whole.shape
        rows = whole.new_zeros((B * L + 1) * H, E).index_copy_(0, self._target, chunks.flatten(0, 2))
        return rows[: B * L * H].view(B, L, H, E)

    def matrices(self, *tensors: Tensor) -> Iterator[list[Tensor]]:
        """Yield the tensors (n, H, rows, columns), once, as batches of matrices."""
        return iter([matrices(*tensors)])


class Plan:
    """Order of reads and writes: in turn t, chunk t of each sequence reads M.

    If chunk t is complete, chunk t - visible + 1 is then written. Chunk 0 is the unfinished chunk of the state.
    Sequences are sorted by decreasing number of chunks, so those of a turn come first. Without `to_end`, chunks that no
    later token reads are not written. An empty memory is read, too: NaN in a query gives NaN.

    Attributes:
        reads, writes: the chunks that read M and the chunks that are written.
        turns: for each turn (number of reads, their index in `reads`, number of writes, their index in `writes`).
        absent: indices of writes for which the sequence has no chunk; zeros are written with weight 0.
    """

    def __init__(
        self, q: Tensor, C: int, visible: int, position: Tensor | None, spans: Tensor | None, to_end: bool
    ) -> None:
        H = q.shape[2]
        pairs = read_spans(OP, q, spans)
        seen = [0] * len(pairs) if position is None else position.tolist()
        if wrong := [count for count in seen if not 0 <= count <= 2**62]:
            raise ValueError(f"{OP}: `state.position` must be in [0, 2^62], got {wrong[0]}.")
        lag = visible - 1
        ends = [count % C + end - begin for count, (begin, end) in zip(seen, pairs)]  # counted from chunk 0's start
        order = sorted(range(len(pairs)), key=lambda s: (-(-ends[s] // C), ends[s] // C), reverse=True)
        num_turns = -(-max(ends, default=0) // C)
        from_empty = position is None
        readers, writers = [], []  # the sequences of each turn
        for turn in range(num_turns):
            readers.append([s for s in order if ends[s] > turn * C])
            least_end = (turn + 1) * C + (not to_end)
            is_early = from_empty and turn < lag  # attention still sees chunk 0
            writers.append([] if is_early else [s for s in order if ends[s] >= least_end])

        def tokens(s: int, chunk: int) -> tuple[int, int, int]:
            """Return where a chunk starts, perhaps in the cache, and the first and last-plus-one of its new tokens."""
            begin, end = pairs[s]
            start = begin - seen[s] % C + chunk * C
            return start, begin, min(start + C, end)

        reads = [tokens(s, turn) for turn, sequences in enumerate(readers) for s in sequences]
        reads = [(max(start, begin), begin, end) for start, begin, end in reads]
        width = max((end - start for start, _, end in reads), default=0)
        num_readers, num_writers = [*map(len, readers)], [*map(len, writers)]
        self.reads: ChunkViews | ChunkCopies
        self.writes: ChunkViews | ChunkCopies
        if (from_empty or lag == 0) and _is_grid(q, pairs, seen, C):
            sizes = dict(sequences=len(pairs), length=q.shape[0] * q.shape[1] // len(pairs), width=width)
            self.reads = ChunkViews(num_readers, **sizes)
            self.writes = ChunkViews(num_writers, **sizes)
        else:
            writes = [tokens(s, turn - lag) for turn, sequences in enumerate(writers) for s in sequences]
            self.reads = ChunkCopies(num_readers, reads, width, like=q)
            self.writes = ChunkCopies(num_writers, writes, C, like=q)
        self.turns = [*zip(num_readers, self.reads.turns, num_writers, self.writes.turns)]
        self._shape = len(pairs), H
        self._cached = []  # writes that may begin in the cache: (index, sequence, first cache row)
        absent = []
        first_writes = [(turn, s) for turn, sequences in enumerate(writers[:visible]) for s in sequences]
        for index, (turn, s) in enumerate([] if from_empty else first_writes):
            first_row = (min(seen[s] // C, lag) + turn - lag) * C
            if first_row >= 0:
                self._cached.append((index, s, first_row))
            else:
                absent.append(index)
        self.absent = torch.tensor(absent, dtype=torch.int64, device=q.device)
        self._order = torch.tensor(order, dtype=torch.int64, device=q.device)

        def has_written(counts: list[int]) -> Tensor:
            """Return (S, 1, 1) bools, True where a chunk has been written after so many positions."""
            has_chunk = [count >= visible * C for count in counts]
            return torch.tensor(has_chunk, dtype=torch.bool, device=q.device)[:, None, None]

        self._is_written = has_written(seen)
        self._will_be_written = has_written([count // C * C + end for count, end in zip(seen, ends)])

    def start(self, q: Tensor, v: Tensor, memory: Tensor | None, mass: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return M (S, H, K, V) and z (S, H, K) before the first turn, to be updated in place."""
        if memory is None:
            M = q.new_zeros(*self._shape, q.shape[3], v.shape[3], dtype=accumulation_dtype(q.dtype))
            return M, M.new_full(M.shape[:3], -torch.inf)
        return self.ordered(memory), self.ordered(mass.masked_fill(~self._is_written, -torch.inf))

    def end(self, M: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return memory (S, H, K, V) and mass (S, H, K) after the last turn, in the given order of sequences."""
        return self._as_given(M), self._as_given(z).masked_fill_(~self._will_be_written, 0)

    def start_of_backward(self, M: Tensor, dmemory: Tensor | None, dmass: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the gradients of M and z after the last turn, to be updated in place."""
        G = torch.zeros_like(M) if dmemory is None else self.ordered(dmemory)
        if dmass is None:
            return G, M.new_zeros(M.shape[:3])
        return G, self.ordered(dmass.masked_fill(~self._will_be_written, 0))

    def end_of_backward(self, G: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        return self._as_given(G), self._as_given(g).masked_fill_(~self._is_written, 0)

    def ordered(self, x: Tensor) -> Tensor:
        """Return a contiguous copy of x (S, H, ...) with the sequences in the order of the plan."""
        return x.contiguous().index_select(0, self._order)

    def _as_given(self, x: Tensor) -> Tensor:
        return torch.empty_like(x).index_copy_(0, self._order, x)

    def take_written(self, x: Tensor, cache: Tensor | None) -> Tensor:
        """Return the chunks to write, from x (B, L, H, E) and the state's cache (S, visible C, H, E)."""
        written = self.writes.take(x)
        if self._cached and isinstance(self.writes, ChunkCopies) and self.writes.is_token is not None:
            chunks, sequences, first = torch.tensor(self._cached, device=x.device).unbind(1)
            rows = first[:, None] + torch.arange(written.shape[2], device=x.device)
            cached = cache[sequences[:, None], rows].transpose(1, 2)  # (n, H, C, E)
            written[chunks] = written[chunks].where(self.writes.is_token[chunks], cached)
        return written


def _is_grid(q: Tensor, pairs: list[tuple[int, int]], seen: list[int], C: int) -> bool:
    """Return True for q (B, L, 1, K) on the CPU if :class:`ChunkViews` can hold its chunks.

    The sequences must fill q, have equal lengths, of complete chunks or of one shorter chunk, and start with a chunk.
    With more heads, products of strided chunks take as long as copies; on a GPU, launches for each part cost more.
    """
    if not q.is_cpu or q.shape[2] != 1:
        return False
    length = pairs[0][1] - pairs[0][0] if pairs else 0
    side_by_side = pairs == [(s * length, (s + 1) * length) for s in range(len(pairs))]
    fills = side_by_side and 0 < len(pairs) * length == q.shape[0] * q.shape[1]
    return fills and (length % C == 0 or length < C) and all(count % C == 0 for count in seen)
