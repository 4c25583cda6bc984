"""layer_norm and rms_norm: values, gradients, hard values, layouts, threads, fallback to torch."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from assertions import assert_as_accurate_as, assert_bit_equal, assert_refuses, every_case

from backends import each_isa, isa
from megalodon_ops import _C, reference
from megalodon_ops.ops.layer_norm import layer_norm as module
from megalodon_ops.ops.layer_norm.layer_norm import layer_norm, layer_norm_bwd, layer_norm_fwd, rms_norm

NORMS = {"layer_norm": 3, "rms_norm": 2}  # number of inputs with gradients
WIDTHS = [1, 7, 16, 17, 64, 500, 4097]
each_norm = pytest.mark.parametrize("norm", NORMS)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def inputs(norm, *shape, dtype=torch.float64, mean=0.5, std=1.0):
    """x, weight and bias, if the norm has one; dy."""
    gen = torch.Generator().manual_seed(0)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    x, dy = (torch.randn(shape, generator=gen, dtype=torch.float64) for _ in range(2))
    affine = [(torch.randn(shape[-1], generator=gen, dtype=torch.float64) / 2).to(real) for _ in range(2)]
    return [(mean + std * x).to(dtype), *affine[: NORMS[norm] - 1]], dy.to(dtype)


def results(function, tensors, dy):
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = function(*leaves)
    grads = torch.autograd.grad(y, leaves, dy)
    return {"y": y.detach()} | dict(zip(("dx", "dweight", "dbias"), grads, strict=False))


def assert_matches_the_reference(norm, tensors, dy, *, terms):
    """terms: size of the terms of dx, which may cancel."""
    found = results(getattr(module, norm), tensors, dy)
    exact = results(getattr(reference, norm), [t.double() for t in tensors], dy.double())
    same = results(getattr(reference, norm), tensors, dy)
    assert len(found) == NORMS[norm] + 1
    for key, expected in exact.items():
        assert found[key].dtype == same[key].dtype
        bounds = dict(factor=4, floor=8) if found[key].dtype.itemsize > 2 else dict(factor=2, floor=0.5)
        bounds["terms"] = terms if key == "dx" else 0.0
        assert_as_accurate_as(found[key], same[key], expected, **bounds, name=key)


@each_isa
@each_norm
def test_results_and_gradients_match_the_reference(norm, name):
    """Each width in each dtype; numbers of rows take turns."""
    with every_case() as each, isa(name):
        for (i, width), (j, dtype) in itertools.product(enumerate(WIDTHS), enumerate(DTYPES)):
            rows = (1, 5, 67)[(i + j) % 3]
            with each(rows, width, dtype):
                tensors, dy = inputs(norm, rows, width, dtype=dtype)
                # With one channel, dx is 0: terms of size 1 / sqrt(eps) cancel.
                assert_matches_the_reference(norm, tensors, dy, terms=320.0 if width == 1 else 4.0)


@each_isa
@each_norm
@pytest.mark.parametrize(("dtype", "rows"), [(torch.float32, 8192), (torch.bfloat16, 16384)], ids=str)
def test_large_outputs_have_the_bits_of_small_ones(norm, name, dtype, rows):
    """Outputs of 32 MiB and more are stored past the caches."""
    (x, *parameters), dy = inputs(norm, 67, 1024, dtype=dtype)
    index = torch.arange(rows) % 67
    with isa(name):
        large = results(getattr(module, norm), [x[index], *parameters], dy[index])
        small = results(getattr(module, norm), [x, *parameters], dy)
    for key in ("y", "dx"):
        assert torch.equal(large[key], small[key][index])


@each_isa
@each_norm
@pytest.mark.parametrize(("mean", "std"), [(0, 1e3), (1, 1e-4), (0, 1e-4), (1e15, 1e14)], ids=str)
def test_hard_values(norm, name, mean, std):
    tensors, dy = inputs(norm, 40, 77, dtype=torch.float32, mean=mean, std=std)
    with isa(name):
        assert_matches_the_reference(norm, tensors, dy, terms=2.0 / max(std, 1e-2))


@each_isa
@pytest.mark.parametrize("width", [77, 1024])
def test_a_mean_that_dwarfs_the_spread(name, width):
    """A mean rounded to float32 is off by 5e-4 here, a twentieth of the spread."""
    (x, weight, bias), dy = inputs("layer_norm", 9, width, dtype=torch.float32, mean=1e4 + 1 / 3, std=1e-2)
    with isa(name):
        found = results(layer_norm, (x, weight, bias), dy)
    exact = results(reference.layer_norm, (x.double(), weight.double(), bias.double()), dy.double())
    for key, expected in exact.items():
        error = (found[key].double() - expected).abs().max() / expected.abs().max()
        assert error <= 1e-5, f"{key}: {error:.1e}"


@each_norm
@each_dtype
def test_constant_rows_and_special_values(norm, dtype):
    tensors, _ = inputs(norm, 4, 50, dtype=dtype)
    x = tensors[0]
    x[0] = 0
    x[1] = 3
    x[2, 3] = torch.nan
    x[3, 4] = torch.inf
    y = getattr(module, norm)(*tensors)
    expected = tensors[2].to(dtype) if norm == "layer_norm" else torch.zeros(50, dtype=dtype)
    assert torch.equal(y[0], expected)
    if norm == "layer_norm":
        assert torch.equal(y[1], expected)
    assert y[2].isnan().all() and y[3, 4].isnan()


@each_norm
def test_gradients_equal_the_explicit_backward(norm):
    tensors, dy = inputs(norm, 2, 3, 17)
    grads = reference.layer_norm_bwd(dy, *tensors[:2], is_rms_norm=norm == "rms_norm")
    found = results(getattr(reference, norm), tensors, dy)
    for grad, key in zip(grads, ("dx", "dweight", "dbias"), strict=True):
        if key in found:
            torch.testing.assert_close(grad, found[key], rtol=1e-12, atol=1e-12)


@each_norm
def test_without_parameters(norm):
    (x, *_), dy = inputs(norm, 5, 33)
    zeros = torch.zeros(33, dtype=torch.float64)
    with_zeros = results(getattr(module, norm), (x, *[zeros] * (NORMS[norm] - 1)), dy)
    without = results(getattr(module, norm), (x,), dy)
    assert torch.equal(without["y"], with_zeros["y"]) and torch.equal(without["dx"], with_zeros["dx"])
    bias = torch.randn(33, dtype=torch.float64)
    if norm == "layer_norm":
        only_bias = results(lambda x, bias: layer_norm(x, None, bias), (x, bias), dy)
        assert torch.equal(only_bias["dx"], without["dx"])
        torch.testing.assert_close(only_bias["y"], without["y"] + bias)
        torch.testing.assert_close(only_bias["dweight"], dy.sum(0))  # the second input, which is the bias


@each_norm
def test_gradcheck_and_no_second_derivatives(norm):
    tensors, _ = inputs(norm, 2, 3, 7)
    leaves = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(getattr(module, norm), leaves)
    dx, *_ = torch.autograd.grad(getattr(module, norm)(*leaves).square().sum(), leaves, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives are not supported"):
        dx.sum().backward()


@each_norm
@pytest.mark.parametrize("shape", [(3000, 7), (700, 100), (9, 9000)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_and_strides_change_nothing(norm, shape, dtype, two_threads):
    tensors, dy = inputs(norm, *shape, dtype=dtype)
    function = getattr(module, norm)
    expected = results(function, tensors, dy)
    spread = [torch.stack((t, t), -1)[..., 0] for t in (*tensors, dy)]
    turned = [t.t().contiguous().t() if t.dim() == 2 else t for t in (*tensors, dy)]
    torch.set_num_threads(1)
    for *arranged, grad in ((*tensors, dy), spread, turned):
        assert_bit_equal(results(function, arranged, grad), expected)


@each_norm
@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (3, 0)], ids=str)
def test_nothing_to_do(norm, shape):
    tensors, dy = inputs(norm, *shape, dtype=torch.float32)
    found = results(getattr(module, norm), tensors, dy)
    assert found["y"].shape == found["dx"].shape == shape
    assert torch.equal(found["dweight"], torch.zeros(shape[-1]))


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's own use
@each_norm
def test_opcheck_and_compile(norm):
    tensors, dy = inputs(norm, 2, 3, 5, dtype=torch.float32)
    x, weight = tensors[:2]
    bias = tensors[2] if norm == "layer_norm" else None
    options = dict(eps=1e-5, is_rms_norm=norm == "rms_norm")
    for parameters in ((weight, bias), (None, None)):
        leaves = [p if p is None else p.detach().requires_grad_() for p in (x, *parameters)]
        torch.library.opcheck(layer_norm_fwd, tuple(leaves), options)
        torch.library.opcheck(layer_norm_bwd, (dy, x, *parameters), options)
    torch.use_deterministic_algorithms(False)
    torch.compiler.reset()
    compiled = torch.compile(getattr(module, norm), fullgraph=True, backend="aot_eager")
    assert_bit_equal(results(compiled, tensors, dy), results(getattr(module, norm), tensors, dy))


@each_norm
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fallback_to_torch(norm, dtype, monkeypatch):
    tensors, dy = inputs(norm, 6, 40, dtype=dtype)
    function = getattr(module, norm)
    expected = results(function, tensors, dy)
    assert function(*(t.to("meta") for t in tensors)).dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert function(*tensors).dtype == dtype
    monkeypatch.setattr(module, "has_kernel", lambda x: False)
    for key, value in results(function, tensors, dy).items():
        torch.testing.assert_close(value, expected[key])
    torch.testing.assert_close(function(tensors[0]), getattr(F, norm)(tensors[0], (40,), eps=1e-5))


def test_errors():
    (x, weight, bias), _ = inputs("layer_norm", 3, 8, dtype=torch.float32)
    assert_refuses(ValueError, "layer_norm", "weight", lambda: layer_norm(x, weight[:5], bias))
    assert_refuses(ValueError, "layer_norm", "bias", lambda: layer_norm(x, weight, bias[None]))
    assert_refuses(TypeError, "layer_norm", "weight", lambda: layer_norm(x, weight.double(), bias))
    assert_refuses(TypeError, "layer_norm", "bias", lambda: layer_norm(x, weight, bias.half()))
    assert_refuses(ValueError, "layer_norm", "eps", lambda: layer_norm(x, weight, bias, eps=-1.0))
    assert_refuses(ValueError, "rms_norm", "x", lambda: rms_norm(x[0, 0]))
    arguments = dict(weight=weight, eps=1e-5, is_rms_norm=False, dy=x, dx=x.clone(), dw=weight, db=bias)
    _C.layer_norm_bwd(x, *arguments.values())
    for argument, bad in {"dy": x[:2], "dx": x.double(), "dw": weight[:3]}.items():
        with pytest.raises((ValueError, TypeError), match=f"layer_norm: `{argument}"):
            _C.layer_norm_bwd(x, *{**arguments, argument: bad}.values())


def test_layers_take_the_kernels(monkeypatch):
    from megalodon_ops.model.layers import LayerNorm, RMSNorm

    names = []
    monkeypatch.setattr(module, "call", lambda op, *args: names.append(op._schema.name) or op(*args))
    for layer in (LayerNorm(8), RMSNorm(8), RMSNorm(8, affine=False)):
        layer(torch.randn(2, 8))
    assert names == ["megalodon_ops::layer_norm_fwd"] * 3
