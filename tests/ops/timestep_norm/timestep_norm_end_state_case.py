"""Calls of timestep_norm_end_state."""

from typing import Any

import torch
from case import Case, CudaSizes, Op, Tensors
from drawing import DTYPES, KINDS
from hypothesis import strategies as st

from timestep_norm.timestep_norm_case import timestep_norm_case, timestep_norm_sizes


def timestep_norm_end_state_case(**sizes: Any) -> Case:
    """Inputs of `timestep_norm_case` without weight, bias and eps."""
    case = timestep_norm_case(**sizes)
    options = {name: value for name, value in case.options.items() if name != "eps"}
    return Case("timestep_norm_end_state", {"x": case.tensors["x"]}, options, case.dtype, mean_terms=case.mean_terms)


@st.composite
def timestep_norm_end_state_cases(
    draw: st.DrawFn, dtypes: st.SearchStrategy[torch.dtype] = DTYPES, kinds: tuple[str, ...] = KINDS
) -> Case:
    return timestep_norm_end_state_case(**draw(timestep_norm_sizes(dtypes, kinds)))


def call(function, inputs: list, tensors: Tensors, options: dict[str, Any]) -> Tensors:
    state = function(*inputs, **options)
    return {"mean": state.mean, "var": state.var, "count": state.count}


def gradients(backward, case: Case, inputs: list, incoming: Tensors) -> Tensors:
    return {"dx": backward(incoming.get("mean"), incoming.get("var"), *inputs, **case.options)}


OP = Op(
    "timestep_norm_end_state",
    timestep_norm_end_state_case,
    timestep_norm_end_state_cases,
    tokens=("x",),
    parameters=(),
    outputs=(),
    call=call,
    gradients=gradients,
    without_elements=({"width": 0},),
    threads={
        "one": dict(B=1, L=3001, G=3, width=13),
        "packed": dict(B=1, L=1501, G=2, width=33, cu_seqlens=[1, 400, 400, 1499]),
    },
    cuda=CudaSizes(
        aligned=(dict(B=1, L=66, G=1, width=16),),
        sanitized=(
            *(dict(G=G, width=width) for G, width in ((1, 1), (3, 4), (2, 32), (1, 257))),
            dict(L=150, G=2, width=8),
            dict(B=1, L=23, cu_seqlens=[0, 9, 9, 20]),
        ),
        smallest=dict(G=1, width=2),
        odd=dict(G=3, width=8),
    ),
)
