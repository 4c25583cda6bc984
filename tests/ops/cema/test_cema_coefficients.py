"""cema_coefficients: values, gradients, every angle, numbers of modes and channels, threads, fallback to torch."""

import itertools
import math

import pytest
import torch
from assertions import assert_as_accurate_as, assert_bit_equal, assert_refuses, every_case

from backends import each_isa, isa
from megalodon_ops import _C, reference
from megalodon_ops.ops.cema import cema_coefficients as module
from megalodon_ops.ops.cema.cema_coefficients import cema_coefficients, cema_coefficients_bwd, cema_coefficients_fwd

DTYPES = [torch.float32, torch.float64]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def inputs(channels, modes, dtype=torch.float64):
    """alpha, delta, theta and gamma, then gradients of p, q and the scaled gamma."""
    gen = torch.Generator().manual_seed(0)
    shapes = ((channels, modes, 1), (channels, modes, 1), (channels, 1, 1), (channels, modes, 2))
    parameters = [3 * torch.randn(shape, generator=gen, dtype=torch.float64).to(dtype) for shape in shapes]
    dp, dq, dscaled = torch.randn((3, channels, modes, 2), generator=gen, dtype=torch.float64).to(dtype)
    return parameters, [dp[..., 0].contiguous(), torch.view_as_complex(dq), torch.view_as_complex(dscaled)]


def results(function, parameters, grads):
    leaves = [t.detach().requires_grad_() for t in parameters]
    outputs = function(*leaves)
    found = torch.autograd.grad(outputs, leaves, grads)
    names = ("p", "q", "scaled", "dalpha", "ddelta", "dtheta", "dgamma")
    return dict(zip(names, (*(o.detach() for o in outputs), *found), strict=True))


def in_double(tensors):
    return [t.to(torch.complex128 if t.is_complex() else torch.float64) for t in tensors]


def terms(parameters, grads):
    """The largest terms of each gradient's sum: |dp| and |dq| times their factors."""
    p, delta, turn = (torch.sigmoid(t[..., 0]) for t in parameters[:3])
    dp, dq, _ = (grad.abs() for grad in grads)
    modes = p.shape[1]
    dturn = 2 * math.pi / modes * (dq * (1 - p * delta) * torch.arange(1, modes + 1)).sum(1, keepdim=True)
    sizes = {
        "dalpha": (dp + dq * delta) * p * (1 - p),
        "ddelta": dq * p * delta * (1 - delta),
        "dtheta": turn * (1 - turn) * dturn,
    }
    return {name: size.max().item() for name, size in sizes.items() if size.numel()}


def check(channels, modes, dtype):
    parameters, grads = inputs(channels, modes, dtype)
    found = results(cema_coefficients, parameters, grads)
    exact = results(reference.cema_coefficients, in_double(parameters), in_double(grads))
    same = results(reference.cema_coefficients, parameters, grads)
    largest = terms(parameters, grads)
    # The float64 reference has an error, too: a whole turn rounds by up to 2 pi eps. The largest error seen was 10.3.
    floor = 14 if dtype == torch.float64 else 2
    for key, value in found.items():
        size = largest.get(key, 0.0)
        assert_as_accurate_as(value, same[key], exact[key], factor=2, floor=floor, terms=size, name=key)


@each_isa
@each_dtype
def test_results_and_gradients_match_the_reference(name, dtype):
    with every_case() as each, isa(name):
        for channels, modes in itertools.product([0, 1, 5, 64, 301], [1, 2, 3, 8, 16, 17, 32, 33, 70]):
            with each(channels, modes):
                check(channels, modes, dtype)


@each_isa
@each_dtype
def test_the_phase_is_accurate_at_every_angle(name, dtype):
    """Modes of one channel at equal angles, almost without decay: q covers the unit circle."""
    modes = 20_000
    alpha = torch.full((1, modes, 1), -300.0, dtype=dtype)
    theta = torch.full((1, 1, 1), 300.0, dtype=dtype)
    with isa(name):
        _, q, _ = cema_coefficients(alpha, alpha, theta, torch.zeros(1, modes, 2, dtype=dtype))
    angle = 2 * math.pi * torch.arange(1, modes + 1, dtype=torch.float64) / modes
    roundings = 4 if dtype == torch.float64 else 1  # of the angle; in float64, those of this test count, too
    rounded = roundings * torch.finfo(dtype).eps / 2 * angle
    error = (q[0].to(torch.complex128) - torch.polar(torch.ones_like(angle), angle)).abs()
    bound = rounded + torch.finfo(dtype).eps
    assert (error <= bound).all(), f"{(error / bound).max()}"


@each_isa
@each_dtype
def test_extreme_parameters(name, dtype):
    """Saturated sigmoids: weights of exactly 0 and 1, no rotation and a whole turn; NaN does not spread."""
    big = torch.tensor([-math.inf, -1e4, 1e4, math.inf, math.nan], dtype=dtype)
    alpha, zeros = big.reshape(1, 5, 1), torch.zeros(1, 5, 1, dtype=dtype)
    gamma = torch.ones(1, 5, 2, dtype=dtype)
    with isa(name):
        p, q, _ = cema_coefficients(alpha, zeros, torch.full((1, 1, 1), -math.inf, dtype=dtype), gamma)
        _, turned, _ = cema_coefficients(alpha, zeros, torch.full((1, 1, 1), math.inf, dtype=dtype), gamma)
    assert p[0, :4].tolist() == [0, 0, 1, 1] and p[0, 4].isnan()
    assert q[0, :4].tolist() == [1, 1, 0.5, 0.5] and q[0, 4].isnan()
    assert turned[0, 3].abs().item() == pytest.approx(0.5) and turned[0, 4].isnan()


def test_gradients_equal_the_explicit_backward():
    parameters, grads = inputs(7, 5)
    expected = results(reference.cema_coefficients, parameters, grads)
    found = reference.cema_coefficients_bwd(*grads, *parameters[:3])
    for name, grad in zip(("dalpha", "ddelta", "dtheta", "dgamma"), found, strict=True):
        torch.testing.assert_close(grad, expected[name], rtol=1e-13, atol=1e-13)


def test_gradcheck_partial_use_and_no_second_derivatives():
    parameters, _ = inputs(2, 3)
    leaves = [t.requires_grad_() for t in parameters]
    assert torch.autograd.gradcheck(cema_coefficients, leaves)
    expected = torch.autograd.grad(reference.cema_coefficients(*leaves)[1].real.sum(), leaves[:3])
    torch.testing.assert_close(torch.autograd.grad(cema_coefficients(*leaves)[1].real.sum(), leaves[:3]), expected)
    p, _, _ = cema_coefficients(*leaves)
    (dalpha,) = torch.autograd.grad(p.square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives are not supported"):
        dalpha.sum().backward()


@each_dtype
def test_threads_and_strides_change_nothing(dtype, two_threads):
    parameters, grads = inputs(1100, 16, dtype)
    expected = results(cema_coefficients, parameters, grads)
    spread = [torch.stack((t, t), 0).movedim(0, -1)[..., 0] for t in (*parameters, *grads)]
    torch.set_num_threads(1)
    assert_bit_equal(results(cema_coefficients, parameters, grads), expected)
    assert_bit_equal(results(cema_coefficients, spread[:4], spread[4:]), expected)


@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex operators:UserWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's own use
def test_opcheck_and_compile():
    parameters, grads = inputs(3, 4, torch.float32)
    torch.library.opcheck(cema_coefficients_fwd, tuple(t.clone().requires_grad_() for t in parameters))
    torch.library.opcheck(cema_coefficients_bwd, (*grads, *parameters[:3]))
    torch.use_deterministic_algorithms(False)
    torch.compiler.reset()
    compiled = torch.compile(cema_coefficients, fullgraph=True)
    assert_bit_equal(results(compiled, parameters, grads), results(cema_coefficients, parameters, grads))


def test_fallback_to_torch(monkeypatch):
    parameters, grads = inputs(3, 4, torch.float32)
    expected = results(cema_coefficients, parameters, grads)
    p, q, _ = cema_coefficients(*(t.to("meta") for t in parameters))
    assert p.shape == q.shape == (3, 4) and q.dtype == torch.complex64
    monkeypatch.setattr(module, "has_cpu_kernel", lambda x: False)
    torch.testing.assert_close(results(cema_coefficients, parameters, grads), expected)


def test_errors():
    (alpha, delta, theta, gamma), _ = inputs(3, 4, torch.float32)
    refuses = lambda error, name, *args: assert_refuses(  # noqa: E731
        error, "cema_coefficients", name, lambda: cema_coefficients(*args)
    )
    refuses(ValueError, "alpha", alpha[..., 0], delta, theta, gamma)
    refuses(ValueError, "alpha", alpha.expand(3, 4, 2), delta, theta, gamma)
    refuses(ValueError, "delta", alpha, delta[:2], theta, gamma)
    refuses(ValueError, "theta", alpha, delta, theta[:2], gamma)
    refuses(TypeError, "theta", alpha, delta, theta.double(), gamma)
    refuses(ValueError, "gamma", alpha, delta, theta, gamma[..., :1])
    for dtype in (torch.bfloat16, torch.int64):
        refuses(TypeError, "alpha", *(t.to(dtype) for t in (alpha, delta, theta, gamma)))
    p, q = torch.zeros(3, 4), torch.zeros(3, 4, dtype=torch.complex64)
    launch = lambda q: _C.cema_coefficients_fwd(alpha, delta, theta, gamma, p, q, q)  # noqa: E731
    assert_refuses(TypeError, "cema_coefficients", "q", lambda: launch(p))
    assert_refuses(ValueError, "cema_coefficients", "q", lambda: launch(q[:2]))
