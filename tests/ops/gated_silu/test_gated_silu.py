"""gated_silu: values over all magnitudes, gradients, layouts, threads, fallback to torch."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from assertions import assert_as_accurate_as, assert_bit_equal, assert_refuses, every_case

from backends import each_isa, isa
from megalodon_ops import _C, reference
from megalodon_ops.ops.gated_silu import gated_silu as module
from megalodon_ops.ops.gated_silu.gated_silu import gated_silu, gated_silu_bwd, gated_silu_fwd

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SIZES = [0, 1, 7, 17, 4097, 8192, 20011]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def inputs(*shape, dtype=torch.float64, scale=3.0, count=3):
    gen = torch.Generator().manual_seed(0)
    return [(scale * torch.randn(shape, generator=gen, dtype=torch.float64)).to(dtype) for _ in range(count)]


def results(function, x, value, dy):
    leaves = [t.detach().requires_grad_() for t in (x, value) if t is not None]
    y = function(*leaves)
    return {"y": y.detach()} | dict(zip(("dx", "dvalue"), torch.autograd.grad(y, leaves, dy), strict=False))


@each_isa
@each_dtype
def test_results_and_gradients_match_the_reference(name, dtype):
    with every_case() as each:
        for size, gated in itertools.product(SIZES, (True, False)):
            with each(size, "gated" if gated else "alone"):
                x, value, dy = inputs(size, dtype=dtype)
                value = value if gated else None
                with isa(name):
                    found = results(gated_silu, x, value, dy)
                exact = results(reference.gated_silu, x.double(), value.double() if gated else None, dy.double())
                same = results(reference.gated_silu, x, value, dy)
                assert len(found) == (3 if gated else 2)
                for key, expected in exact.items():
                    floor = 4 if dtype in (torch.float32, torch.float64) else 0.5
                    assert found[key].dtype == dtype
                    assert_as_accurate_as(found[key], same[key], expected, factor=2, floor=floor, name=key)


@each_isa
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "alone"])
def test_large_outputs_have_the_bits_of_small_ones(name, gated):
    """Outputs of 32 MiB and more are stored past the caches."""
    few = 4099
    x, value, dy = inputs(few, dtype=torch.float32)
    small_inputs = (x, value if gated else None, dy)
    index = torch.arange(1 << 23) % few
    with isa(name):
        large = results(gated_silu, *(t if t is None else t[index] for t in small_inputs))
        small = results(gated_silu, *small_inputs)
    assert len(large) == (3 if gated else 2)
    assert all(torch.equal(large[key], small[key][index]) for key in large)


def spread_over_magnitudes(dtype):
    """Values of both signs and all exponents, more of them where the sigmoid bends."""
    gen = torch.Generator().manual_seed(0)
    info = torch.finfo(dtype)
    low, high = math.log2(info.tiny), math.log2(info.max)
    exponents = low + (high - low) * torch.rand(100_000, generator=gen, dtype=torch.float64)
    where_it_bends = torch.linspace(0, 100, 100_001, dtype=torch.float64)
    magnitudes = torch.cat((exponents.clamp(max=high - 1e-6).exp2(), where_it_bends))
    return torch.cat((magnitudes, -magnitudes)).clamp(info.min, info.max).to(dtype)


@each_isa
@each_dtype
def test_sigmoid_is_accurate_to_the_last_digits_at_every_magnitude(name, dtype):
    """silu = x sigmoid(x) adds one rounding to the 2.41 (float64: 2.45) ulp that cpp/common/vector_math.h states."""
    x = spread_over_magnitudes(dtype)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    with isa(name), torch.no_grad():
        found = gated_silu(x).double()
    wide = x.double()
    expected = torch.where(wide < 0, wide * (wide.exp() / (1 + wide.exp())), wide / (1 + (-wide).exp()))
    sigmoid_vanishes = torch.sigmoid(wide) < torch.finfo(real).tiny
    eps, least = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal
    # An ulp is at most eps of the value; below the smallest normal number the spacing is fixed.
    if dtype.itemsize == 2:
        relative = 3 * torch.finfo(real).eps + 0.5 * eps  # computed in float32, then rounded
    else:
        relative = (3 if dtype == torch.float32 else 6) * eps  # in float64, `expected` has an error, too
    bound = relative * expected.abs() + 0.5 * eps * least
    assert ((found - expected).abs() <= bound)[~sigmoid_vanishes].all()
    assert (found[sigmoid_vanishes].abs() <= torch.finfo(real).tiny * 1024).all()


@each_isa
@each_dtype
def test_special_values(name, dtype):
    x = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, -1e4, 1e4], dtype=dtype)
    dy = torch.ones_like(x)
    with isa(name):
        y = gated_silu_fwd(x, None)
        dx, _ = gated_silu_bwd(dy, x, None)
    torch.testing.assert_close(y, F.silu(x), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(y.signbit()[3:], F.silu(x).signbit()[3:])
    assert dx[2].isnan() and dx[3:].tolist() == [0.5, 0.5, 0.0, 1.0]


def test_gradients_equal_the_explicit_backward():
    x, value, dy = inputs(3, 50)
    found = results(reference.gated_silu, x, value, dy)
    dx, dvalue = reference.gated_silu_bwd(dy, x, value)
    torch.testing.assert_close((dx, dvalue), (found["dx"], found["dvalue"]), rtol=1e-13, atol=1e-13)
    ungated, nothing = reference.gated_silu_bwd(dy, x)
    torch.testing.assert_close(ungated, results(reference.gated_silu, x, None, dy)["dx"], rtol=1e-13, atol=1e-13)
    assert nothing is None


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "alone"])
def test_gradcheck_and_no_second_derivatives(gated):
    leaves = [t.requires_grad_() for t in inputs(2, 9, count=2 if gated else 1)]
    assert torch.autograd.gradcheck(gated_silu, leaves)
    (dx, *_) = torch.autograd.grad(gated_silu(*leaves).square().sum(), leaves, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives are not supported"):
        dx.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_and_strides_change_nothing(dtype, two_threads):
    x, value, dy = inputs(70, 601, dtype=dtype)
    expected = results(gated_silu, x, value, dy)
    spread = [torch.stack((t, t), -1)[..., 0] for t in (x, value, dy)]
    turned = [t.t().contiguous().t() for t in (x, value, dy)]
    torch.set_num_threads(1)
    for arranged in ((x, value, dy), spread, turned):
        assert_bit_equal(results(gated_silu, *arranged), expected)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's own use
def test_opcheck_and_compile():
    x, value, dy = inputs(2, 3, 5, dtype=torch.float32)
    for gate in (value, None):
        torch.library.opcheck(gated_silu_fwd, (x.requires_grad_(), gate))
        torch.library.opcheck(gated_silu_bwd, (dy, x.detach(), gate))
    torch.use_deterministic_algorithms(False)
    torch.compiler.reset()
    compiled = torch.compile(gated_silu, fullgraph=True, backend="aot_eager")
    assert_bit_equal(results(compiled, x, value, dy), results(gated_silu, x, value, dy))


def test_fallback_to_torch(monkeypatch):
    x, value = inputs(2, 5, dtype=torch.float32, count=2)
    expected = gated_silu(x, value)
    assert gated_silu(x.to("meta"), value.to("meta")).shape == x.shape
    assert gated_silu(x, value.double()).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert gated_silu(x, value).dtype == torch.float32
    monkeypatch.setattr(module, "has_cpu_kernel", lambda x: False)
    torch.testing.assert_close(gated_silu(x, value), expected)
    torch.testing.assert_close(gated_silu(x), F.silu(x))


def test_errors():
    x, value = inputs(2, 5, dtype=torch.float32, count=2)
    assert_refuses(ValueError, "gated_silu", "value", lambda: gated_silu(x, value[:1]))
    assert_refuses(ValueError, "gated_silu", "value", lambda: _C.gated_silu_fwd(x, value.double(), x.clone()))
    assert_refuses(ValueError, "gated_silu", "y", lambda: _C.gated_silu_fwd(x, value, x[:1].clone()))
    assert_refuses(ValueError, "gated_silu", "dvalue", lambda: _C.gated_silu_bwd(x, value, x, x.clone(), None))
    assert_refuses(TypeError, "gated_silu", "x", lambda: _C.gated_silu_fwd(x.int(), None, x.int()))
