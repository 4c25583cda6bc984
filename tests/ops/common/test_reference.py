"""The reference: hand-derived backward against autograd, closed forms, random numbers."""

import math
from functools import partial

import pytest
import torch
from assertions import assert_all_close, assert_close
from case import call_with_state
from calls import OPS, invariant_results, evaluate, forward, packed, streamed
from cases import BUILDERS, cema_case, chunked_attention_case, generator, randn, timestep_norm_case
from hypothesis import given
from hypothesis import strategies as st
from strategies import CASES

from megalodon_ops import reference
from megalodon_ops.ops.common.philox import MASK_32, dropkey_mask, philox

FLOAT64 = st.just(torch.float64)


def explicit_gradients(case, incoming):
    """Gradients of `<op>_bwd`, with the names that `evaluate` gives."""
    op, case = OPS[case.op], case.below_the_public_function()
    backward = getattr(reference, f"{case.op}_bwd")
    inputs = [case.tensors[name] for name in op.tokens + op.parameters]
    if op.gradients:
        found = op.gradients(backward, case, inputs, incoming)
    else:
        states = {"state": case.tensors.get("state")} if op.call is call_with_state else {}
        given = [incoming.get(name) for name in (*op.outputs, *states)]
        grads = backward(*given, *inputs, **states, **case.options)
        names = (*op.tokens, *op.parameters, *states)
        found = {f"d{name}": grad for name, grad in zip(names, grads, strict=True)}
    return {name: grad for name, grad in found.items() if name[1:] in case.tensors}


@pytest.mark.parametrize("op", OPS)
@given(data=st.data())
def test_explicit_backward_equals_autograd(op, data):
    case = data.draw(CASES[op](FLOAT64))
    incoming = {}
    results = evaluate(getattr(reference, op), case, lambda name, grad: incoming.setdefault(name, grad))
    if incoming:
        expected = {f"d{name}": results[f"d{name}"] for name in case.tensors}
        assert_all_close(explicit_gradients(case, incoming), expected, tolerance=1e-12, terms=case.terms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_results_have_the_documented_dtypes(op, dtype):
    case = BUILDERS[op](dtype=dtype)
    results = evaluate(getattr(reference, op), case)
    for name in OPS[op].outputs:
        assert results[name].dtype == dtype
    for name, tensor in case.tensors.items():
        assert results[f"d{name}"].dtype == tensor.dtype
    for name in ("state", "mean", "var"):
        if name in results:
            assert results[name].dtype in (torch.float32, torch.complex64)


@pytest.mark.parametrize("op", OPS)
def test_pieces_and_packing_give_the_whole(op):
    case = BUILDERS[op](B=3, L=11, dtype=torch.float64, lengths=[11, 0, 6])
    function = getattr(reference, op)
    whole = evaluate(function, case)
    if not OPS[op].whole:
        pieces = evaluate(streamed(function, op, [1, 0, 6, 4]), case)
        assert_all_close(invariant_results(op, pieces), invariant_results(op, whole), tolerance=1e-12)
    assert_all_close(evaluate(packed(function, op, before=2, after=3), case), whole, tolerance=1e-12)


def test_cema_is_a_convolution():
    """Closed form: y = conv(x, Re sum_n gamma p q^j) + Re(sum_n gamma q^t h_0) + omega x."""
    case = cema_case(B=2, L=50, D=3, N=5, dtype=torch.float64, state=True)
    x, p, q, gamma, omega, h0 = case.tensors.values()
    t = torch.arange(50)
    powers = q[:, :, None] ** t  # (D, N, L)
    kernel = (gamma[:, :, None] * p[:, :, None] * powers).real.sum(1)  # (D, L)
    lag = t[:, None] - t
    toeplitz = torch.where(lag >= 0, kernel[:, lag.clamp(min=0)], 0)  # (D, L, L)
    from_state = torch.einsum("dn,bdn,dnt->btd", gamma * q, h0, powers).real
    expected = torch.einsum("dij,bjd->bid", toeplitz, x) + from_state + omega * x
    assert_close(reference.cema(**case.tensors), expected, tolerance=1e-12)


def test_timestep_norm_is_group_norm_of_the_prefix():
    """Closed form: statistics over all channels of the group and all positions so far."""
    case = timestep_norm_case(B=2, L=20, G=3, width=4, dtype=torch.float64, eps=1e-3)
    x, weight, bias = case.tensors.values()
    for t in range(20):
        prefix = x[:, : t + 1].unflatten(-1, (3, 4))  # (B, t + 1, G, D/G)
        mean, var = prefix.mean((1, 3)), prefix.var((1, 3), unbiased=False)
        normalized = (prefix[:, t] - mean[..., None]) / (var[..., None] + 1e-3).sqrt()
        y = forward(reference.timestep_norm, case)["y"][:, t]
        assert_close(y, normalized.flatten(1) * (1 + weight) + bias, tolerance=1e-12)


def test_normalized_qk_scores_depend_on_the_distance_inside_a_chunk():
    z = randn(generator(0), 1, 1, 8).expand(1, 12, 8)
    zeros = torch.zeros(2, 8, dtype=torch.float64)
    q, k = reference.normalized_qk(z, zeros, zeros, num_heads=1, chunk_size=6)
    scores = torch.einsum("iK,jK->ij", q[0, :, 0], k[0, :, 0])
    assert_close(scores[1:6, 1:6], scores[:5, :5], tolerance=1e-12)
    assert_close(scores[6:, 6:], scores[:6, :6], tolerance=1e-12)
    assert_close(scores.diagonal(), torch.ones(12, dtype=torch.float64), tolerance=1e-4)  # |q|^2 = |z|^2 r^2 / K


def test_chunked_attention_equals_softmax_of_the_masked_scores():
    case = chunked_attention_case(B=2, L=11, H=2, K=3, V=5, C=4, dtype=torch.float64, scale=0.7)
    q, k, v = (t.transpose(1, 2) for t in case.tensors.values())
    i = torch.arange(11)
    allowed = (i[:, None] >= i) & (i[:, None] // 4 == i // 4)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=0.7)
    assert_close(forward(reference.chunked_attention, case)["o"], expected.transpose(1, 2), tolerance=1e-12)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((MASK_32,) * 4, -1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_known_answers(counter, key, expected):
    """The vectors that come with Random123."""
    words = philox(tuple(torch.tensor(c) for c in counter), key)
    assert tuple(int(word) for word in words) == expected


def test_dropkey_mask_has_the_right_rate_and_no_pattern():
    rows = columns = torch.arange(200)
    draw = partial(dropkey_mask, 0.3, num_heads=3, rows=rows, columns=columns)
    masks = [draw(seed=seed, sequence=s).double() for seed in (1, 2**33 + 1) for s in range(2)]
    flat = torch.cat(masks).flatten(1)  # one row for each (seed, sequence, head)
    deviation = math.sqrt(0.3 * 0.7 / flat.shape[1])
    assert ((flat.mean(1) - 0.3).abs() < 5 * deviation).all()
    correlation = torch.corrcoef(flat) - torch.eye(len(flat))
    assert (correlation.abs() < 5 / math.sqrt(flat.shape[1])).all()
