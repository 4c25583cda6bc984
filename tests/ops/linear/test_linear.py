"""linear: all implementations equal F.linear up to rounding. test_linear_choice.py tests the choice of one."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from assertions import every_case
from torch.autograd import forward_ad

from backends import ISAS, each_isa, each_isa_with_amx, isa, needs_amx
from megalodon_ops import _C
from megalodon_ops.ops.linear import linear as module
from megalodon_ops.ops.linear.linear import KernelChoice, linear, linear_few_rows
from megalodon_ops.ops.linear.linear import linear_fwd, put_product_, put_products_

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(params=[pytest.param("v4_amx", marks=needs_amx), "others"])
def large(request, monkeypatch):
    """Products with gradients of all sizes take the kernel for many rows; with AMX, torch computes those of 16 bits."""
    with_amx = request.param == "v4_amx"
    always = KernelChoice(few_rows_to=4, many_rows_from=5, training_from=1)
    short = KernelChoice(few_rows_to=4, many_rows_from=None, training_from=1) if with_amx else always
    monkeypatch.setattr(module, "CHOICES", {torch.float32: always, torch.bfloat16: short, torch.float16: short})
    with isa("v4_amx" if with_amx else [name for name in ISAS if name != "v4_amx"][-1]):
        yield


def inputs(*shape, I=24, O=40, bias=True):  # noqa: E741
    gen = torch.Generator().manual_seed(0)
    shapes = [(*shape, I), (O, I), (O,)] if bias else [(*shape, I), (O, I)]
    return [torch.randn(shape, generator=gen).requires_grad_() for shape in shapes]


def assert_like_exact(tensors, **tolerances):
    """Compare linear and its gradients with F.linear in float64; return them."""
    exact = [t.detach().double().requires_grad_() for t in tensors]
    y, expected = linear(*tensors), F.linear(*exact)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    grads = torch.autograd.grad(y, tensors, dy)
    expected_grads = torch.autograd.grad(expected, exact, dy.double())
    for found, wanted in zip((y, *grads), (expected, *expected_grads), strict=True):
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
    assert type(y.grad_fn) is type(linear_fwd(*tensors).grad_fn)


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


@pytest.mark.parametrize(("T", "O"), [(33, 20), (33, 200), (300, 17)])
def test_bfloat16_gradients_by_torch(monkeypatch, T, O):  # noqa: E741
    choice = KernelChoice(few_rows_to=8, many_rows_from=None, training_from=1)
    monkeypatch.setitem(module.CHOICES, torch.bfloat16, choice)
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

    def second(function):
        (dx,) = torch.autograd.grad(function(*tensors).pow(3).sum(), tensors[0], create_graph=True)
        return torch.autograd.grad(dx.pow(2).sum(), tensors)

    torch.testing.assert_close(second(linear), second(F.linear), rtol=1e-4, atol=1e-2)


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


@each_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_rows(name, dtype):
    eps_of_sums = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    sizes = [(1, 1), (7, 0), (7, 3), (64, 100), (300, 61), (1031, 5)]
    with every_case() as each, isa(name), torch.no_grad():
        for rows, (I, O) in itertools.product([1, 2, 5, 8, 23], sizes):  # noqa: E741
            with each(rows, I, O):
                x, weight, bias = (t.detach().to(dtype) for t in inputs(rows, I=I, O=O))
                expected = F.linear(x.double(), weight.double(), bias.double())
                size = F.linear(x.double().abs(), weight.double().abs(), bias.double().abs())  # of the terms
                found = linear_few_rows(x, weight, bias)
                without = linear_few_rows(x, weight, None)
                assert found.dtype == dtype
                bound = 4 * eps_of_sums * size + torch.finfo(dtype).eps * expected.abs()
                assert ((found.double() - expected).abs() <= bound).all()
                bound += torch.finfo(dtype).eps * size
                assert ((without.double() - (expected - bias.double())).abs() <= bound).all()


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
    """Run the kernel of an instruction set; `transposed` says which matrices are stored transposed."""
    y = x.new_full((x.shape[0], weight.shape[0]), torch.nan) if add_to is None else add_to.clone()
    x, weight = (m.t().contiguous() if t else m for m, t in zip((x, weight), transposed, strict=True))
    with isa(name):
        _C.linear_many_rows(x, transposed[0], weight, transposed[1], bias, add_to is not None, y)
    return y


amx = functools.partial(many_rows, "v4_amx")


# More than one block of T, of I and of O; empty matrices.
MANY_ROWS = [(1, 1, 1), (16, 32, 16), (17, 33, 31), (300, 70, 40), (260, 40, 200), (33, 1100, 129), (40, 600, 1)]
MANY_ROWS += [(30, 20, 2120), (35, 2601, 50), (1160, 2565, 5), (5, 0, 3), (0, 4, 3), (4, 4, 0)]


@each_isa_with_amx
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_many_rows(name, dtype):
    """Each shape in each memory layout; half of these calls have a bias."""
    if name == "v4_amx" and dtype != torch.float32:
        pytest.skip("computed by torch")
    with every_case() as each:
        for i, (T, I, O) in enumerate(MANY_ROWS):  # noqa: E741
            x, weight, bias = (t.detach().to(dtype) for t in inputs(T, I=I, O=O))
            expected = F.linear(x.double(), weight.double())
            size = F.linear(x.double().abs(), weight.double().abs())  # of the terms
            for j, transposed in enumerate(itertools.product((False, True), repeat=2)):
                has_bias = (i + j) % 2 == 0
                options = dict(transposed=transposed, bias=bias if has_bias else None)
                added = bias.double() if has_bias else torch.zeros(())
                with each(T, I, O, "transposed", *transposed, "bias", has_bias):
                    assert_many_rows_are_right(name, x, weight, expected + added, size + added.abs(), **options)


SEVERAL = [(1, 33, 31, 17), (3, 33, 31, 17), (7, 150, 40, 49), (2, 5, 2601, 9), (3, 4, 9, 2120)]


@each_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_several_products(name, dtype):
    """Of matrices with more than one block of depth and of columns; fewer and more products than threads."""
    if name == "v4_amx" and dtype != torch.float32:
        pytest.skip("computed by torch")
    torch.manual_seed(0)
    with every_case() as each:
        for n, T, I, O in SEVERAL:  # noqa: E741
            a, b = torch.randn(n, T, I).to(dtype), torch.randn(n, I, O).to(dtype)
            expected = a.double() @ b.double()
            size = a.double().abs() @ b.double().abs()  # of the terms
            for transposed in itertools.product((False, True), repeat=2):
                with each(n, T, I, O, *transposed):
                    left, right = (m.mT.contiguous() if t else m for m, t in zip((a, b), transposed, strict=True))
                    y = a.new_full((n, T, O), torch.nan)
                    # x, is it transposed?, weight (the transposed right matrix), is it transposed?, bias
                    arguments = left, transposed[0], right, not transposed[1], None
                    with isa(name):
                        _C.linear_many_rows(*arguments, False, y)
                        first = y.clone()
                        _C.linear_many_rows(*arguments, True, y)  # adds to y
                    bound = 4 * torch.finfo(torch.float32).eps * size + torch.finfo(dtype).eps * expected.abs()
                    assert ((first.double() - expected).abs() <= bound).all()
                    assert ((y.double() - 2 * expected).abs() <= 4 * bound).all()


@pytest.mark.parametrize("batches", [False, True])
def test_products_of_every_layout(batches, monkeypatch):
    """`put_products_` computes contiguous and transposed matrices and parts of a batch."""
    torch.manual_seed(0)
    monkeypatch.setitem(module.CHOICES, torch.float32, KernelChoice(32, batches=batches))
    for dtype in (torch.float32, torch.float64):
        a, b = torch.randn(4, 3, 5, dtype=dtype), torch.randn(4, 5, 7, dtype=dtype)
        for left, right in ((a, b), (a.mT.contiguous().mT, b), (a, b.mT.contiguous().mT), (a[::2], b[::2])):
            y = left.new_ones(len(left), 3, 7)
            put_products_(y, left, right, add=True)
            put_products_(y, left, right, add=True)
            torch.testing.assert_close(y, 1 + 2 * (left @ right))
            put_products_(y, left, right)
            torch.testing.assert_close(y, left @ right)


def assert_many_rows_are_right(name, x, weight, expected, size, **options):
    """size: sums of the magnitudes of the terms; options: bias and transposed."""
    dtype = x.dtype
    y = many_rows(name, x, weight, **options)
    bound = (2 if name == "v4_amx" else 3) * torch.finfo(torch.float32).eps * size  # seen: up to 2.2
    rounding = 0 if dtype == torch.float32 else torch.finfo(dtype).eps
    assert ((y.double() - expected).abs() <= bound + rounding * expected.abs()).all()
    for sums in {dtype, torch.float32}:
        ones = torch.ones_like(y, dtype=sums)
        summed = many_rows(name, x, weight, **options, add_to=ones)
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
        with isa(ISAS[0]), pytest.raises((TypeError, ValueError), match=message):
            many_rows(ISAS[0], *tensors[:2], add_to=tensors[2])


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_put_product(large, dtype, add):
    x, weight = (torch.randn(20, n).to(dtype) for n in (70, 30))
    y = torch.randn(70, 30)
    # Torch rounds the product before it adds it.
    rounds = dtype != torch.float32 and module.CHOICES[dtype].many_rows_from is None
    factors = (x, weight) if rounds else (x.double(), weight.double())
    expected = (add * y + F.linear(*(t.t() for t in factors))).float()
    y = y if add else torch.full_like(y, torch.nan)
    with torch.no_grad():
        put_product_(y, x.t(), weight.t(), 32, add=add)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
@each_isa_with_amx
def test_float32_sums_are_made_in_runs(name, transposed):
    """Partial sums of runs of terms lose less than half as much as one sum, term after term."""
    gen = torch.Generator().manual_seed(0)
    x, weight = torch.randn(96, 2048, generator=gen), torch.randn(64, 2048, generator=gen)
    one_after_another = torch.zeros(96, 64)
    for column, other in zip(x.T, weight.T, strict=True):
        one_after_another += column[:, None] * other
    exact = F.linear(x.double(), weight.double())
    y = many_rows(name, x, weight, transposed=(transposed, transposed))
    error, sequential_error = ((sums.double() - exact).square().mean().sqrt() for sums in (y, one_after_another))
    assert error < 0.45 * sequential_error


@needs_amx
@pytest.mark.parametrize("depth", [64, 512, 2048])
def test_amx_is_as_accurate_as_torch(depth):
    gen = torch.Generator().manual_seed(0)
    x, weight = torch.randn(200, depth, generator=gen), torch.randn(100, depth, generator=gen)
    exact = F.linear(x.double(), weight.double())
    error, torch_error = ((y.double() - exact).square().mean().sqrt() for y in (amx(x, weight), F.linear(x, weight)))
    assert error <= torch_error
    # The mantissas that lose most: the first part is rounded by half a unit, the others are all ones.
    worst = torch.full((1, depth), 1 + 2**-8 - 2**-23)
    y, exact = amx(worst, worst).double(), depth * worst[0, 0].double() ** 2
    assert abs(y - exact) <= 1.5 * 2**-22 * exact
    assert abs(amx(worst, -worst) + y) == 0
    # Of positive factors, too, the products that are omitted have either sign.
    x, weight = 1 + torch.rand(200, depth, generator=gen), 1 + torch.rand(100, depth, generator=gen)
    exact = F.linear(x.double(), weight.double())
    assert abs(((amx(x, weight) - exact) / exact).mean()) < 2**-26


@needs_amx
def test_amx_takes_all_magnitudes():
    """Factors of any exponent, the largest numbers, infinity and NaN."""
    x, weight = (t.detach() for t in inputs(20, bias=False))
    expected = amx(x, weight)
    for power in (-90, -60, 60, 90):
        assert torch.equal(amx(x * 2.0**power, weight * 2.0**-power), expected)
    large = torch.full((1, 3), 3.38e38)
    torch.testing.assert_close(amx(large, torch.eye(3)), large)
    x[3, 4] = torch.inf
    x[5, 6] = torch.nan
    assert (amx(x, weight).isnan().any(1) == torch.isin(torch.arange(20), torch.tensor([3, 5]))).all()


@pytest.mark.parametrize("rows", [3, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_no_outputs(rows, dtype):
    assert linear(torch.ones(rows, 3, dtype=dtype), torch.ones(0, 3, dtype=dtype)).shape == (rows, 0)
