"""How whole sequences lie over the pieces of ranks, and what a rank needs to know of it. All is integers, without tensors."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from ..ops.values import shown


@dataclass(frozen=True)
class Pieces:
    """A rank's piece of the sequences of a batch, and of which pieces before it its states are made.

    A dense or padded batch exchanges the states of all rows; a packed one that of the sequence which a cut divides.
    """

    rank: int
    ends: tuple[int, ...]
    """(P,) the column after each rank's piece"""
    spans: tuple[tuple[int, int], ...]
    """(S,) columns [begin, end) of each whole sequence"""
    sources: tuple[int, ...]
    """ranks before this one that hold steps of the sequences open at the beginning of its piece"""
    steps: tuple[int, ...]
    """how many steps each of these holds"""
    tail: tuple[int, int] | None = None
    """packed: the piece's columns in the sequence that is open at its end; None: the batch is not packed"""
    first: int = 0
    """packed: the first sequence with tokens in the piece"""
    count: int = 0
    """packed: how many sequences, from that one on, the piece holds"""
    continues: bool = False
    """packed: whether the first of these began in a piece before"""
    cu_seqlens: tuple[int, ...] | None = None
    """packed: the offsets of the piece's sequences in the piece"""
    lengths: tuple[int, ...] | None = None
    """padded: how much of the piece each row fills"""
    owners: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """by rank: the sequences whose last step the rank holds"""

    @property
    def start(self) -> int:
        """The column at which the piece begins."""
        return self.ends[self.rank - 1] if self.rank else 0

    @property
    def is_packed(self) -> bool:
        return self.tail is not None

    def local(self, sequence: int) -> int:
        """The number of a sequence among those of the piece."""
        return sequence - self.first if self.is_packed else sequence

    def begin_here(self) -> bool:
        """Whether a sequence begins in this piece, and so from the state that is given."""
        return self.count > int(self.continues) if self.is_packed else self.start == 0


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

    Example:
        >>> from megalodon_ops.distributed.pieces import pieces_of
        >>> pieces_of(1, [8, 8], rows=1, chunk_size=4, cu_seqlens=[0, 3, 4, 16]).sources
        (0,)
    """
    ends = tuple(accumulate(piece_lengths))
    total, begin, end = ends[-1], ends[rank] - piece_lengths[rank], ends[rank]
    spans = _spans(rows, total, cu_seqlens, lengths)
    _check_cuts(ends, spans, chunk_size, positions or [0] * len(spans), packed=cu_seqlens is not None)
    owners: dict[int, tuple[int, ...]] = {}
    for s, (first, last) in enumerate(spans):
        if first < last:
            owner = bisect_left(ends, last)
            owners[owner] = (*owners.get(owner, ()), s)
    common = dict(rank=rank, ends=ends, spans=spans, owners=owners)
    if cu_seqlens is None:
        sources = tuple(r for r in range(rank) if piece_lengths[r])
        inside = None if lengths is None else tuple(min(max(n - begin, 0), end - begin) for n in lengths)
        return Pieces(sources=sources, steps=tuple(piece_lengths[r] for r in sources), lengths=inside, **common)
    with_tokens = [s for s in _between(cu_seqlens, begin, end) if spans[s][0] < spans[s][1]] if begin < end else []
    if not with_tokens:
        return Pieces(sources=(), steps=(), tail=(0, 0), cu_seqlens=(0,), **common)
    first, last = with_tokens[0], with_tokens[-1]
    bounds = tuple(min(max(offset, begin), end) - begin for offset in cu_seqlens[first : last + 2])
    from_column, to_column = spans[first][0], spans[last][1]
    continues = from_column < begin
    sources = tuple(r for r in range(rank) if continues and ends[r] > from_column and piece_lengths[r])
    steps = tuple(ends[r] - max(from_column, ends[r] - piece_lengths[r]) for r in sources)
    tail = (max(spans[last][0], begin) - begin, end - begin) if to_column > end else (end - begin, end - begin)
    return Pieces(
        sources=sources, steps=steps, tail=tail, first=first, count=last + 1 - first, continues=continues,
        cu_seqlens=bounds, **common,
    )  # fmt: skip


def _between(cu_seqlens: Sequence[int], begin: int, end: int) -> range:
    """The sequences that may have columns in [begin, end)."""
    first = max(bisect_right(cu_seqlens, begin) - 1, 0)
    return range(first, min(bisect_left(cu_seqlens, end), len(cu_seqlens) - 1))


def _spans(
    rows: int, total: int, cu_seqlens: Sequence[int] | None, lengths: Sequence[int] | None
) -> tuple[tuple[int, int], ...]:
    if cu_seqlens is not None and lengths is not None:
        raise ValueError("Megalodon: `lengths` must be None beside `cu_seqlens`, got both.")
    if cu_seqlens is not None:
        ordered = all(a <= b for a, b in zip(cu_seqlens, cu_seqlens[1:]))
        if rows != 1 or not cu_seqlens or not ordered or cu_seqlens[0] < 0 or cu_seqlens[-1] > total:
            raise ValueError(
                f"Megalodon: `cu_seqlens` must be ascending offsets of one row, in [0, {total}] for the pieces of all "
                f"ranks together, got {_listed(cu_seqlens)} for {rows} rows."
            )
        return tuple(zip(cu_seqlens, cu_seqlens[1:]))
    if lengths is None:
        return ((0, total),) * rows
    if len(lengths) != rows or any(not 0 <= length <= total for length in lengths):
        raise ValueError(
            f"Megalodon: `lengths` must be {rows} lengths in [0, {total}], the columns of all ranks' pieces together, "
            f"got {_listed(lengths)}."
        )
    return tuple((0, length) for length in lengths)


def _check_cuts(
    ends: Sequence[int], spans: Sequence[tuple[int, int]], chunk_size: int, positions: Sequence[int], *, packed: bool
) -> None:
    starts = [begin for begin, _ in spans]
    for cut, rank in ((end, rank) for rank, end in enumerate(ends[:-1])):
        divided = range(bisect_left(starts, cut)) if not packed else _last_before(starts, cut)
        for s in divided:
            begin, end = spans[s]
            if begin < cut < end and (filled := (positions[s] + cut - begin) % chunk_size):
                whose = f"of sequence {s}" if packed else f"of row {s}"
                raise ValueError(
                    f"Megalodon: `tokens` must end at a chunk boundary on every rank but the last, got a piece of rank {rank} "
                    f"of its group that ends {filled} tokens into a chunk of {chunk_size} {whose}; "
                    f"split(tokens, mesh, chunk_size={chunk_size}) makes pieces of whole chunks."
                )


def _last_before(starts: Sequence[int], cut: int) -> range:
    last = bisect_left(starts, cut) - 1
    return range(max(last, 0), last + 1)


def _listed(values: Sequence[int]) -> str:
    return str(list(values)) if len(values) <= 8 else shown(list(values))
