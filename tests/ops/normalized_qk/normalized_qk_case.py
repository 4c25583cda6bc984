"""Calls of normalized_qk."""

from typing import Any

import torch
from case import F32, Case, CudaSizes, Op, Tensors, count_sequences, generator, randn, real_dtype, sequence_options
from drawing import DTYPES, KINDS, SEEDS, lengths_around, sequences
from hypothesis import strategies as st


def normalized_qk_case(
    B=2, L=9, H=2, K=6, C=4, *, dtype=F32, seed=0, size=1.0, rope_base=1e4, eps=1e-5, position=False, **rows
) -> Case:
    gen, real = generator(seed), real_dtype(dtype)
    tensors = {
        "z": (size * randn(gen, B, L, H * K)).to(dtype),
        "gamma": randn(gen, 2, H * K, dtype=real) / 2,
        "beta": randn(gen, 2, H * K, dtype=real) / 4,
    }
    options = {"num_heads": H, "chunk_size": C, "rope_base": rope_base, "eps": eps, **sequence_options(**rows)}
    if position:
        options["position"] = torch.randint(C, (count_sequences(B, **rows),), generator=gen)
    return Case("normalized_qk", tensors, options, dtype, terms=0.1 / max(size, eps**0.5))


@st.composite
def normalized_qk_cases(
    draw: st.DrawFn, dtypes: st.SearchStrategy[torch.dtype] = DTYPES, kinds: tuple[str, ...] = KINDS
) -> Case:
    """z from far below eps to large; chunks shorter and longer than the sequence."""
    C = draw(st.sampled_from([1, 2, 5, 8, 16, 64, 2048]))
    rows = draw(sequences(lengths_around(min(C, 16)), kinds))
    H = draw(st.integers(1, 4))
    K = draw(st.sampled_from([2, 4, 6, 16, 18, 34, 64]))
    rope_base = draw(st.sampled_from([10.0, 1e4, 1e5]))
    values = dict(size=draw(st.sampled_from([1e-3, 1.0, 100.0])), position=draw(st.booleans()))
    values |= dict(dtype=draw(dtypes), seed=draw(SEEDS))
    return normalized_qk_case(**rows, H=H, K=K, C=C, rope_base=rope_base, **values)


def call(function, inputs: list, tensors: Tensors, options: dict[str, Any]) -> Tensors:
    q, k = function(*inputs, **options)
    return {"q": q, "k": k}


OP = Op(
    "normalized_qk",
    normalized_qk_case,
    normalized_qk_cases,
    tokens=("z",),
    parameters=("gamma", "beta"),
    outputs=("q", "k"),
    call=call,
    with_state={"position": True},
    without_elements=({"K": 0},),
    threads={
        "blocks": dict(B=1, L=1501, H=3, K=18, C=67),
        "parts": dict(B=3, L=1501, H=1, K=10, C=64, lengths=[1501, 7, 900]),
    },
    cuda=CudaSizes(
        aligned=tuple(dict(B=1, L=3, H=1, K=K, position=True) for K in (16, 512)),
        sanitized=(
            *(dict(K=K, position=True) for K in (2, 6, 64, 256, 1026)),
            dict(B=1, L=23, cu_seqlens=[0, 9, 9, 20]),
            dict(lengths=[9, 4]),
        ),
        smallest=dict(H=1, K=2),
        odd=dict(H=2, K=8, C=6),
    ),
)
