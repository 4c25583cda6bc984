"""Calls of cema_end_state."""

from dataclasses import replace
from typing import Any

import torch
from case import Case, CudaSizes, Op, Tensors
from drawing import DTYPES, KINDS
from hypothesis import strategies as st

from cema.cema_case import cema_case, cema_sizes


def cema_end_state_case(**sizes: Any) -> Case:
    """Inputs of `cema_case` without gamma, omega and a state."""
    case = cema_case(**sizes)
    return replace(case, op="cema_end_state", tensors={name: case.tensors[name] for name in ("x", "p", "q")})


@st.composite
def cema_end_state_cases(
    draw: st.DrawFn, dtypes: st.SearchStrategy[torch.dtype] = DTYPES, kinds: tuple[str, ...] = KINDS
) -> Case:
    return cema_end_state_case(**draw(cema_sizes(dtypes, kinds)))


def call(function, inputs: list, tensors: Tensors, options: dict[str, Any]) -> Tensors:
    return {"state": function(*inputs, **options)}


def gradients(backward, case: Case, inputs: list, incoming: Tensors) -> Tensors:
    return dict(zip(("dx", "dp", "dq"), backward(incoming["state"], *inputs, **case.options), strict=True))


OP = Op(
    "cema_end_state",
    cema_end_state_case,
    cema_end_state_cases,
    tokens=("x",),
    parameters=("p", "q"),
    outputs=(),
    call=call,
    gradients=gradients,
    without_elements=({"D": 0},),
    threads={
        "pieces": dict(B=1, L=2503, D=13, N=5),
        "strips": dict(B=1, L=301, D=211, N=7),
        "groups": dict(B=1, L=1200, D=9, N=4, cu_seqlens=[3, 5, 5, 290, 1100, 1191]),
    },
    cuda=CudaSizes(
        aligned=(dict(B=1, L=34, D=4, N=4),),
        sanitized=(
            *(dict(D=D, N=N) for D, N in ((5, 1), (8, 4), (33, 16), (16, 21))),
            dict(D=8, N=8, L=150),
            dict(B=1, L=23, cu_seqlens=[0, 9, 9, 20]),
        ),
        smallest=dict(D=2, N=1),
        odd=dict(D=6, N=5),
    ),
)
