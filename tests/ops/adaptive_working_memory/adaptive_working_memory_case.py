"""Calls of adaptive_working_memory."""

from typing import Any

import torch
from case import F32, Case, Op, Tensors, count_sequences, generator, randn, real_dtype, sequence_options
from drawing import CHANNELS, DTYPES, KINDS, SEEDS, lengths_around, sequences
from hypothesis import strategies as st

from chunked_attention.chunked_attention_case import attention_state
from megalodon_ops import WorkingMemoryState


def adaptive_working_memory_case(
    B=2, L=9, H=2, K=3, V=5, C=4, *, dtype=F32, seed=0, size=1.0, visible_chunks=1, state=False, **rows
) -> Case:
    """Queries and keys of scale `size`; memories of some sequences are empty."""
    gen, real = generator(seed), real_dtype(dtype)
    tensors = {
        name: (scale * randn(gen, B, L, H, width)).to(dtype)
        for name, scale, width in (("q", size, K), ("k", size, K), ("v", 1, V))
    }
    options = {"chunk_size": C, "visible_chunks": visible_chunks, **sequence_options(**rows)}
    if state:
        S = count_sequences(B, **rows)
        kept = attention_state(gen, S, visible_chunks * C, H, K, V, dtype)
        # Number of chunks in the memory: 0, 1, 2 in turn, but 0 where the kept rows do not fill the earlier chunks
        chunks = torch.arange(S) % 3 * (kept.position >= (visible_chunks - 1) * C)
        written = (chunks > 0)[:, None, None]
        tensors["memory"] = (randn(gen, S, H, K, V) * written[..., None]).to(real)
        tensors["mass"] = ((randn(gen, S, H, K) + 2) * written).to(real)
        options["kept"] = kept._replace(position=kept.position + C * chunks)
    return Case("adaptive_working_memory", tensors, options, dtype, terms=1.0)


@st.composite
def adaptive_working_memory_cases(
    draw: st.DrawFn, dtypes: st.SearchStrategy[torch.dtype] = DTYPES, kinds: tuple[str, ...] = KINDS
) -> Case:
    """Scores from nearly uniform to nearly one-hot."""
    C = draw(st.sampled_from([1, 2, 5, 16, 33]))
    rows = draw(sequences(lengths_around(C), kinds))
    sizes = dict(H=draw(st.integers(1, 3)), K=draw(CHANNELS), V=draw(CHANNELS))
    sizes |= dict(C=C, size=draw(st.sampled_from([0.1, 1.0, 10.0])), visible_chunks=draw(st.sampled_from([1, 2])))
    return adaptive_working_memory_case(
        **rows, **sizes, dtype=draw(dtypes), seed=draw(SEEDS), state=draw(st.booleans())
    )


def _with_state(tensors: Tensors, options: dict[str, Any]) -> dict[str, Any]:
    """The options, with a state put together from its parts."""
    options = dict(options)
    if kept := options.pop("kept", None):
        options["state"] = WorkingMemoryState(tensors["memory"], tensors["mass"], kept.k, kept.position, kept.v)
    return options


def call(function, inputs: list, tensors: Tensors, options: dict[str, Any]) -> Tensors:
    o, state = function(*inputs, return_state=True, **_with_state(tensors, options))
    return {"o": o} | {f"state.{field}" if field in "kv" else field: t for field, t in state._asdict().items()}


def gradients(backward, case: Case, inputs: list, incoming: Tensors) -> Tensors:
    given = [incoming.get(name) for name in ("o", "memory", "mass")]
    grads = backward(*given, *inputs, **_with_state(case.tensors, case.options))
    return dict(zip(("dq", "dk", "dv", "dmemory", "dmass"), grads, strict=True))


OP = Op(
    "adaptive_working_memory",
    adaptive_working_memory_case,
    adaptive_working_memory_cases,
    tokens=("q", "k", "v"),
    parameters=(),
    outputs=("o",),
    call=call,
    gradients=gradients,
    with_state={"state": True},
    without_elements=({"K": 0}, {"V": 0}, {"K": 0, "V": 0}, {"H": 0}),
    constant_state=True,
)
