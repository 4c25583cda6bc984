"""Operations of attention: two for each multiply-add of the pairs of a query and a key that the chunks allow."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ..common.flops import lengths_of, readable_values

Pairs = Iterator[tuple[int, int]]
"""for each sequence, the number of pairs and the number of pairs with a cached key"""


def attention_flops(q: Tensor, v: Tensor, pairs_of_sequences: Pairs) -> int:
    heads, K, V = q.shape[2], q.shape[3], v.shape[3]
    return sum(2 * pairs * heads * (K + V) for pairs, _ in pairs_of_sequences)


def attention_bwd_flops(q: Tensor, v: Tensor, pairs_of_sequences: Pairs) -> int:
    heads, K, V = q.shape[2], q.shape[3], v.shape[3]
    total = 0
    for pairs, cached in pairs_of_sequences:
        scores_dscores_and_dq, dk_and_dv = pairs * (2 * K + V), (pairs - cached) * (K + V)
        total += 2 * heads * (scores_dscores_and_dq + dk_and_dv)
    return total


def pairs_in_chunk(
    q: Tensor, position: Tensor | None, chunk_size: int, causal: bool, cu_seqlens: Tensor | None, lengths: Tensor | None
) -> Pairs:
    """Count the pairs inside chunks."""

    def until(end: int) -> int:
        chunks, rest = end // chunk_size, end % chunk_size
        if not causal:
            return chunks * chunk_size**2 + rest**2
        return (chunks * chunk_size * (chunk_size + 1) + rest * (rest + 1)) // 2

    counts = lengths_of(q, cu_seqlens, lengths)
    for count, first in zip(counts, readable_values(position, [0] * len(counts))):
        yield until(first + count) - until(first), first * min(count, chunk_size - first)


def pairs_in_two_chunks(
    q: Tensor, position: Tensor | None, C: int, cu_seqlens: Tensor | None, lengths: Tensor | None
) -> Pairs:
    """Count the pairs inside chunks and those with the keys of the previous chunk."""
    own = pairs_in_chunk(q, position, C, True, cu_seqlens, lengths)
    counts = lengths_of(q, cu_seqlens, lengths)
    for count, first, (pairs, _) in zip(counts, readable_values(position, [0] * len(counts)), own):
        end = first + count
        in_first_two, in_third = min(end, 2 * C) - first, max(min(end, 3 * C) - 2 * C, 0)
        cached = first * in_first_two + max(first - C, 0) * in_third
        yield pairs + C * (max(end - C, 0) - max(first - C, 0)), cached
