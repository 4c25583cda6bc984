"""Hypothesis strategies: calls of each op with awkward sizes and hard values."""

from collections.abc import Callable
from dataclasses import replace

import torch
from cases import OPS, Case
from hypothesis import strategies as st

POISONS = torch.nan, torch.inf, -torch.inf, 1e20, -1e4
"""Values of padding: NaN and infinities survive a product with 0; the square of 1e20 overflows float32"""


def with_poison(cases: Callable[..., st.SearchStrategy[Case]]) -> Callable[..., st.SearchStrategy[Case]]:
    """A function like `cases` whose cases have one of POISONS in their padding."""
    return lambda *kinds, **named: st.builds(
        lambda case, poison: replace(case, poison=poison), cases(*kinds, **named), st.sampled_from(POISONS)
    )


CASES = {name: with_poison(op.cases) for name, op in OPS.items()}


@st.composite
def pieces(draw: st.DrawFn, length: int) -> list[int]:
    """Lengths that add up to `length`; some may be 0."""
    cuts = sorted(draw(st.lists(st.integers(0, length), max_size=4)))
    return [b - a for a, b in zip([0, *cuts], [*cuts, length], strict=True)]
