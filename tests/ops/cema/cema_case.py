"""Calls of cema."""

from typing import Any

import torch
from case import F32, Case, CudaSizes, Op, count_sequences, generator, randn, real_dtype, sequence_options, uniform
from drawing import CHANNELS, DTYPES, KINDS, SEEDS, lengths_around, sequences
from hypothesis import strategies as st


def cema_case(
    B=2, L=9, D=5, N=4, *, dtype=F32, seed=0, radius=(0.5, 0.99), angle=(-3.0, 3.0), state=False, **rows
) -> Case:
    """Poles q with modulus in `radius` and phase in `angle`."""
    gen, real = generator(seed), real_dtype(dtype)
    complex_ = torch.complex128 if real == torch.float64 else torch.complex64
    tensors = {
        "x": randn(gen, B, L, D, dtype=dtype),
        "p": uniform(gen, 0.1, 0.9, D, N).to(real),
        "q": torch.polar(uniform(gen, *radius, D, N), uniform(gen, *angle, D, N)).to(complex_),
        "gamma": (randn(gen, D, N, dtype=torch.complex128) / N**0.5).to(complex_),
        "omega": randn(gen, D, dtype=real),
    }
    options = sequence_options(**rows)
    if state:
        tensors["state"] = randn(gen, count_sequences(B, **rows), D, N, dtype=complex_)
    return Case("cema", tensors, options, dtype)


@st.composite
def cema_sizes(draw: st.DrawFn, dtypes: st.SearchStrategy[torch.dtype], kinds: tuple[str, ...]) -> dict[str, Any]:
    """Poles in the unit disc, close to its edge, and with a phase near 0."""
    N = draw(st.integers(1, 32))
    D = draw(CHANNELS if N <= 8 else st.sampled_from([1, 3, 5, 8, 13, 17]))  # to limit the time
    radius = draw(st.sampled_from([(0.0, 0.2), (0.3, 0.99), (1 - 1e-3, 1 - 1e-5), (1 - 1e-5, 1 - 1e-5)]))
    angle = draw(st.sampled_from([(-3.2, 3.2), (0.0, 1e-4), (0.0, 0.0), (3.1, 3.2)]))
    rows = draw(sequences(lengths_around(32), kinds))
    return dict(**rows, D=D, N=N, radius=radius, angle=angle, dtype=draw(dtypes), seed=draw(SEEDS))


@st.composite
def cema_cases(
    draw: st.DrawFn, dtypes: st.SearchStrategy[torch.dtype] = DTYPES, kinds: tuple[str, ...] = KINDS
) -> Case:
    return cema_case(**draw(cema_sizes(dtypes, kinds)), state=draw(st.booleans()))


OP = Op(
    "cema",
    cema_case,
    cema_cases,
    tokens=("x",),
    parameters=("p", "q", "gamma", "omega"),
    with_state={"state": True},
    without_elements=({"D": 0},),
    threads={
        "pieces": dict(B=1, L=2503, D=13, N=5),
        "pieces-state": dict(B=1, L=1907, D=5, N=3, state=True),
        "strips": dict(B=1, L=301, D=211, N=7),
        "groups": dict(B=1, L=1200, D=9, N=4, cu_seqlens=[3, 5, 5, 290, 1100, 1191], state=True),
        "few-tokens": dict(B=37, L=3, D=67, N=6, state=True),
    },
    cuda=CudaSizes(
        aligned=(dict(B=1, L=66, D=4, N=4, state=True), dict(B=2, L=2, D=4, N=4, state=True)),
        sanitized=(
            *(dict(D=D, N=N, state=True) for D, N in ((5, 1), (8, 4), (33, 16), (16, 21))),
            dict(D=8, N=8, L=150),
            dict(B=1, L=23, cu_seqlens=[0, 9, 9, 20], state=True),
            dict(lengths=[9, 4]),
        ),
        smallest=dict(D=2, N=1),
        odd=dict(D=6, N=5),
    ),
)
