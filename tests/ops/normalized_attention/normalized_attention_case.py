"""Calls of normalized_attention."""

import torch
from case import F32, Case, Op, count_sequences, generator, randn
from drawing import CHANNELS, DTYPES, KINDS, SEEDS, lengths_around, sequences
from hypothesis import strategies as st

from chunked_attention.chunked_attention_case import STARTS, attention_state, call, mask_options
from normalized_qk.normalized_qk_case import normalized_qk_case


def normalized_attention_case(
    B=2, L=9, H=2, K=4, V=5, C=4, *, dtype=F32, seed=0, causal=True, dropkey=0.0, state=False, **rows
) -> Case:
    gen = generator(seed)
    qk = normalized_qk_case(B, L, H, K, C, dtype=dtype, seed=seed, **rows)
    tensors = {"z": qk.tensors["z"], "v": randn(gen, B, L, H * V, dtype=dtype)}
    tensors |= {"gamma": qk.tensors["gamma"] * 4, "beta": qk.tensors["beta"] * 4}
    options = qk.options | mask_options(causal, dropkey, seed)
    if state:
        options["state"] = attention_state(gen, count_sequences(B, **rows), C, H, K, V, dtype)
    return Case("normalized_attention", tensors, options, dtype)


@st.composite
def normalized_attention_cases(
    draw: st.DrawFn, dtypes: st.SearchStrategy[torch.dtype] = DTYPES, kinds: tuple[str, ...] = KINDS
) -> Case:
    C = draw(st.sampled_from([1, 2, 5, 16, 33]))
    rows = draw(sequences(lengths_around(C), kinds))
    H, K = draw(st.integers(1, 3)), draw(st.sampled_from([2, 4, 6, 16, 34]))
    sizes = dict(H=H, K=K, V=draw(CHANNELS), C=C, dropkey=draw(st.sampled_from([0.0, 0.25])))
    return normalized_attention_case(
        **rows, **sizes, dtype=draw(dtypes), seed=draw(SEEDS), **draw(st.sampled_from(STARTS))
    )


OP = Op(
    "normalized_attention",
    normalized_attention_case,
    normalized_attention_cases,
    tokens=("z", "v"),
    parameters=("gamma", "beta"),
    outputs=("o",),
    call=call,
    with_state={"state": True},
    small={"dropkey": 0.3},
    without_elements=({"K": 0}, {"V": 0}, {"K": 0, "V": 0}),
    threads={"chunks": dict(B=2, L=301, H=3, K=10, V=21, C=129)},
    constant_state=True,
)
