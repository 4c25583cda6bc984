"""Floating-point operations of attention: two for each multiply-add of a pair of a query and a key that it sees."""

from collections.abc import Iterator

from torch import Tensor

from ..common.flops import lengths_of, readable_values

Pairs = Iterator[tuple[int, int]]
"""For each sequence: the number of pairs of a query and a key that it sees, and how many of them have a cached key"""


def attention_flops(q: Tensor, v: Tensor, pairs_of_sequences: Pairs) -> int:
    heads, K, V = q.shape[2], q.shape[3], v.shape[3]
    return sum(2 * pairs * heads * (K + V) for pairs, _ in pairs_of_sequences)


def attention_bwd_flops(q: Tensor, v: Tensor, pairs_of_sequences: Pairs) -> int:
    heads, K, V = q.shape[2], q.shape[3], v.shape[3]
    total = 0
    for pairs, cached_pairs in pairs_of_sequences:
        scores_dscores_and_dq = pairs * (2 * K + V)
        dk_and_dv = (pairs - cached_pairs) * (K + V)
        total += 2 * heads * (scores_dscores_and_dq + dk_and_dv)
    return total


def pairs_in_chunk(q: Tensor, position: Tensor | None, chunk_size: int, causal: bool, spans: Tensor | None) -> Pairs:
    """Count the pairs inside chunks."""

    def pairs_among_first(positions: int) -> int:
        chunks, rest = divmod(positions, chunk_size)
        if not causal:
            return chunks * chunk_size**2 + rest**2
        return (chunks * chunk_size * (chunk_size + 1) + rest * (rest + 1)) // 2

    counts = lengths_of(q, spans)
    for count, cached in zip(counts, readable_values(position, [0] * len(counts))):
        pairs = pairs_among_first(cached + count) - pairs_among_first(cached)
        yield pairs, cached * min(count, chunk_size - cached)


def pairs_in_two_chunks(q: Tensor, position: Tensor | None, C: int, spans: Tensor | None) -> Pairs:
    """Count the pairs inside chunks and those with the keys of the previous chunk.

    The cached keys are in the first two chunks; the queries start in the last chunk with a cached key, or after it.
    """
    pairs_in_own_chunk = pairs_in_chunk(q, position, C, causal=True, spans=spans)
    counts = lengths_of(q, spans)
    for count, cached, (pairs, _) in zip(counts, readable_values(position, [0] * len(counts)), pairs_in_own_chunk):
        end = cached + count
        pairs_with_previous_chunk = C * (max(end - C, 0) - max(cached - C, 0))
        queries_in_first_two = min(end, 2 * C) - cached  # see all cached keys
        queries_in_third = max(min(end, 3 * C) - 2 * C, 0)  # see those of the second chunk
        cached_pairs = cached * queries_in_first_two + max(cached - C, 0) * queries_in_third
        yield pairs + pairs_with_previous_chunk, cached_pairs
