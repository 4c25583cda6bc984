"""Hypothesis strategies: calls of each op with awkward sizes and hard values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from cases import (
    Case,
    adaptive_working_memory_case,
    bidirectional_cema_case,
    cema_case,
    cema_end_state_case,
    chunked_attention_case,
    normalized_attention_case,
    normalized_qk_case,
    sequence_norm_case,
    timestep_norm_case,
    timestep_norm_end_state_case,
)
from hypothesis import strategies as st

SEEDS = st.integers(0, 2**32 - 1)
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
KINDS = ("dense", "padded", "packed")
CHANNELS = st.sampled_from([1, 2, 3, 5, 7, 8, 13, 16, 17, 31, 33, 64, 67])


def lengths_around(C: int) -> st.SearchStrategy[int]:
    """1, the neighbours of the first multiples of C, and primes."""
    around = {n for m in (C, 2 * C, 3 * C) for n in (m - 1, m, m + 1)}
    return st.sampled_from(sorted(around - {0} | {1, 2, 3, 7, 13, 29, 53}))


@st.composite
def sequences(draw: st.DrawFn, length: st.SearchStrategy[int], kinds: tuple[str, ...]) -> dict[str, Any]:
    """B, L and, for padded or packed batches, where the sequences lie; some may be empty, and tokens in no sequence."""
    kind = draw(st.sampled_from(kinds))
    L = draw(length)
    if kind == "packed":
        count = draw(st.integers(1, 4))
        return {"B": 1, "L": L, "cu_seqlens": sorted(draw(st.integers(0, L)) for _ in range(count + 1))}
    B = draw(st.integers(1, 3))
    return {"B": B, "L": L} | ({"lengths": [draw(st.integers(0, L)) for _ in range(B)]} if kind == "padded" else {})


@st.composite
def cema_sizes(draw: st.DrawFn, dtypes: st.SearchStrategy[torch.dtype], kinds: tuple[str, ...]) -> dict[str, Any]:
    """Poles anywhere in the disc, hard by the unit circle, and with a phase near 0."""
    N = draw(st.integers(1, 32))
    D = draw(CHANNELS if N <= 8 else st.sampled_from([1, 3, 5, 8, 13, 17]))  # many of both only take time
    radius = draw(st.sampled_from([(0.0, 0.2), (0.3, 0.99), (1 - 1e-3, 1 - 1e-5), (1 - 1e-5, 1 - 1e-5)]))
    angle = draw(st.sampled_from([(-3.2, 3.2), (0.0, 1e-4), (0.0, 0.0), (3.1, 3.2)]))
    return dict(
        **draw(sequences(lengths_around(32), kinds)), D=D, N=N, radius=radius, angle=angle,
        dtype=draw(dtypes), seed=draw(SEEDS),
    )  # fmt: skip


@st.composite
def cema_cases(
    draw: st.DrawFn, dtypes: st.SearchStrategy[torch.dtype] = DTYPES, kinds: tuple[str, ...] = KINDS
) -> Case:
    return cema_case(**draw(cema_sizes(dtypes, kinds)), state=draw(st.booleans()))


@st.composite
def cema_end_state_cases(
    draw: st.DrawFn, dtypes: st.SearchStrategy[torch.dtype] = DTYPES, kinds: tuple[str, ...] = KINDS
) -> Case:
    return cema_end_state_case(**draw(cema_sizes(dtypes, kinds)))


@st.composite
def timestep_norm_sizes(
    draw: st.DrawFn, dtypes: st.SearchStrategy[torch.dtype], kinds: tuple[str, ...]
) -> dict[str, Any]:
    """Means that dwarf the spread; groups of one channel."""
    dtype = draw(dtypes)
    values = [(0.0, 1.0), (3.0, 0.5), (0.0, 30.0)]
    if dtype == torch.float32:  # narrower types lose the spread; float64 has no better reference
        values += [(1e4, 1e-2), (-1e3, 1.0), (0.0, 1e-4)]
    mean, std = draw(st.sampled_from(values))
    return dict(
        **draw(sequences(lengths_around(32), kinds)), G=draw(st.sampled_from([1, 2, 3, 5, 8])),
        width=draw(st.sampled_from([1, 2, 3, 8, 16, 17, 33])), mean=mean, std=std, dtype=dtype, seed=draw(SEEDS),
    )  # fmt: skip


@st.composite
def timestep_norm_cases(
    draw: st.DrawFn, dtypes: st.SearchStrategy[torch.dtype] = DTYPES, kinds: tuple[str, ...] = KINDS
) -> Case:
    """Fresh and old states."""
    return timestep_norm_case(
        **draw(timestep_norm_sizes(dtypes, kinds)), count=draw(st.sampled_from([None, 0, 1, 1000, 10**6])),
        eps=draw(st.sampled_from([1e-5, 1e-3])),
    )  # fmt: skip


@st.composite
def timestep_norm_end_state_cases(
    draw: st.DrawFn, dtypes: st.SearchStrategy[torch.dtype] = DTYPES, kinds: tuple[str, ...] = KINDS
) -> Case:
    return timestep_norm_end_state_case(**draw(timestep_norm_sizes(dtypes, kinds)))


@st.composite
def sequence_norm_cases(
    draw: st.DrawFn, dtypes: st.SearchStrategy[torch.dtype] = DTYPES, kinds: tuple[str, ...] = KINDS
) -> Case:
    return sequence_norm_case(**draw(timestep_norm_sizes(dtypes, kinds)), eps=draw(st.sampled_from([1e-5, 1e-3])))


@st.composite
def bidirectional_cema_cases(
    draw: st.DrawFn, dtypes: st.SearchStrategy[torch.dtype] = DTYPES, kinds: tuple[str, ...] = KINDS
) -> Case:
    return bidirectional_cema_case(**draw(cema_sizes(dtypes, kinds)))


@st.composite
def normalized_qk_cases(
    draw: st.DrawFn, dtypes: st.SearchStrategy[torch.dtype] = DTYPES, kinds: tuple[str, ...] = KINDS
) -> Case:
    """z from far below eps to large; chunks shorter and longer than the sequence."""
    C = draw(st.sampled_from([1, 2, 5, 8, 16, 64, 2048]))
    return normalized_qk_case(
        **draw(sequences(lengths_around(min(C, 16)), kinds)), H=draw(st.integers(1, 4)),
        K=draw(st.sampled_from([2, 4, 6, 16, 18, 34, 64])), C=C, rope_base=draw(st.sampled_from([10.0, 1e4, 1e5])),
        size=draw(st.sampled_from([1e-3, 1.0, 100.0])), position=draw(st.booleans()),
        dtype=draw(dtypes), seed=draw(SEEDS),
    )  # fmt: skip


STARTS: tuple[dict[str, bool], ...] = ({}, {"state": True}, {"causal": False})


@st.composite
def chunked_attention_cases(
    draw: st.DrawFn, dtypes: st.SearchStrategy[torch.dtype] = DTYPES, kinds: tuple[str, ...] = KINDS
) -> Case:
    """Key and value sizes that differ; chunks of one row and of more rows than a block."""
    C, visible_chunks = draw(st.sampled_from([1, 2, 3, 8, 16, 17, 64, 67])), draw(st.sampled_from([1, 1, 2]))
    starts, dropkeys = (STARTS, [0.0, 0.25, 0.9]) if visible_chunks == 1 else (STARTS[:2], [0.0])
    return chunked_attention_case(
        **draw(sequences(lengths_around(C), kinds)), H=draw(st.integers(1, 3)), K=draw(CHANNELS), V=draw(CHANNELS), C=C,
        scale=draw(st.sampled_from([1.0, 0.125, -0.5])), dropkey=draw(st.sampled_from(dropkeys)),
        visible_chunks=visible_chunks, dtype=draw(dtypes), seed=draw(SEEDS), **draw(st.sampled_from(starts)),
    )  # fmt: skip


@st.composite
def normalized_attention_cases(
    draw: st.DrawFn, dtypes: st.SearchStrategy[torch.dtype] = DTYPES, kinds: tuple[str, ...] = KINDS
) -> Case:
    C = draw(st.sampled_from([1, 2, 5, 16, 33]))
    return normalized_attention_case(
        **draw(sequences(lengths_around(C), kinds)), H=draw(st.integers(1, 3)),
        K=draw(st.sampled_from([2, 4, 6, 16, 34])), V=draw(CHANNELS), C=C, dropkey=draw(st.sampled_from([0.0, 0.25])),
        dtype=draw(dtypes), seed=draw(SEEDS), **draw(st.sampled_from(STARTS)),
    )  # fmt: skip


@st.composite
def adaptive_working_memory_cases(
    draw: st.DrawFn, dtypes: st.SearchStrategy[torch.dtype] = DTYPES, kinds: tuple[str, ...] = KINDS
) -> Case:
    """Queries and keys that spread a softmax, and that make one of it."""
    C = draw(st.sampled_from([1, 2, 5, 16, 33]))
    return adaptive_working_memory_case(
        **draw(sequences(lengths_around(C), kinds)), H=draw(st.integers(1, 3)), K=draw(CHANNELS), V=draw(CHANNELS), C=C,
        size=draw(st.sampled_from([0.1, 1.0, 10.0])), visible_chunks=draw(st.sampled_from([1, 2])), dtype=draw(dtypes),
        seed=draw(SEEDS), state=draw(st.booleans()),
    )  # fmt: skip


POISONS = torch.nan, torch.inf, -torch.inf, 1e20, -1e4
"""Values of padding: a product with 0 does not take the first ones away, and the square of 1e20 is no float32"""


def with_poison(cases: Callable[..., st.SearchStrategy[Case]]) -> Callable[..., st.SearchStrategy[Case]]:
    return lambda *kinds, **named: st.builds(
        lambda case, poison: replace(case, poison=poison), cases(*kinds, **named), st.sampled_from(POISONS)
    )


CASES = {
    "cema": with_poison(cema_cases),
    "timestep_norm": with_poison(timestep_norm_cases),
    "cema_end_state": with_poison(cema_end_state_cases),
    "timestep_norm_end_state": with_poison(timestep_norm_end_state_cases),
    "normalized_qk": with_poison(normalized_qk_cases),
    "chunked_attention": with_poison(chunked_attention_cases),
    "normalized_attention": with_poison(normalized_attention_cases),
    "adaptive_working_memory": with_poison(adaptive_working_memory_cases),
    "sequence_norm": with_poison(sequence_norm_cases),
    "bidirectional_cema": with_poison(bidirectional_cema_cases),
}


@st.composite
def pieces(draw: st.DrawFn, length: int) -> list[int]:
    """Lengths that add up to `length`; some may be 0."""
    cuts = sorted(draw(st.lists(st.integers(0, length), max_size=4)))
    return [b - a for a, b in zip([0, *cuts], [*cuts, length], strict=True)]
