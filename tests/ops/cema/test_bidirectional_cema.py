"""bidirectional_cema against a convolution, reversal, refusals. See also test_ops.py."""

import pytest
import torch
from assertions import assert_close, assert_refuses
from backends import each_implementation, wide_every_device
from calls import forward
from cases import bidirectional_cema_case

import megalodon_ops as mo

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@each_implementation
def test_bidirectional_cema_is_a_convolution(implementation, backend):
    """Closed form: one kernel for lags >= 0, another for lags < 0."""
    L, D = 30, 3
    case = bidirectional_cema_case(B=2, L=L, D=D, N=5, dtype=torch.float64)
    x, p, q, gamma, omega = case.tensors.values()
    kernel = (gamma[..., None] * p[..., None] * q[..., None] ** torch.arange(L)).real.sum(1)  # (2 D, L)
    lag = torch.arange(L)[:, None] - torch.arange(L)  # of output t and input s
    before = torch.where(lag >= 0, kernel[:D, lag.clamp(min=0)], 0)
    after = torch.where(lag < 0, kernel[D:, (-lag - 1).clamp(min=0)], 0)
    expected = torch.einsum("dts,bsd->btd", before + after, x) + omega * x
    assert_close(forward(implementation.bidirectional_cema, case)["y"], expected, tolerance=1e-12)


@wide_every_device
def test_swapped_directions_give_the_reversed_sequence(backend):
    """Only the forward direction has a term at lag 0: the backward one weighs x_s at lag s - t by q^(s - t - 1).

    So gamma is multiplied by q for a direction that becomes the backward one, and divided by q for the other one;
    omega gets the old term at lag 0 and loses the new one.
    """
    D = 4
    case = bidirectional_cema_case(B=1, L=50, D=D, N=3, dtype=torch.float64)
    x, p, q, gamma, omega = case.tensors.values()
    forward_gamma, backward_gamma = gamma[D:] / q[D:], gamma[:D] * q[:D]
    swapped = [torch.cat(halves) for halves in ((p[D:], p[:D]), (q[D:], q[:D]), (forward_gamma, backward_gamma))]
    old_term, new_term = ((g * h).real.sum(1) for g, h in ((gamma[:D], p[:D]), (forward_gamma, p[D:])))
    expected = mo.bidirectional_cema(x.flip(1), *swapped, omega + old_term - new_term).flip(1)
    assert_close(mo.bidirectional_cema(x, p, q, gamma, omega), expected, tolerance=1e-10)


ERRORS = {
    "p-of-one-direction": (ValueError, "p", {"p": torch.rand(5, 4)}),
    "gamma-rank": (ValueError, "gamma", {"gamma": torch.rand(10).cfloat()}),
    "q-number": (TypeError, "q", {"q": 1.0}),
    "x-rank": (ValueError, "x", {"x": torch.rand(9, 5)}),
    "lengths-too-long": (ValueError, "lengths", {"lengths": torch.tensor([3, 10])}),
}


@pytest.mark.parametrize(("error", "argument", "changes"), ERRORS.values(), ids=ERRORS)
def test_errors(error, argument, changes):
    arguments = {**bidirectional_cema_case().tensors, **changes}
    assert_refuses(error, "bidirectional_cema", argument, lambda: mo.bidirectional_cema(**arguments))
