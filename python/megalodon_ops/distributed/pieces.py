"""How whole sequences lie over the pieces of ranks, and what a rank needs to know of it, in integers."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise, product


@dataclass(frozen=True)
class Pieces:
    """A rank's piece of the sequences of a batch, and of which pieces before it its states are made.

    A dense or padded batch exchanges the states of all rows; a packed one that of the sequence which a cut divides.
    """

    begin: int  # the column at which the piece begins
    spans: tuple[tuple[int, int], ...]  # (S,) columns [begin, end) of each whole sequence
    end_here: tuple[int, ...]  # the sequences whose last step the piece holds
    sources: tuple[int, ...]  # earlier ranks with positions of the sequences that are open where the piece begins
    steps: tuple[int, ...]  # how many steps each of these holds
    before: int | None = None  # if the piece has columns: the nearest ranks before and after this one that have some
    after: int | None = None
    lengths: tuple[int, ...] | None = None  # padded: how much of the piece each row fills
    # Of a packed batch:
    tail: tuple[int, int] | None = None  # the piece's columns in the sequence that is open at its end
    first: int = 0  # the first sequence with tokens in the piece
    count: int = 0  # how many sequences, from that one on, the piece holds
    continues: bool = False  # whether the first of these began in a piece before
    cu_seqlens: tuple[int, ...] | None = None  # the offsets of the piece's sequences in the piece

    @property
    def is_packed(self) -> bool:
        return self.tail is not None

    def begin_here(self) -> bool:
        """Whether a sequence begins in this piece, and so from the state that is given."""
        return self.count > int(self.continues) if self.is_packed else self.begin == 0

    def open_begins_here(self) -> bool:
        """Whether the sequences that are open where the piece ends began in it, and not before."""
        return not self.sources or self.count > 1


def pieces_of(
    rank: int,
    piece_lengths: Sequence[int],
    *,
    rows: int,
    chunk_size: int,
    cu_seqlens: Sequence[int] | None = None,
    lengths: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
) -> Pieces:
    """What `rank` needs to know of its piece.

    Args:
        piece_lengths: (P,) columns of each rank's piece.
        rows: B.
        cu_seqlens, lengths: of the whole sequences, in a packed or a padded batch.
        positions: (S,) how much of its unfinished chunk each sequence has filled before the batch; None: nothing.

    Raises:
        ValueError: offsets or lengths do not fit, or a piece ends inside of a chunk.
    """
    ends = tuple(accumulate(piece_lengths))
    begin, end = ends[rank] - piece_lengths[rank], ends[rank]
    spans = _spans(rows, ends[-1], cu_seqlens, lengths)
    _check_cuts(ends, spans, chunk_size, positions or [0] * len(spans))
    end_here = tuple(s for s, (first, last) in enumerate(spans) if first < last and begin < last <= end)
    common = dict(begin=begin, spans=spans, end_here=end_here)
    if piece_lengths[rank]:
        common["before"] = max((r for r in range(rank) if piece_lengths[r]), default=None)
        common["after"] = min((r for r in range(rank + 1, len(ends)) if piece_lengths[r]), default=None)
    if cu_seqlens is None:
        sources = tuple(r for r in range(rank) if piece_lengths[r])
        inside = None if lengths is None else tuple(min(max(n - begin, 0), end - begin) for n in lengths)
        return Pieces(sources=sources, steps=tuple(piece_lengths[r] for r in sources), lengths=inside, **common)
    with_tokens = [s for s, (first, last) in enumerate(spans) if max(first, begin) < min(last, end)]
    if not with_tokens:
        return Pieces(sources=(), steps=(), tail=(0, 0), cu_seqlens=(0,), **common)
    first, last = with_tokens[0], with_tokens[-1]
    bounds = tuple(min(max(offset, begin), end) - begin for offset in cu_seqlens[first : last + 2])
    from_column, to_column = spans[first][0], spans[last][1]
    continues = from_column < begin
    sources = tuple(r for r in range(rank) if continues and ends[r] > from_column and piece_lengths[r])
    steps = tuple(ends[r] - max(from_column, ends[r] - piece_lengths[r]) for r in sources)
    tail = (max(spans[last][0], begin) - begin if to_column > end else end - begin, end - begin)
    packed = dict(tail=tail, first=first, count=last + 1 - first, continues=continues, cu_seqlens=bounds)
    return Pieces(sources=sources, steps=steps, **packed, **common)


def _spans(
    rows: int, total: int, cu_seqlens: Sequence[int] | None, lengths: Sequence[int] | None
) -> tuple[tuple[int, int], ...]:
    """The columns of each sequence."""
    if cu_seqlens is not None and lengths is not None:
        raise ValueError("Megalodon: `lengths` must be None beside `cu_seqlens`, got both.")
    if cu_seqlens is not None:
        spans = tuple(pairwise(cu_seqlens))
        ordered = all(begin <= end for begin, end in spans)
        if rows != 1 or not cu_seqlens or not ordered or cu_seqlens[0] < 0 or cu_seqlens[-1] > total:
            raise ValueError(
                f"Megalodon: `cu_seqlens` must be ascending offsets of one row, in [0, {total}] for the pieces of all "
                f"ranks together, got {reprlib.repr(list(cu_seqlens))} for {rows} rows."
            )
        return spans
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
    """Raises where a piece ends inside of a chunk of a sequence."""
    for (rank, cut), (s, (begin, end)) in product(enumerate(ends[:-1]), enumerate(spans)):
        if begin < cut < end and (filled := (positions[s] + cut - begin) % chunk_size):
            raise ValueError(
                f"Megalodon: `tokens` must end at a chunk boundary on every rank but the last, got a piece of rank "
                f"{rank} of its group that ends {filled} tokens into a chunk of {chunk_size} of sequence {s}; "
                f"split(tokens, mesh, chunk_size={chunk_size}) makes pieces of whole chunks."
            )
