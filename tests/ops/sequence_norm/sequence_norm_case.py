"""Calls of sequence_norm."""

from dataclasses import replace
from typing import Any

import torch
from case import Case, Op, call_without_state
from drawing import DTYPES, KINDS
from hypothesis import strategies as st

from timestep_norm.timestep_norm_case import timestep_norm_case, timestep_norm_sizes


def sequence_norm_case(**sizes: Any) -> Case:
    """Inputs of `timestep_norm_case`."""
    return replace(timestep_norm_case(**sizes), op="sequence_norm")


@st.composite
def sequence_norm_cases(
    draw: st.DrawFn, dtypes: st.SearchStrategy[torch.dtype] = DTYPES, kinds: tuple[str, ...] = KINDS
) -> Case:
    return sequence_norm_case(**draw(timestep_norm_sizes(dtypes, kinds)), eps=draw(st.sampled_from([1e-5, 1e-3])))


OP = Op(
    "sequence_norm",
    sequence_norm_case,
    sequence_norm_cases,
    tokens=("x",),
    parameters=("weight", "bias"),
    call=call_without_state,
    without_elements=({"width": 0},),
    whole=True,
)
