"""Where a packed row is cut for the ranks that share its sequences."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence


def cuts(cu_seqlens: Sequence[int], positions: Sequence[int] | None, chunk_size: int, parts: int) -> list[int]:
    """(parts + 1,) columns at which the pieces of a packed row begin and end, as equal as chunks let them be.

    A cut lies between two sequences, or between two chunks of one. Where every part has room for a chunk, or sequences end
    at equal cuts, no piece is empty.

    Args:
        cu_seqlens: (S + 1,) offsets of the sequences.
        positions: (S,) how much of a chunk each sequence has filled before; None: nothing.

    Example:
        >>> from megalodon_ops.distributed.cuts import cuts
        >>> cuts([0, 5, 40], positions=[0, 3], chunk_size=8, parts=3)
        [0, 10, 26, 40]
    """
    begin, end = cu_seqlens[0], cu_seqlens[-1]
    found = [begin]
    for part in range(1, parts):
        wanted = begin + part * (end - begin) / parts
        sequence = min(bisect_right(cu_seqlens, wanted), len(cu_seqlens) - 1) - 1
        first, last = cu_seqlens[sequence], cu_seqlens[sequence + 1]
        chunk = first - (0 if positions is None else positions[sequence])  # where the unfinished chunk would begin
        before = chunk + int(wanted - chunk) // chunk_size * chunk_size
        places = [first, last, *(place for place in (before, before + chunk_size) if first < place < last)]
        found.append(max(found[-1], min(places, key=lambda place: abs(place - wanted))))
    return [*found, end]
