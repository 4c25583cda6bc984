"""quantized_linear: every instruction set computes the product of the rounded weights; quantize_weight rounds well."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from assertions import every_case

import megalodon_ops as mo
from backends import EMULATED_AMX, INTEGER_ISAS, ISA_PARAMS, each_isa, isa
from megalodon_ops.ops.common.definition import launch
from megalodon_ops.ops.quantized_linear import quantized_linear as module
from megalodon_ops.ops.quantized_linear.quantized_linear import dequantize, dequantize_fwd, quantized_linear_fwd
from megalodon_ops.ops.quantized_linear.quantized_linear_reference import dequantize as exact_weight
from megalodon_ops.ops.quantized_linear.quantized_linear_reference import int4_to_int8, round_activations

ROUNDING_ISAS = [name for name in module._C.available_isas() if module.gains_from_rounding(name)]
"""Instruction sets of this processor with which quantized_linear rounds x of many rows, as the product is faster"""
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(1, 1), (7, 0), (7, 3), (64, 100), (128, 17), (300, 61), (1031, 5)]
each_kind = pytest.mark.parametrize("kind", ["int8", "int4"])
each_isa_of_integers = pytest.mark.parametrize("name", [*ISA_PARAMS, *INTEGER_ISAS, *EMULATED_AMX])


def inputs(rows, I=300, O=61, kind="int8", dtype=torch.float32):  # noqa: E741
    gen = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=gen) for shape in ((rows, I), (O, I), (O,)))
    return x.to(dtype), *mo.quantize_weight(weight, kind), bias.to(dtype)


def exact(x, weight, scale, bias):
    """The product in float64, and the size of its terms."""
    matrix, bias = exact_weight(weight, scale, x.shape[-1]), bias.double()
    return F.linear(x.double(), matrix, bias), F.linear(x.double().abs(), matrix.abs(), bias.abs())


@each_isa
@each_kind
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_rows(name, kind, dtype, poisoned_memory):
    """Weights are not rounded again, and sums are float32, in each dtype."""
    with every_case() as each, isa(name):
        for rows, (I, O) in itertools.product([1, 2, 3, 5, 32], SIZES):  # noqa: E741
            with each(rows, I, O):
                tensors = inputs(rows, I, O, kind, dtype)
                expected, size = exact(*tensors)
                found = mo.quantized_linear(*tensors)
                assert found.dtype == dtype and found.shape == (rows, O)
                error_of_sums, eps = 4 * torch.finfo(torch.float32).eps * size, torch.finfo(dtype).eps
                assert ((found.double() - expected).abs() <= error_of_sums + eps * expected.abs()).all()
                without_bias = mo.quantized_linear(*tensors[:3])
                expected -= tensors[3].double()
                assert ((without_bias.double() - expected).abs() <= error_of_sums + eps * expected.abs()).all()


@each_isa
@each_kind
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantize(name, kind, dtype, poisoned_memory):
    """The kernel and torch, which computes on other devices, round the exact weights once."""
    with every_case() as each, isa(name):
        for I, O in SIZES:  # noqa: E741
            with each(I, O):
                _, weight, scale, _ = inputs(1, I, O, kind)
                expected = exact_weight(weight, scale, I).float().to(dtype)
                assert torch.equal(dequantize(weight, scale, I, dtype), expected)
                assert torch.equal(module.dequantize_by_torch(weight, scale, I, dtype), expected)


@each_kind
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_rows(kind, dtype, monkeypatch):
    """Many rows are multiplied by a dequantised copy, part by part, with the error of torch's product in the dtype."""
    monkeypatch.setattr(module, "_COPY", 300 * 16)  # elements of a part: 16 of the weight's 61 rows
    tensors = inputs(70, kind=kind, dtype=dtype)
    x, weight, scale, bias = tensors
    expected, size = exact(*tensors)
    with torch.no_grad():
        found = mo.quantized_linear(*tensors)
        copied = F.linear(x, exact_weight(weight, scale, 300).to(dtype), bias)
    error, usual = ((y.double() - expected).abs().max() for y in (found, copied))
    assert error <= 2 * usual + torch.finfo(torch.float32).eps * size.max()
    assert mo.quantized_linear(*tensors[:3]).shape == (70, 61)


def many_rows(x, weight, scale, bias=None):
    """The product by the kernel for rounded x, for any number of rows."""
    y = torch.full((len(x), len(weight)), torch.nan, dtype=x.dtype)
    launch("quantized_many_rows", x, weight, scale, bias, y)
    return y


@each_isa_of_integers
@each_kind
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounded_x(name, kind, dtype, poisoned_memory):
    """Products are those of x and w rounded to 8 bits. Sums of integers are exact; only scales and the bias round."""
    with every_case() as each, isa(name):
        for rows, (I, O) in itertools.product([1, 13, 70], SIZES):  # noqa: E741
            with each(rows, I, O):
                tensors = inputs(rows, I, O, kind, dtype)
                x, weight, scale, bias = tensors
                rounded = (weight, scale) if kind == "int8" else int4_to_int8(weight, scale, I)
                expected, _ = exact(round_activations(x), *rounded, bias)
                found = many_rows(*tensors)
                # float32 rounds the sum, its products with two scales (4 eps leave a margin), then the sum with bias.
                error = torch.finfo(torch.float32).eps * (4 * (expected - bias).abs() + expected.abs())
                assert found.dtype == dtype
                assert torch.equal(found, many_rows(x, *rounded, bias))
                assert ((found.double() - expected).abs() <= error + torch.finfo(dtype).eps * expected.abs()).all()
                assert torch.equal(many_rows(*tensors[:3]), many_rows(*tensors[:3], torch.zeros_like(bias)))


@each_isa_of_integers
def test_sums_of_integers_are_exact(name):
    """The largest products and sums, and more inputs than one sum of 32 bits holds."""
    with every_case() as each, isa(name):
        for I in (4, 1030, 66_000, 140_000):  # noqa: E741 - the last two need 2 and 3 sums, of 2^16 inputs each
            with each(I):
                gen = torch.Generator().manual_seed(0)
                x = torch.randint(-127, 128, (3, I), generator=gen).float()
                x[0] = x[:, 0] = 127  # so that the scales are 1
                weight = torch.randint(-127, 128, (3, I), generator=gen).to(torch.int8)
                weight[0] = -127
                expected = x.double() @ weight.double().T
                found = many_rows(x, weight, torch.ones(3))
                assert ((found - expected).abs() <= 2**-22 * expected.abs()).all()


@each_isa_of_integers
@each_kind
def test_numbers_that_are_not_finite_stay_in_their_row(name, kind):
    x, weight, scale, bias = inputs(40, kind=kind)
    with isa(name):
        expected = many_rows(x, weight, scale, bias)
        for value in (torch.nan, torch.inf, -torch.inf):
            wrong = x.clone()
            wrong[17, 290] = value
            found = many_rows(wrong, weight, scale, bias)
            assert found[17].isnan().all()
            assert torch.equal(found[:17], expected[:17]) and torch.equal(found[18:], expected[18:])
        zeros = torch.zeros(5, 300)  # the scale is not 0, so x / scale is not NaN
        assert torch.equal(many_rows(zeros, weight, scale, bias), bias.expand(5, -1))


def test_error_of_rounded_x():
    """x of 8 bits changes y by 1 %. With one channel 1,000 times as large, the others are rounded to 0."""
    x, weight, scale, _ = inputs(70, I=1024)
    large = x.clone()
    large[:, 7] = 1000  # the other channels have a standard deviation of 1
    matrix = exact_weight(weight, scale, 1024)
    others = torch.arange(1024) != 7

    def error(x):
        difference = round_activations(x) - x.double()
        return (difference[:, others] @ matrix[:, others].T).std() / (x[:, others].double() @ matrix[:, others].T).std()

    assert 0.002 < error(x) < 0.012
    assert 0.99 < error(large) < 1.01


def test_error_of_int4_rounded_to_8_bits():
    """Rounding to 8 bits adds an error of 1 % to that of 4 bits, 9 %. With one scale in a row, it is to the nearest."""
    weight = torch.randn(61, 1024, generator=torch.Generator().manual_seed(0))
    small = mo.quantize_weight(weight, "int4")
    rounded = exact_weight(*int4_to_int8(*small, 1024), 1024)
    matrix = exact_weight(*small, 1024)
    assert (rounded - matrix).std() < 0.01 * matrix.std()
    assert (matrix - weight).std() > matrix.std() / 15
    one_scale = torch.randint(-8, 8, (9, 300), generator=torch.Generator().manual_seed(0)).float()
    one_scale[:, ::32] = -8
    integers, scale = int4_to_int8(*mo.quantize_weight(one_scale, "int4"), 300)
    assert ((integers * scale[:, None] - one_scale).abs() <= 0.501 * scale[:, None]).all()


def test_choice_of_the_product_of_integers():
    """All instruction sets but two gain from rounding x of many rows to 8 bits."""
    names = "generic neon_dot neon_i8mm neon_bf16 v2 v3 v3_vnni v4 v4_vnni v4_bf16 v4_amx".split()
    assert [name for name in names if not module.gains_from_rounding(name)] == ["generic", "v4"]


@each_kind
@pytest.mark.skipif(not ROUNDING_ISAS, reason="integers gain nothing on this processor")
def test_activations(kind):
    """x is rounded if it has 17 or more rows, and if the caller allows it."""
    x, *others = inputs(17, kind=kind)
    with isa(ROUNDING_ISAS[-1]):
        rounded = mo.quantized_linear(x, *others, activations="int8")
        kept = mo.quantized_linear(x, *others)
        assert torch.equal(rounded, many_rows(x, *others)) and not torch.equal(rounded, kept)
        reference = mo.reference.quantized_linear(x, *others, activations="int8")
        torch.testing.assert_close(rounded, reference, rtol=1e-5, atol=1e-4)
        few = mo.quantized_linear(x[:16], *others, activations="int8")
        assert torch.equal(few, mo.quantized_linear(x[:16], *others))
    with pytest.raises(ValueError, match="quantized_linear: `activations` must be None or \"int8\", got 'int4'"):
        mo.quantized_linear(x, *others, activations="int4")


@each_kind
def test_float16_of_many_rows_takes_weights_that_float16_does_not_hold(kind):
    x, weight, _, bias = inputs(70, kind=kind, dtype=torch.float16)
    weight, scale = mo.quantize_weight(1e5 * torch.randn(61, 300, generator=torch.Generator().manual_seed(1)), kind)
    x = x * 1e-3
    found = mo.quantized_linear(x, weight, scale, bias)
    assert found.isfinite().all()
    torch.testing.assert_close(found[:9], mo.quantized_linear(x[:9], weight, scale, bias), rtol=2e-3, atol=2e-3)


@each_kind
@pytest.mark.parametrize("rows", [1, 2, 7])
def test_bits_do_not_depend_on_threads_strides_or_axes(kind, rows, two_threads):
    x, weight, scale, bias = inputs(rows, O=1037, kind=kind)
    expected = mo.quantized_linear(x, weight, scale, bias)
    for threads in (1, 3, 5):
        torch.set_num_threads(threads)
        assert torch.equal(mo.quantized_linear(x, weight, scale, bias), expected)
    spread = [torch.stack((t, t), -1)[..., 0] for t in (x, weight, scale, bias)]
    assert torch.equal(mo.quantized_linear(*spread), expected)
    assert torch.equal(mo.quantized_linear(x[:, None], weight, scale, bias), expected[:, None])


@each_kind
def test_reference(kind):
    tensors = inputs(5, kind=kind)
    expected, _ = exact(*tensors)
    torch.testing.assert_close(mo.reference.quantized_linear(*tensors).double(), expected, rtol=1e-6, atol=1e-6)
    assert mo.reference.quantized_linear(*tensors[:3]).dtype == torch.float32


def test_rounding_to_int8():
    """Each weight is rounded to the nearest multiple of its row's scale, and the largest is kept."""
    weight = torch.randn(9, 50, generator=torch.Generator().manual_seed(0)) * torch.logspace(-20, 20, 9)[:, None]
    weight[3] = 0
    small = mo.quantize_weight(weight, "int8")
    values = exact_weight(*small, 50)
    assert ((values - weight.double()).abs() <= 0.501 * small.scale.double()[:, None]).all()
    assert torch.equal(small.weight.abs().amax(1), torch.tensor([127] * 3 + [0] + [127] * 5, dtype=torch.int8))


def test_rounding_to_int4():
    """Groups have scales of their own, and their largest number is kept."""
    weight = torch.randn(40, 300, generator=torch.Generator().manual_seed(0))
    weight[:, 32:64] *= 1e-6
    weight[:, 64:96] = 0
    values = exact_weight(*mo.quantize_weight(weight, "int4"), 300)
    errors = ((values - weight).square().sum(0) / weight.square().sum(0).clamp(min=1e-30)).sqrt()
    assert (errors < 0.15).all() and errors.mean() < 0.1
    largest = weight[:, :32].abs().argmax(1, keepdim=True)
    torch.testing.assert_close(values.float().gather(1, largest), weight.gather(1, largest), rtol=2**-8, atol=0)
    integers = torch.tensor([-8.0, 7, 3, 0, -1] * 40)[None]
    assert torch.equal(exact_weight(*mo.quantize_weight(integers, "int4"), 200).float(), integers)


def test_arguments_in_other_dtypes_are_refused():
    x, weight, scale, bias = inputs(2)
    packed, scales = mo.quantize_weight(torch.randn(61, 300), "int4")
    wrong = {
        "`x` must be float32, bfloat16 or float16": (x.double(), weight, scale, bias),
        "`weight` must be int8, or uint8": (x, weight.short(), scale, bias),
        "`weight` must have shape": (x[:, 1:], weight, scale, bias),
        "`scale` must have shape": (x, weight, scale[1:], bias),
        "`scale` must be torch.float32": (x, weight, scale.bfloat16(), bias),
        "`scale` must be torch.bfloat16": (x, packed, scales.float(), bias),
        "`scale` must have shape \\(61, 12\\)": (x, packed, scales[:, :10], bias),  # 3 whole blocks
        "`bias` must be torch.float32": (x, weight, scale, bias.half()),
        "`bias` must have shape": (x, weight, scale, bias[1:]),
    }
    with every_case() as each:
        for message, tensors in wrong.items():
            with each(message), pytest.raises(ValueError, match=f"quantized_linear: {message}"):
                mo.quantized_linear(*tensors)
    for weight, message in (
        (torch.ones(2, 3).double(), "`weight` must be float32"),
        (torch.tensor([[torch.inf]]), "finite"),
    ):
        with pytest.raises(ValueError, match=f"quantize_weight: .*{message}"):
            mo.quantize_weight(weight, "int8")
    with pytest.raises(ValueError, match='quantize_weight: `kind` must be "int8" or "int4", got \'int3\''):
        mo.quantize_weight(torch.ones(2, 3), "int3")


def test_gradients_are_refused():
    x, *others = inputs(2)
    y = mo.quantized_linear(x.requires_grad_(), *others)
    with pytest.raises(NotImplementedError, match="quantized_linear: gradients are not supported"):
        y.sum().backward()


def test_autocast():
    x, weight, scale, bias = inputs(3)
    with torch.autocast("cpu", torch.bfloat16):
        found = mo.quantized_linear(x, weight, scale, bias)
    assert torch.equal(found, mo.quantized_linear(x.bfloat16(), weight, scale, bias.bfloat16()))


@each_kind
def test_opcheck(kind):
    x, weight, scale, bias = inputs(3, kind=kind)
    torch.library.opcheck(quantized_linear_fwd, (x, weight, scale, bias, None))
    torch.library.opcheck(quantized_linear_fwd, (x, weight, scale, None, "int8"))
    all_rows = None
    torch.library.opcheck(dequantize_fwd, (weight, scale, all_rows, 300, torch.bfloat16))
