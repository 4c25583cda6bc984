"""normalized_attention: equality with its two parts, chunks, decoding, errors. See also test_ops.py."""

import pytest
import torch
from assertions import assert_all_as_accurate_as, assert_bit_equal, assert_close, assert_refuses, with_references
from backends import every_backend
from calls import evaluate, forward
from cases import normalized_attention_case

import megalodon_ops as mo
from megalodon_ops import AttentionState

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_equals_its_two_parts(dtype):
    case = normalized_attention_case(B=2, L=21, H=3, K=4, V=7, C=8, dtype=dtype, dropkey=0.2)

    def parts(z, v, gamma, beta, *, num_heads, chunk_size, rope_base, eps, return_state, **dropkey):
        q, k = mo.normalized_qk(
            z, gamma, beta, num_heads=num_heads, chunk_size=chunk_size, rope_base=rope_base, eps=eps
        )
        v = v.unflatten(-1, (num_heads, -1))
        o, state = mo.chunked_attention(q, k, v, chunk_size=chunk_size, return_state=return_state, **dropkey)
        return o.flatten(-2), state

    assert_bit_equal(evaluate(mo.normalized_attention, case), evaluate(parts, case))


@with_references
def model_case(dtype):
    return normalized_attention_case(B=1, L=110, H=1, K=64, V=256, C=96, dtype=dtype)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shape_of_a_model(dtype, backend):
    """One head of K 64 and V 256 over one chunk and a part of the next."""
    case, same, exact = model_case(dtype)
    factor, floor = (4, 8) if dtype == torch.float32 else (2, 0.5)
    assert_all_as_accurate_as(evaluate(mo.normalized_attention, case), same, exact, factor=factor, floor=floor)


def test_chunks_do_not_see_each_other():
    case = normalized_attention_case(B=1, L=12, C=4)
    whole = forward(mo.normalized_attention, case)["o"]
    changed = {name: case.tensors[name].clone() for name in ("z", "v")}
    for tensor in changed.values():
        tensor[:, :8] = 100.0
    found = forward(mo.normalized_attention, case.with_tensors(**changed))["o"]
    assert torch.equal(found[:, 8:], whole[:, 8:])
    assert not torch.equal(found[:, :8], whole[:, :8])


def test_the_future_is_not_seen():
    case = normalized_attention_case(B=1, L=12, C=8)
    whole = forward(mo.normalized_attention, case)["o"]
    for t in (1, 5, 9):
        changed = {name: case.tensors[name].clone() for name in ("z", "v")}
        for tensor in changed.values():
            tensor[:, t:] = 1e4
        assert torch.equal(forward(mo.normalized_attention, case.with_tensors(**changed))["o"][:, :t], whole[:, :t])


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "in-place"])
def test_decoding_token_by_token(inplace):
    H, K, V, C = 2, 6, 5, 8
    case = normalized_attention_case(B=2, L=21, H=H, K=K, V=V, C=C, dtype=torch.float64)
    whole = forward(mo.normalized_attention, case)
    empty = (torch.zeros(2, C, H, K).double(), torch.zeros(2, C, H, V).double(), torch.zeros(2, dtype=torch.int64))
    state = AttentionState(*empty)
    outputs = []
    z, v, gamma, beta = case.tensors.values()
    options = dict(num_heads=H, chunk_size=C, return_state=True, inplace_state=inplace)
    for token, value in zip(z.split(1, 1), v.split(1, 1), strict=True):
        o, state = mo.normalized_attention(token, value, gamma, beta, state=state, **options)
        outputs.append(o)
    assert_close(torch.cat(outputs, 1), whole["o"], tolerance=1e-12)
    assert torch.equal(state.position, torch.tensor([5, 5]))  # 21 tokens: two chunks of 8, and 5
    assert_close(state.k[:, :5], whole["state.k"][:, :5], tolerance=1e-12)
    assert_close(state.v[:, :5], whole["state.v"][:, :5], tolerance=1e-12)


ERRORS = {  # numbers out of range are in test_wrong_calls.py
    "z-no-batch": (ValueError, "z", {"z": torch.zeros(9, 8)}),
    "z-integer": (TypeError, "z", {"z": torch.zeros(2, 9, 8, dtype=torch.int64)}),
    "v-no-batch": (ValueError, "v", {"v": torch.zeros(9, 10)}),
    "v-length": (ValueError, "v", {"v": torch.zeros(2, 8, 10)}),
    "v-dtype": (TypeError, "v", {"v": torch.zeros(2, 9, 10, dtype=torch.bfloat16)}),
    "v-heads": (ValueError, "num_heads", {"v": torch.zeros(2, 9, 9)}),
    "heads-odd-size": (ValueError, "num_heads", {"num_heads": 8, "v": torch.zeros(2, 9, 16)}),
    "gamma-shape": (ValueError, "gamma", {"gamma": torch.zeros(8)}),
    "beta-dtype": (TypeError, "beta", {"beta": torch.zeros(2, 8, dtype=torch.float16)}),
    "not-causal-into-a-state": (ValueError, "causal", {"causal": False, "return_state": True}),
    "packed-batch": (ValueError, "cu_seqlens", {"cu_seqlens": torch.tensor([0, 9])}),
}


@pytest.mark.parametrize(("error", "argument", "changes"), ERRORS.values(), ids=ERRORS)
def test_errors(error, argument, changes):
    """The message may name the inner op to which the argument belongs."""
    tensors = normalized_attention_case(B=2, L=9, H=2, K=4, V=5).tensors
    arguments = {**tensors, "num_heads": 2, "chunk_size": 4, **changes}
    ops = "(normalized_attention|normalized_qk|chunked_attention)"
    assert_refuses(error, ops, argument, lambda: mo.normalized_attention(**arguments))
