"""Positions of whole sequences in the ranks' pieces, as integers."""

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise, product


@dataclass(frozen=True)
class Pieces:
    """A rank's piece of the sequences of a batch, and the earlier ranks on which its initial states depend.

    Ranks exchange the states of all rows, but in a packed batch only that of the sequence that two pieces share.
    """

    begin: int  # first column of the piece
    spans: tuple[tuple[int, int], ...]  # (S,) columns [begin, end) of each whole sequence
    ending_sequences: tuple[int, ...]  # sequences whose last position is in the piece
    sources: tuple[int, ...]  # earlier ranks with positions of the sequences that are open where the piece begins
    source_lengths: tuple[int, ...]  # number of these positions on each source
    previous_rank: int | None = None  # nearest ranks with columns; None if there is none or this rank has none
    next_rank: int | None = None
    lengths: tuple[int, ...] | None = None  # padded batch: number of positions of each row in the piece
    # Packed batch:
    tail: tuple[int, int] | None = None  # the piece's columns in the sequence that is open at its end
    first_sequence: int = 0  # first sequence with tokens in the piece
    num_sequences: int = 0  # number of sequences with tokens in the piece
    is_continuation: bool = False  # the first sequence began in an earlier piece
    own_spans: tuple[tuple[int, int], ...] | None = None  # columns of the piece's sequences in the piece

    @property
    def is_packed(self) -> bool:
        return self.tail is not None

    def has_new_sequence(self) -> bool:
        """Return True if a sequence begins in this piece; its initial state is the caller's."""
        return self.num_sequences > int(self.is_continuation) if self.is_packed else self.begin == 0

    def open_sequence_is_new(self) -> bool:
        """Return True if the sequences that are open at the piece's end began in the piece."""
        return not self.sources or self.num_sequences > 1


def pieces_of(
    rank: int,
    piece_lengths: Sequence[int],
    *,
    rows: int,
    chunk_size: int,
    cu_seqlens: Sequence[int] | None = None,
    lengths: Sequence[int] | None = None,
    spans: Sequence[tuple[int, int]] | None = None,
    positions: Sequence[int] | None = None,
) -> Pieces:
    """Return the piece of `rank`.

    Args:
        piece_lengths: (P,) columns of each rank's piece.
        rows: B.
        cu_seqlens, lengths, spans: those of the whole sequences; spans only in one row.
        positions: (S,) number of tokens that each sequence's unfinished chunk has before the batch; None: 0.

    Raises:
        ValueError: offsets or lengths do not fit, or a piece ends inside a chunk.
    """
    ends = tuple(accumulate(piece_lengths))
    end = ends[rank]
    begin = end - piece_lengths[rank]
    is_packed = cu_seqlens is not None or spans is not None
    spans = _spans(rows, ends[-1], cu_seqlens, lengths, spans)
    _check_cuts(ends, spans, chunk_size, positions or [0] * len(spans))
    ending = tuple(s for s, (start, stop) in enumerate(spans) if start < stop and begin < stop <= end)
    common = dict(begin=begin, spans=spans, ending_sequences=ending)
    if piece_lengths[rank]:
        common["previous_rank"] = max((r for r in range(rank) if piece_lengths[r]), default=None)
        common["next_rank"] = min((r for r in range(rank + 1, len(ends)) if piece_lengths[r]), default=None)
    if not is_packed:
        sources = tuple(r for r in range(rank) if piece_lengths[r])
        own_lengths = None if lengths is None else tuple(min(max(n - begin, 0), end - begin) for n in lengths)
        source_lengths = tuple(piece_lengths[r] for r in sources)
        return Pieces(sources=sources, source_lengths=source_lengths, lengths=own_lengths, **common)
    sequences = [s for s, (start, stop) in enumerate(spans) if max(start, begin) < min(stop, end)]
    if not sequences:
        return Pieces(sources=(), source_lengths=(), tail=(0, 0), own_spans=(), **common)
    first, last = sequences[0], sequences[-1]
    own = tuple((max(start, begin) - begin, min(stop, end) - begin) for start, stop in spans[first : last + 1])
    from_column, to_column = spans[first][0], spans[last][1]
    is_continuation = from_column < begin
    sources = tuple(r for r in range(rank) if is_continuation and ends[r] > from_column and piece_lengths[r])
    source_lengths = tuple(ends[r] - max(from_column, ends[r] - piece_lengths[r]) for r in sources)
    tail = (max(spans[last][0], begin) - begin if to_column > end else end - begin, end - begin)
    packed = dict(tail=tail, first_sequence=first, num_sequences=last + 1 - first, own_spans=own)
    common |= dict(sources=sources, source_lengths=source_lengths, is_continuation=is_continuation)
    return Pieces(**packed, **common)


def _spans(
    rows: int,
    total: int,
    cu_seqlens: Sequence[int] | None,
    lengths: Sequence[int] | None,
    spans: Sequence[tuple[int, int]] | None,
) -> tuple[tuple[int, int], ...]:
    """Return the columns [begin, end) of each sequence."""
    if lengths is None and (spans is not None or cu_seqlens is not None):
        name, expected, given = "spans", f"in order, disjoint and in one row of {total} positions", spans
        if cu_seqlens is not None:
            name, expected, given = "cu_seqlens", f"ascending offsets of one row, in [0, {total}]", cu_seqlens
            spans = [*pairwise(cu_seqlens)]
        bounds = [0, *chain.from_iterable(spans), total]
        if rows != 1 or bounds != sorted(bounds):
            raise ValueError(
                f"Megalodon: `{name}` must be {expected} where ranks hold pieces of sequences, got "
                f"{reprlib.repr([*given])} for {rows} rows."
            )
        return tuple(map(tuple, spans))
    lengths = [total] * rows if lengths is None else lengths
    if len(lengths) != rows or any(not 0 <= length <= total for length in lengths):
        raise ValueError(
            f"Megalodon: `lengths` must be {rows} lengths in [0, {total}], the columns of all ranks' pieces together, "
            f"got {reprlib.repr(list(lengths))}."
        )
    return tuple((0, length) for length in lengths)


def _check_cuts(
    ends: Sequence[int], spans: Sequence[tuple[int, int]], chunk_size: int, positions: Sequence[int]
) -> None:
    """Raise a ValueError if a piece ends inside a chunk of a sequence."""
    for (rank, cut), (s, (begin, end)) in product(enumerate(ends[:-1]), enumerate(spans)):
        filled = (positions[s] + cut - begin) % chunk_size  # tokens in the chunk that the cut divides
        if begin < cut < end and filled:
            raise ValueError(
                f"Megalodon: `tokens` must end at a chunk boundary on every rank but the last, got a piece of rank "
                f"{rank} of its group that ends {filled} tokens into a chunk of {chunk_size} of sequence {s}; "
                f"split(tokens, mesh, chunk_size={chunk_size}) makes pieces of whole chunks."
            )
