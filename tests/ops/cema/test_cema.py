"""cema: golden data, poles by the unit circle, lazily conjugated inputs, errors. See also test_ops.py."""

import math

import pytest
import torch
from assertions import assert_all_as_accurate_as, assert_bit_equal, assert_close, assert_refuses
from assertions import every_case, references, with_references
from backends import each_implementation, every_backend, wide_every_backend
from calls import evaluate, forward, streamed
from cases import cema_case
from golden import TOLERANCE, golden_case, golden_config
from hard_values import HARD_POLES, HARD_SHAPES

import megalodon_ops as mo

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("name", golden_config("cema"))
@each_implementation
def test_golden(name, implementation, backend):
    """The released layer: coefficients from its parameters, the scan, gradients down to the parameters."""
    t = golden_case("cema", name)
    leaves = {key: t[f"param_{key}"].clone().requires_grad_() for key in ("alpha", "delta", "theta", "gamma", "omega")}
    x = t["x"].transpose(1, 2).clone().requires_grad_()
    alpha, delta, theta = (leaves[key][..., 0].sigmoid() for key in ("alpha", "delta", "theta"))
    N = alpha.shape[1]
    q = torch.polar(1 - alpha * delta, theta * 2 * math.pi / N * torch.arange(1, N + 1))
    gamma = torch.view_as_complex(leaves["gamma"]) / math.sqrt(N)
    state = torch.view_as_complex(t["hx"]).requires_grad_() if "hx" in t else None
    y, h = implementation.cema(x, alpha, q, gamma, leaves["omega"][:, 0], state=state, return_state=True)
    assert_close(y.transpose(1, 2), t["y"], tolerance=TOLERANCE)
    loss = (y.transpose(1, 2) * t["grad_y"]).sum()
    if "grad_h" in t:
        assert_close(torch.view_as_real(h), t["h"], tolerance=TOLERANCE)
        loss = loss + (torch.view_as_real(h) * t["grad_h"]).sum()
    loss.backward()
    assert_close(x.grad.transpose(1, 2), t["dx"], tolerance=TOLERANCE)
    for key, leaf in leaves.items():
        assert_close(leaf.grad, t[f"d{key}"], tolerance=TOLERANCE, name=key)
    if state is not None:
        assert_close(torch.view_as_real(state.grad), t["dhx"], tolerance=TOLERANCE)


@every_backend
@pytest.mark.parametrize("sequences", [{"L": 0}, {"L": 3, "lengths": [0, 0]}], ids=["no-positions", "empty-rows"])
def test_a_call_without_tokens_returns_the_bits_of_the_state(sequences, backend):
    case = cema_case(B=2, D=67, N=5, state=True, **sequences)
    assert_bit_equal({"state": forward(mo.cema, case)["state"]}, {"state": case.tensors["state"]})


@with_references
def hard_case(shape, poles):
    return cema_case(**HARD_SHAPES[shape], **HARD_POLES[poles], state=True)


@wide_every_backend
@pytest.mark.parametrize("shape", HARD_SHAPES)
def test_hard_poles_on_long_sequences(shape, backend):
    with every_case() as each:
        for poles in HARD_POLES:
            with each(poles):
                case, same, exact = hard_case(shape, poles)
                assert_all_as_accurate_as(evaluate(mo.cema, case), same, exact, factor=4, floor=8)


def test_tiny_input_weights_keep_the_state():
    """p near 0: the kernel must not divide by it."""
    case = cema_case(B=2, L=70, D=5, N=4, state=True)
    case = case.with_tensors(p=case.tensors["p"] * torch.tensor([0.0, 1e-30, 1e-6, 1.0]))
    assert_all_as_accurate_as(evaluate(mo.cema, case), *references(case), factor=4, floor=8)


def test_a_decayed_state_is_zero_not_slow_or_wrong():
    """A state that decays below about the smallest normal float32 becomes 0; subnormal numbers would be slow."""
    case = cema_case(B=1, L=400, D=3, N=4, radius=(0.5, 0.6), state=True)
    case = case.with_tensors(x=torch.zeros_like(case.tensors["x"]))
    y, h = mo.cema(**case.tensors, return_state=True)
    assert h.abs().max() <= 2.5 * torch.finfo(torch.float32).tiny
    assert_close(y[:, :50], mo.reference.cema(**case.tensors)[:, :50], tolerance=1e-5)


def test_lazily_conjugated_tensors():
    """q, gamma, the state and their gradients may carry torch's conjugate bit, real ones its negative bit."""
    case = cema_case(dtype=torch.float64, state=True)
    lazy = {name: t.conj() if t.is_complex() else torch._neg_view(t) for name, t in case.tensors.items()}
    assert lazy["q"].is_conj() and lazy["p"].is_neg()

    def plain(t):
        return t.resolve_conj().resolve_neg().clone()

    def lazy_gradient(name, grad):
        return grad.conj() if grad.is_complex() else torch._neg_view(grad)

    actual = evaluate(mo.cema, case.with_tensors(**lazy), lazy_gradient)
    case = case.with_tensors(**{name: plain(t) for name, t in lazy.items()})
    assert_bit_equal(actual, evaluate(mo.cema, case, lambda name, grad: plain(lazy_gradient(name, grad))))


def test_one_token_at_a_time():
    case = cema_case(B=2, L=150, D=5, N=4)
    found = evaluate(streamed(mo.cema, "cema", [1] * 150), case)
    assert_all_as_accurate_as(found, *references(case), factor=4, floor=8)


ERRORS = {
    "no-batch": (ValueError, "x", {"x": torch.zeros(2, 128)}),
    "x-integer": (TypeError, "x", {"x": torch.zeros(2, 9, 5, dtype=torch.int64)}),
    "p-shape": (ValueError, "p", {"p": torch.zeros(4, 4)}),
    "p-rank": (ValueError, "p", {"p": torch.zeros(5)}),
    "no-states": (ValueError, "p", {"p": torch.zeros(5, 0)}),
    "p-bfloat16": (TypeError, "p", {"p": torch.zeros(5, 4, dtype=torch.bfloat16)}),
    "p-float64": (TypeError, "p", {"p": torch.zeros(5, 4, dtype=torch.float64)}),
    "q-shape": (ValueError, "q", {"q": torch.zeros(5, 3, dtype=torch.complex64)}),
    "q-real": (TypeError, "q", {"q": torch.zeros(5, 4)}),
    "gamma-shape": (ValueError, "gamma", {"gamma": torch.zeros(5, 4, 1, dtype=torch.complex64)}),
    "gamma-complex128": (TypeError, "gamma", {"gamma": torch.zeros(5, 4, dtype=torch.complex128)}),
    "omega-shape": (ValueError, "omega", {"omega": torch.zeros(5, 1)}),
    "omega-dtype": (TypeError, "omega", {"omega": torch.zeros(5, dtype=torch.float16)}),
    "state-shape": (ValueError, "state", {"state": torch.zeros(1, 5, 4, dtype=torch.complex64)}),
    "state-dtype": (TypeError, "state", {"state": torch.zeros(2, 5, 4)}),
    "x-device": (ValueError, "x", {"x": torch.zeros(2, 9, 5, device="meta")}),
    "q-device": (ValueError, "q", {"q": torch.zeros(5, 4, dtype=torch.complex64, device="meta")}),
    "lengths-too-long": (ValueError, "lengths", {"lengths": torch.tensor([3, 10])}),
    "lengths-negative": (ValueError, "lengths", {"lengths": torch.tensor([3, -1])}),
    "lengths-shape": (ValueError, "lengths", {"lengths": torch.tensor([3])}),
    "lengths-float": (TypeError, "lengths", {"lengths": torch.tensor([3.0, 4.0])}),
    "packed-batch": (ValueError, "cu_seqlens", {"cu_seqlens": torch.tensor([0, 9])}),
}
PACKED_ERRORS = {
    "cu_seqlens-decreasing": (ValueError, "cu_seqlens", {"cu_seqlens": torch.tensor([0, 5, 4])}),
    "cu_seqlens-beyond": (ValueError, "cu_seqlens", {"cu_seqlens": torch.tensor([0, 10])}),
    "cu_seqlens-negative": (ValueError, "cu_seqlens", {"cu_seqlens": torch.tensor([-1, 4])}),
    "cu_seqlens-empty": (ValueError, "cu_seqlens", {"cu_seqlens": torch.tensor([], dtype=torch.int64)}),
    "cu_seqlens-rank": (ValueError, "cu_seqlens", {"cu_seqlens": torch.tensor([[0, 4]])}),
    "cu_seqlens-scalar": (ValueError, "cu_seqlens", {"cu_seqlens": torch.tensor(4)}),
    "cu_seqlens-float": (TypeError, "cu_seqlens", {"cu_seqlens": torch.tensor([0.0, 4.0])}),
}


@pytest.mark.parametrize(("error", "argument", "changes"), ERRORS.values(), ids=ERRORS)
def test_errors(error, argument, changes):
    assert_refuses(error, "cema", argument, lambda: mo.cema(**cema_case().tensors | changes))


@pytest.mark.parametrize(("error", "argument", "changes"), PACKED_ERRORS.values(), ids=PACKED_ERRORS)
def test_errors_of_packed_batches(error, argument, changes):
    assert_refuses(error, "cema", argument, lambda: mo.cema(**cema_case(B=1).tensors | changes))


def test_padded_and_packed_at_once_is_refused():
    with pytest.raises(ValueError, match="^cema: `lengths` must be None where `cu_seqlens` is given"):
        mo.cema(**cema_case(B=1).tensors, cu_seqlens=torch.tensor([0, 4]), lengths=torch.tensor([4]))


def test_the_error_names_expected_got_and_fix():
    with pytest.raises(ValueError) as caught:
        mo.cema(**cema_case().tensors | {"x": torch.zeros(2, 128)})
    assert str(caught.value) == "cema: `x` must have shape (B, L, D), got (2, 128); add a batch dimension."


def test_int32_offsets_are_taken():
    tensors = cema_case(B=1).tensors
    for cu_seqlens in (torch.tensor([0, 4, 9]), torch.tensor([0, 4, 9], dtype=torch.int32)):
        y = mo.cema(**tensors, cu_seqlens=cu_seqlens)
        assert_close(y, mo.reference.cema(**tensors, cu_seqlens=cu_seqlens), tolerance=1e-5)
