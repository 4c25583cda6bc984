"""linear: that every way of computing it is F.linear up to rounding, when each is taken, and the switch."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map

from backends import ISAS, isa
from megalodon_ops import _C
from megalodon_ops import linear as module
from megalodon_ops.linear import linear, linear_few_rows, linear_fwd, put_product_
from programs import run_python

needs_amx = pytest.mark.skipif("v4_amx" not in ISAS, reason="this processor has no AMX")


@pytest.fixture(params=[pytest.param("v4_amx", marks=needs_amx), "others"])
def large(request, monkeypatch):
    """Every product with gradients takes the kernel for many rows, however small it is."""
    for worth in ("_WORTH", "_WORTH_OF_DOTS", "_WORTH_WHERE_SLOW"):
        monkeypatch.setattr(module, worth, 1)
    monkeypatch.setattr(module, "_MANY_ROWS", dict.fromkeys(module._MANY_ROWS, 5))
    monkeypatch.setattr(module, "USES_MANY_ROWS", True)
    monkeypatch.setattr(module, "USES_SHORT_MANY_ROWS", request.param != "v4_amx")
    monkeypatch.setattr(module, "USES_AMX", request.param == "v4_amx")
    with isa(request.param if request.param in ISAS else [name for name in ISAS if name != "v4_amx"][-1]):
        yield


def inputs(*shape, I=24, O=40, bias=True):  # noqa: E741
    gen = torch.Generator().manual_seed(0)
    x, weight = torch.randn(*shape, I, generator=gen), torch.randn(O, I, generator=gen)
    return [t.requires_grad_() for t in ((x, weight, torch.randn(O, generator=gen)) if bias else (x, weight))]


def assert_like_exact(tensors, **tolerances):
    """linear and its gradients against F.linear in float64; returns what was found."""
    exact = [t.detach().double().requires_grad_() for t in tensors]
    y, expected = linear(*tensors), F.linear(*exact)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    grads = torch.autograd.grad(y, tensors, dy)
    for found, wanted in zip((y, *grads), (expected, *torch.autograd.grad(expected, exact, dy.double())), strict=True):
        assert found.dtype == tensors[0].dtype and found.shape == wanted.shape
        torch.testing.assert_close(found.double(), wanted, **tolerances)
    return y, grads


@pytest.mark.parametrize("shape", [(1,), (7,), (2, 33), (2, 3, 5), (0, 4)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients(shape, bias, large):
    assert_like_exact(inputs(*shape, bias=bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("T", [3, 33])
def test_short_types_with_gradients(large, dtype, T):
    tensors = [t.detach().to(dtype).requires_grad_() for t in inputs(T)]
    y, _ = assert_like_exact(tensors, rtol=torch.finfo(dtype).eps, atol=1e-4)
    taken = type(y.grad_fn) is type(linear_fwd(*tensors).grad_fn)
    assert taken == (module.USES_SHORT_MANY_ROWS or dtype == torch.bfloat16)  # with AMX for the copy


@pytest.mark.parametrize("bias", [True, False])
def test_autocast(large, bias):
    tensors = inputs(33, bias=bias)
    narrow = [t.detach().bfloat16().requires_grad_() for t in tensors]
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(*tensors)
    expected = linear(*narrow)
    assert type(y.grad_fn) is type(expected.grad_fn) and torch.equal(y, expected)
    results = (y, tensors), (expected, narrow)
    grads, wanted = (torch.autograd.grad(out.float().square().sum(), leaves) for out, leaves in results)
    for grad, other in zip(grads, wanted, strict=True):
        assert grad.dtype == torch.float32 and torch.equal(grad, other.float())


@pytest.mark.parametrize(("T", "O"), [(33, 20), (33, 200), (300, 17)])  # one matrix is copied or the other
def test_bfloat16_gradients_by_torch(monkeypatch, T, O):  # noqa: E741
    monkeypatch.setattr(module, "_WORTH", 1)
    monkeypatch.setattr(module, "USES_AMX", True)
    monkeypatch.setattr(module, "USES_SHORT_MANY_ROWS", False)
    monkeypatch.setattr(module, "_HAS_BFLOAT16", True)
    tensors = [t.detach().bfloat16().requires_grad_() for t in inputs(T, O=O)]
    y, grads = assert_like_exact(tensors, rtol=2**-8, atol=1e-4)
    assert type(y.grad_fn) is type(linear_fwd(*tensors).grad_fn)
    assert all(grad.is_contiguous() for grad in grads)


def test_strided_inputs_and_frozen_weights(large):
    x, weight = torch.randn(6, 10).t()[:, ::2].requires_grad_(), torch.randn(3, 4).t()
    y = linear(x, weight)
    torch.testing.assert_close(y, F.linear(x, weight))
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx, torch.ones(10, 4) @ weight)


def test_second_derivatives(large):
    tensors = inputs(5)
    for function in (linear, F.linear):
        (dx,) = torch.autograd.grad(function(*tensors).pow(3).sum(), tensors[0], create_graph=True)
        second = torch.autograd.grad(dx.pow(2).sum(), tensors)
        if function is linear:
            found = second
    for a, b in zip(found, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-2)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own use
@pytest.mark.parametrize("gradients", [True, False])
def test_forward_mode(large, gradients):
    x, *others = inputs(5)
    tangent = torch.randn_like(x)
    with torch.set_grad_enabled(gradients), forward_ad.dual_level():
        y = linear(forward_ad.make_dual(x.detach(), tangent), *others)
        found = forward_ad.unpack_dual(y).tangent
    torch.testing.assert_close(found, F.linear(tangent, others[0]))


def test_opcheck(large):
    torch.library.opcheck(linear_fwd, inputs(2, 5))


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 5, 8, 23])
@pytest.mark.parametrize(("I", "O"), [(1, 1), (7, 0), (7, 3), (64, 100), (300, 61), (1031, 5)])
def test_few_rows(name, dtype, rows, I, O):  # noqa: E741
    x, weight, bias = (t.detach().to(dtype) for t in inputs(rows, I=I, O=O))
    expected = F.linear(x.double(), weight.double(), bias.double())
    size = F.linear(x.double().abs(), weight.double().abs(), bias.double().abs())  # of the terms
    sums = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    with isa(name), torch.no_grad():
        found = linear_few_rows(x, weight, bias)
        without = linear_few_rows(x, weight, None)
    assert found.dtype == dtype
    bound = 4 * sums * size + torch.finfo(dtype).eps * expected.abs()
    assert ((found.double() - expected).abs() <= bound).all()
    assert ((without.double() - (expected - bias.double())).abs() <= bound + torch.finfo(dtype).eps * size).all()


@pytest.mark.parametrize("rows", [1, 2, 3, 8])
def test_few_rows_do_not_depend_on_threads_or_strides(rows, two_threads):
    x, weight, bias = (t.detach() for t in inputs(1, rows, I=300, O=1037))
    expected = linear_few_rows(x, weight, bias)
    for threads in (1, 3, 5):
        torch.set_num_threads(threads)
        assert torch.equal(linear_few_rows(x, weight, bias), expected)
    spread = [torch.stack((t, t), -1)[..., 0] for t in (x, weight, bias)]
    assert torch.equal(linear_few_rows(*spread), expected)


def test_opcheck_of_few_rows():
    x, weight, bias = (t.detach() for t in inputs(2, 3))
    torch.library.opcheck(linear_few_rows, (x, weight, bias))
    torch.library.opcheck(linear_few_rows, (x, weight, None))


def many_rows(name, x, weight, bias=None, *, transposed=(False, False), add_to=None):
    """The kernel of an instruction set, on matrices that lie transposed in memory."""
    y = x.new_full((x.shape[0], weight.shape[0]), torch.nan) if add_to is None else add_to.clone()
    x, weight = (m.t().contiguous() if t else m for m, t in zip((x, weight), transposed, strict=True))
    with isa(name):
        _C.linear_many_rows(x, transposed[0], weight, transposed[1], bias, y, add_to is not None)
    return y


amx = functools.partial(many_rows, "v4_amx")


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("transposed", [(False, False), (False, True), (True, False), (True, True)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("T", "I", "O"),
    [(1, 1, 1), (16, 32, 16), (17, 33, 31), (300, 70, 40), (260, 40, 200), (33, 1100, 129), (40, 600, 1),
     (30, 20, 2120), (35, 2601, 50), (1160, 2565, 5), (5, 0, 3), (0, 4, 3), (4, 4, 0)],  # more than a block of each
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_many_rows(name, T, I, O, bias, transposed, dtype):  # noqa: E741
    if name == "v4_amx" and dtype != torch.float32:
        pytest.skip("torch's own")
    x, weight, offset = (t.detach().to(dtype) for t in inputs(T, I=I, O=O))
    offset = offset if bias else None
    y, expected = many_rows(name, x, weight, offset, transposed=transposed), F.linear(x.double(), weight.double())
    size = F.linear(x.double().abs(), weight.double().abs())  # of the terms
    if bias:
        expected, size = expected + offset.double(), size + offset.double().abs()
    bound = (2 if name == "v4_amx" else 3) * torch.finfo(torch.float32).eps * size  # seen: up to 2.2
    rounding = 0 if dtype == torch.float32 else torch.finfo(dtype).eps
    assert ((y.double() - expected).abs() <= bound + rounding * expected.abs()).all()
    for sums in {dtype, torch.float32}:
        ones = torch.ones_like(y, dtype=sums)
        summed = many_rows(name, x, weight, offset, transposed=transposed, add_to=ones)
        rounding = torch.finfo(sums).eps
        assert summed.dtype == sums
        assert ((summed.double() - 1 - expected).abs() <= bound + rounding * (1 + expected.abs())).all()


def test_many_rows_refuse_other_types():
    x = torch.randn(3, 4)
    for tensors, message in [
        ((x.double(), x.double(), x.double()), "float32, bfloat16 or float16"),
        ((x, x.bfloat16(), x), "as `x`"),
        ((x.bfloat16(), x.bfloat16(), x.half()), "as `x`, or float32"),
    ]:
        with isa("v2"), pytest.raises((TypeError, ValueError), match=message):
            many_rows("v2", *tensors[:2], add_to=tensors[2])


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_put_product(large, dtype, add):
    x, weight = (torch.randn(20, n).to(dtype) for n in (70, 30))
    y = torch.randn(70, 30)
    rounds = dtype != torch.float32 and not module.USES_SHORT_MANY_ROWS  # the product before it is added
    factors = (x, weight) if rounds else (x.double(), weight.double())
    expected = (add * y + F.linear(*(t.t() for t in factors))).float()
    y = y if add else torch.full_like(y, torch.nan)
    with torch.no_grad():
        put_product_(y, x.t(), weight.t(), 32, add=add)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("name", ISAS)
def test_float32_sums_are_made_in_runs(name, transposed):
    gen = torch.Generator().manual_seed(0)
    x, weight = torch.randn(96, 2048, generator=gen), torch.randn(64, 2048, generator=gen)
    one_after_another = torch.zeros(96, 64)
    for column, other in zip(x.T, weight.T, strict=True):
        one_after_another += column[:, None] * other
    exact = F.linear(x.double(), weight.double())
    y = many_rows(name, x, weight, transposed=(transposed, transposed))
    error, most = ((sums.double() - exact).square().mean().sqrt() for sums in (y, one_after_another))
    assert error < 0.45 * most


@needs_amx
@pytest.mark.parametrize("depth", [64, 512, 2048])
def test_amx_is_as_accurate_as_torch(depth):
    gen = torch.Generator().manual_seed(0)
    x, weight = torch.randn(200, depth, generator=gen), torch.randn(100, depth, generator=gen)
    exact = F.linear(x.double(), weight.double())
    error, of_torch = ((y.double() - exact).square().mean().sqrt() for y in (amx(x, weight), F.linear(x, weight)))
    assert error <= of_torch
    # The mantissas of which most is left out: the first part is rounded by half a unit, the others are all ones.
    worst = torch.full((1, depth), 1 + 2**-8 - 2**-23)
    y, exact = amx(worst, worst).double(), depth * worst[0, 0].double() ** 2
    assert abs(y - exact) <= 1.5 * 2**-22 * exact
    assert abs(amx(worst, -worst) + y) == 0


@needs_amx
def test_amx_takes_all_magnitudes():
    x, weight = (t.detach() for t in inputs(20, bias=False))
    expected = amx(x, weight)
    for power in (-90, -60, 60, 90):
        assert torch.equal(amx(x * 2.0**power, weight * 2.0**-power), expected)
    large = torch.full((1, 3), 3.38e38)
    torch.testing.assert_close(amx(large, torch.eye(3)), large)
    x[3, 4] = torch.inf
    x[5, 6] = torch.nan
    assert (amx(x, weight).isnan().any(1) == torch.isin(torch.arange(20), torch.tensor([3, 5]))).all()


@pytest.mark.parametrize("name", ISAS)
def test_many_rows_do_not_depend_on_threads(name, two_threads):
    x, weight, bias = (t.detach() for t in inputs(300, I=530, O=700))
    expected = many_rows(name, x, weight, bias)
    for threads in (1, 3, 7):
        torch.set_num_threads(threads)
        assert torch.equal(many_rows(name, x, weight, bias), expected)


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("shape", [(1, 1), (16, 64), (17, 65), (3, 200), (130, 5), (64, 0), (448, 100)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_transposed_copy(name, shape, dtype):
    x = torch.randn(shape).to(dtype)
    for offset in (0, 1):  # of y from where vectors begin
        y = torch.full((offset + x.numel(),), torch.nan, dtype=dtype)[offset:].view(shape[::-1])
        with isa(name):
            _C.transpose(x, y)
        assert torch.equal(y, x.t())


def taken(monkeypatch) -> list[str]:
    """The ops that are called from now on, by name."""
    calls: list[str] = []
    for name in ("linear_few_rows", "linear_fwd"):
        monkeypatch.setattr(module, name, lambda *args, name=name: calls.append(name) or F.linear(*args))
    return calls


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("rows", [1, 32, 33])
@pytest.mark.parametrize("uses_many_rows", [False, True])
def test_which_way_is_taken(monkeypatch, uses_many_rows, rows, gradients):
    monkeypatch.setattr(module, "USES_MANY_ROWS", uses_many_rows)
    monkeypatch.setattr(module, "USES_AMX", False)
    calls, x, weight = taken(monkeypatch), torch.randn(rows, 24), torch.randn(40, 24)
    with torch.set_grad_enabled(gradients):
        linear(x, weight)
        assert calls == ([] if gradients else ["linear_few_rows"] if rows <= 32 else ["linear_fwd"] * uses_many_rows)
        calls.clear()
        monkeypatch.setattr(module, "_WORTH", rows * 24 * 40)
        linear(x, weight)
        assert not gradients or calls == ["linear_fwd"] * uses_many_rows
        calls.clear()
        for way in ("USES_KERNELS", "USES_MANY_ROWS"):
            monkeypatch.setattr(module, way, False)
        linear(x, weight)
        assert not calls


@torch.no_grad()
def test_which_kernel_is_taken(monkeypatch):
    launched: list[str] = []
    monkeypatch.setattr(module, "launch", lambda name, *args: launched.append(name) or getattr(_C, name)(*args))
    monkeypatch.setattr(module, "USES_MANY_ROWS", True)
    monkeypatch.setattr(module, "USES_AMX", False)
    monkeypatch.setitem(module._MANY_ROWS, torch.float32, 129)
    x, weight = torch.randn(3, 43, 24), torch.randn(40, 24)
    transposed = weight.t().contiguous().t()
    for x_, weight_, name in [(x, weight, "many"), (x[:2], weight, "few"), (x[:2], transposed, "many")]:
        torch.testing.assert_close(linear_fwd(x_, weight_, None), F.linear(x_, weight_))
        assert launched.pop() == f"linear_{name}_rows"


@pytest.mark.parametrize("gradients", [False, True])
def test_when_amx_is_taken(monkeypatch, gradients):
    monkeypatch.setattr(module, "USES_MANY_ROWS", True)
    monkeypatch.setattr(module, "USES_AMX", True)
    monkeypatch.setattr(module, "_WORTH", 16 * 24 * 40)
    calls, weight = taken(monkeypatch), torch.randn(40, 24)
    with torch.set_grad_enabled(gradients):
        linear(torch.randn(15, 24), weight)
        assert calls == ([] if gradients else ["linear_few_rows"])
        calls.clear()
        linear(torch.randn(2, 8, 24), weight)
        assert calls == ["linear_fwd"]
        linear(torch.randn(16, 24), weight[:39])
        assert calls == ["linear_fwd"] * (1 if gradients else 2)
        linear(torch.randn(16, 0), weight[:, :0])
        assert len(calls) == (1 if gradients else 2)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dots", [False, True])
def test_when_autocast_without_gradients_takes_the_kernel(monkeypatch, dtype, dots):
    monkeypatch.setattr(module, "USES_SHORT_MANY_ROWS", True)
    monkeypatch.setattr(module, "_HAS_BFLOAT16", dots)
    calls, x, weight = taken(monkeypatch), torch.randn(64, 24), torch.randn(40, 24)
    with torch.autocast("cpu", dtype):
        assert linear(x, weight).dtype == linear(x[:63], weight).dtype == dtype
    assert calls == ["linear_fwd"] * (dtype == torch.float16 or not dots)


@torch.no_grad()
def test_what_torch_is_left_with(monkeypatch):
    monkeypatch.setattr(module, "USES_MANY_ROWS", True)
    monkeypatch.setattr(module, "USES_SHORT_MANY_ROWS", False)
    calls, x, weight = taken(monkeypatch), torch.randn(33, 24), torch.randn(40, 24)
    for dtype in (torch.bfloat16, torch.float64):
        assert linear(x.to(dtype), weight.to(dtype)).dtype == dtype
    assert linear(x[:0], weight).shape == (0, 40)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
        assert linear(x[:1], weight).dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="same dtype|dtype"):
        linear(x[:1], weight.double())
    assert not calls


class Doubled(torch.Tensor):
    """Twice what it wraps, as a quantised weight is something else than what it stores."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        def unwrapped(a):
            return 2 * a.inner if isinstance(a, cls) else a

        return func(*tree_map(unwrapped, args), **tree_map(unwrapped, kwargs or {}))


@pytest.mark.parametrize("rows", [1, 200])
@pytest.mark.parametrize("gradients", [True, False])
def test_tensors_of_other_types_are_left_to_torch(rows, gradients):
    x, weight = torch.randn(rows, 24), torch.randn(40, 24)
    doubled = torch.Tensor._make_wrapper_subclass(Doubled, weight.shape, dtype=weight.dtype)
    doubled.inner = weight
    with torch.set_grad_enabled(gradients):
        torch.testing.assert_close(linear(x, doubled), F.linear(x, 2 * weight))


@pytest.mark.parametrize("rows", [3, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_no_outputs(rows, dtype):
    assert linear(torch.ones(rows, 3, dtype=dtype), torch.ones(0, 3, dtype=dtype)).shape == (rows, 0)


def test_variable_leaves_all_to_torch():
    ways = "m.USES_KERNELS, m.USES_AMX, m.USES_MANY_ROWS, m.USES_SHORT_MANY_ROWS"
    done = run_python(f"import megalodon_ops.linear as m; print({ways})", MEGALODON_OPS_LINEAR="torch")
    assert done.stdout.split() == ["False"] * 4, done.stderr


def test_a_wrong_choice_is_refused():
    done = run_python("import megalodon_ops", MEGALODON_OPS_LINEAR="blas")
    assert "ImportError: megalodon_ops: MEGALODON_OPS_LINEAR must be auto or torch, got blas" in done.stderr


@pytest.mark.parametrize(("vendor", "mkl", "expected"), [("GenuineIntel", True, False), ("AuthenticAMD", True, True),
                                                         ("AuthenticAMD", False, False)])  # fmt: skip
def test_mkl_is_slow_on_other_makers_processors(monkeypatch, tmp_path, vendor, mkl, expected):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"vendor_id : {vendor}\n")
    monkeypatch.setattr(module, "_CPUINFO", cpuinfo)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    assert module._mkl_is_slow() == expected
