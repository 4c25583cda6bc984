"""chunked_attention on the emulated device: cases, forward and backward, and the bounds of both."""

from functools import partial

import pytest
import torch
from assertions import assert_close, assert_matches_reference
from calls import evaluate, forward
from cases import chunked_attention_case

import megalodon_ops as mo
from megalodon_ops import _C
from megalodon_ops.ops.common.philox import dropkey_mask
from megalodon_ops.ops.common.reference_helpers import sequences
from megalodon_ops.ops.common.states import accumulation_dtype

F32, F64 = torch.float32, torch.float64
GRADIENTS = ("dq", "dk", "dv")
STATE = ("cache_k", "cache_v", "position")


def scaled_case(**shape):
    """A case with scores of about unit size, so that several terms of a softmax count."""
    return chunked_attention_case(**shape, scale=shape["K"] ** -0.5)


def arguments_of(case):
    """Return the arguments of the forward's kernels, which the backward's take, too."""
    options = dict(causal=True, dropkey=0.0, dropkey_seed=None) | case.options
    names = ("chunk_size", "causal", "scale", "dropkey", "dropkey_seed")
    state = dict(zip(STATE, options.get("state") or (), strict=False))
    return {**case.tensors, **state, **{name: options[name] for name in names}, "spans": case.spans()}


def run(emulator, case, offset=0):
    """Return o and lse of the forward's kernels."""
    q, v = case.tensors["q"], case.tensors["v"]
    results = {"o": torch.empty_like(v), "lse": q.new_empty(q.shape[:-1], dtype=accumulation_dtype(q.dtype))}
    emulator.call("chunked_attention_fwd", **arguments_of(case), **results, offset=offset)
    return results


def update_state(emulator, case, old, new, offset=0):
    """Write the state after the case's tokens to `new`; `old` is the state before them, or the same tensors."""
    inputs = arguments_of(case.with_options(state=old))
    taken = {name: inputs[name] for name in ("k", "v", *STATE, "chunk_size", "spans")}
    results = {f"{name}_out": tensor for name, tensor in zip(STATE, new, strict=True)}
    emulator.call("chunked_attention_state", **taken, **results, offset=offset)


def exact_lse(case):
    """log sum_j exp(s_ij) in float64, 0 at padding."""
    q, k = case.tensors["q"].double(), case.tensors["k"].double()
    options = case.options
    state, C = options.get("state"), options["chunk_size"]
    lse = torch.zeros(q.shape[:-1], dtype=F64)
    for s, (row, tokens) in enumerate(sequences(q, case.spans())):
        position = 0 if state is None else int(state.position[s])
        keys = k[row, tokens] if state is None else torch.cat([state.k[s, :position].double(), k[row, tokens]])
        i, j = torch.arange(position, len(keys)), torch.arange(len(keys))
        hidden = j // C != i[:, None] // C
        if options.get("causal", True):
            hidden = hidden | (j > i[:, None])
        if "dropkey" in options:
            seed = int(options["dropkey_seed"])
            hidden = hidden | dropkey_mask(options["dropkey"], seed, s, q.shape[2], i, j)
        scores = options["scale"] * torch.einsum("ihk,jhk->hij", q[row, tokens], keys)
        lse[row, tokens] = scores.masked_fill(hidden, -torch.inf).logsumexp(-1).T
    return lse


def assert_accurate(actual, case):
    """Assert that o and lse are right."""
    output = lambda function, case: {"o": forward(function, case)["o"]}  # noqa: E731
    assert_matches_reference({"o": actual["o"]}, case, run=output, tolerance=1e-12)
    lse = exact_lse(case)
    nothing = lse == -torch.inf  # DropKey hides all keys
    assert torch.equal(actual["lse"] == -torch.inf, nothing)
    assert (actual["o"][nothing] == 0).all()
    tolerance = 1e-12 if case.dtype == F64 else 2e-6
    seen = actual["lse"].double().masked_fill(nothing, 0)
    assert_close(seen, lse.masked_fill(nothing, 0), tolerance=tolerance, terms=1.0, name="lse")


@pytest.fixture
def gradients(emulator, monkeypatch):
    """Gradients of a case: forward on the CPU, backward on the emulated device."""

    def run(case, offset=0, incoming=None):
        monkeypatch.setattr(_C, "chunked_attention_bwd", partial(emulator.call, "chunked_attention_bwd", offset=offset))
        results = evaluate(mo.chunked_attention, case, incoming)
        return {name: results[name] for name in GRADIENTS}

    return run


def assert_right(actual, case, incoming=None):
    """Assert that the gradients of q, k and v are right."""

    def run(function, case):
        results = evaluate(function, case, incoming)
        return {name: results[name] for name in GRADIENTS}

    assert_matches_reference(actual, case, run=run)
