"""Hypothesis strategies of sizes and sequences, for the strategies of cases."""

from typing import Any

import torch
from hypothesis import strategies as st

SEEDS = st.integers(0, 2**32 - 1)
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
KINDS = ("dense", "padded", "packed", "left-padded", "spans")
CHANNELS = st.sampled_from([1, 2, 3, 5, 7, 8, 13, 16, 17, 31, 33, 64, 67])


def lengths_around(C: int) -> st.SearchStrategy[int]:
    """Multiples of C and their neighbours; 1 and primes."""
    around = {n for m in (C, 2 * C, 3 * C) for n in (m - 1, m, m + 1)}
    return st.sampled_from(sorted(around - {0} | {1, 2, 3, 7, 13, 29, 53}))


@st.composite
def sequences(draw: st.DrawFn, length: st.SearchStrategy[int], kinds: tuple[str, ...]) -> dict[str, Any]:
    """B, L and the sequences of a batch; some sequences are empty, packed rows have padding."""
    kind = draw(st.sampled_from(kinds))
    L = draw(length)
    if kind == "packed":
        count = draw(st.integers(1, 4))
        return {"B": 1, "L": L, "cu_seqlens": sorted(draw(st.integers(0, L)) for _ in range(count + 1))}
    B = draw(st.integers(1, 3))
    if kind == "spans":
        return {"B": B, "L": L, "spans": draw(spans(B, L))}
    starts = [draw(st.integers(0, L)) for _ in range(B)] if kind == "left-padded" else [0] * B
    rows = {"starts": starts} if kind == "left-padded" else {}
    if kind == "padded" or rows and draw(st.booleans()):
        rows["lengths"] = [draw(st.integers(0, L - start)) for start in starts]
    return {"B": B, "L": L} | rows


@st.composite
def spans(draw: st.DrawFn, B: int, L: int) -> list[tuple[int, int]]:
    """Up to four spans in each row, in order and disjoint; some are empty."""
    found: list[tuple[int, int]] = []
    for row in range(B):
        bounds = sorted(row * L + draw(st.integers(0, L)) for _ in range(2 * draw(st.integers(0, 4))))
        found += zip(bounds[::2], bounds[1::2], strict=True)
    return found
