"""Calls of chunked_attention; states for other attention ops."""

from typing import Any

import torch
from case import F32, Case, CudaSizes, Op, Tensors, count_sequences, generator, randn, sequence_options
from drawing import CHANNELS, DTYPES, KINDS, SEEDS, lengths_around, sequences
from hypothesis import strategies as st

from megalodon_ops import AttentionState

STARTS: tuple[dict[str, bool], ...] = ({}, {"state": True}, {"causal": False})


def chunked_attention_case(
    B=2, L=9, H=2, K=3, V=5, C=4, *, dtype=F32, seed=0, causal=True, scale=1.0, dropkey=0.0, state=False, **others
) -> Case:
    """`others`: visible_chunks, cu_seqlens and lengths."""
    gen = generator(seed)
    visible_chunks, rows = others.pop("visible_chunks", 1), others
    tensors = {name: randn(gen, B, L, H, size, dtype=dtype) for name, size in (("q", K), ("k", K), ("v", V))}
    options = {"chunk_size": C, "scale": scale, **sequence_options(**rows), **mask_options(causal, dropkey, seed)}
    if visible_chunks > 1:
        options["visible_chunks"] = visible_chunks
    if state:
        options["state"] = attention_state(gen, count_sequences(B, **rows), visible_chunks * C, H, K, V, dtype)
    return Case("chunked_attention", tensors, options, dtype)


def mask_options(causal: bool, dropkey: float, seed: int) -> dict[str, Any]:
    options: dict[str, Any] = {} if causal else {"causal": False}
    if dropkey:
        options |= {"dropkey": dropkey, "dropkey_seed": torch.tensor([seed * 0x9E3779B97F4A7C15 % 2**63])}
    return options


def attention_state(
    gen: torch.Generator, S: int, rows: int, H: int, K: int, V: int, dtype: torch.dtype
) -> AttentionState:
    """A state with every possible position in turn; rows beyond the position hold NaN: kernels must not read them."""
    position = (torch.arange(S) * 5 + rows - 1) % rows
    k = randn(gen, S, rows, H, K, dtype=dtype)
    v = randn(gen, S, rows, H, V, dtype=dtype)
    for s, end in enumerate(position.tolist()):
        k[s, end:] = v[s, end:] = torch.nan
    return AttentionState(k, v, position)


@st.composite
def chunked_attention_cases(
    draw: st.DrawFn, dtypes: st.SearchStrategy[torch.dtype] = DTYPES, kinds: tuple[str, ...] = KINDS
) -> Case:
    """Different key and value widths; chunks of one row up to more rows than a block."""
    C, visible_chunks = draw(st.sampled_from([1, 2, 3, 8, 16, 17, 64, 67])), draw(st.sampled_from([1, 1, 2]))
    # Attention to two chunks is causal and has no DropKey.
    starts, dropkeys = (STARTS, [0.0, 0.25, 0.9]) if visible_chunks == 1 else (STARTS[:2], [0.0])
    rows = draw(sequences(lengths_around(C), kinds))
    sizes = dict(H=draw(st.integers(1, 3)), K=draw(CHANNELS), V=draw(CHANNELS))
    sizes |= dict(C=C, scale=draw(st.sampled_from([1.0, 0.125, -0.5])), dropkey=draw(st.sampled_from(dropkeys)))
    sizes |= dict(visible_chunks=visible_chunks, dtype=draw(dtypes), seed=draw(SEEDS))
    return chunked_attention_case(**rows, **sizes, **draw(st.sampled_from(starts)))


def call(function, inputs: list, tensors: Tensors, options: dict[str, Any]) -> Tensors:
    if not options.get("causal", True):  # has no state
        return {"o": function(*inputs, **options)}
    o, state = function(*inputs, return_state=True, **options)
    return {"o": o, "state.k": state.k, "state.v": state.v, "state.position": state.position}


OP = Op(
    "chunked_attention",
    chunked_attention_case,
    chunked_attention_cases,
    tokens=("q", "k", "v"),
    parameters=(),
    outputs=("o",),
    call=call,
    with_state={"state": True},
    small={"dropkey": 0.3},
    without_elements=({"K": 0, "C": 140}, {"V": 0, "C": 140}, {"K": 0, "V": 0}, {"H": 0}),
    threads={
        "one-chunk": dict(B=1, L=691, H=1, K=17, V=35, C=701, dropkey=0.1),
        "whole-chunk": dict(B=1, L=691, H=1, K=17, V=35, C=701, causal=False),
        "chunks": dict(B=3, L=157, H=5, K=9, V=13, C=37),
        "uneven-chunks": dict(B=1, L=700, H=1, K=33, V=20, C=333, state=True),
        "few-queries": dict(B=3, L=2, H=3, K=33, V=65, C=1201, state=True),
    },
    cuda=CudaSizes(
        aligned=(
            dict(B=1, L=9, H=1, K=16, V=16, C=20, state=True, dropkey=0.1),
            dict(B=2, L=2, H=1, K=16, V=16, C=20, state=True),
        ),
        sanitized=(
            *(dict(K=K, V=V, C=33, L=70, dropkey=0.2) for K, V in ((3, 5), (64, 96))),
            dict(K=16, V=160, state=True),
            *({**none, "L": 21, "state": True} for none in ({"K": 0}, {"V": 0})),
            dict(B=1, L=23, cu_seqlens=[0, 9, 9, 20], state=True),
            dict(lengths=[9, 4], L=9),
        ),
        smallest=dict(H=1, K=2, V=2, C=3),
        odd=dict(H=2, K=8, V=16, C=6),
    ),
    constant_state=True,
)
