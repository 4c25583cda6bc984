"""Calls of bidirectional_cema."""

from dataclasses import replace
from typing import Any

import torch
from case import Case, Op, call_without_state
from drawing import DTYPES, KINDS
from hypothesis import strategies as st

from cema.cema_case import cema_case, cema_sizes


def bidirectional_cema_case(**sizes: Any) -> Case:
    """Inputs of `cema_case`, with coefficients of both directions."""
    case = cema_case(**sizes)
    other = cema_case(**sizes | {"seed": sizes.get("seed", 0) + 1})
    both = {name: torch.cat([case.tensors[name], other.tensors[name]]) for name in ("p", "q", "gamma")}
    # domega sums products of x and dy of size 1, which may cancel
    return replace(case.with_tensors(**both), op="bidirectional_cema", terms=1.0)


@st.composite
def bidirectional_cema_cases(
    draw: st.DrawFn, dtypes: st.SearchStrategy[torch.dtype] = DTYPES, kinds: tuple[str, ...] = KINDS
) -> Case:
    return bidirectional_cema_case(**draw(cema_sizes(dtypes, kinds)))


OP = Op(
    "bidirectional_cema",
    bidirectional_cema_case,
    bidirectional_cema_cases,
    tokens=("x",),
    parameters=("p", "q", "gamma", "omega"),
    call=call_without_state,
    without_elements=({"D": 0},),
    whole=True,
)
