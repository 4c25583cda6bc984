"""Assertion helpers fail on zeros, NaN, a flipped sign, a wrong scale, shape or dtype."""

import pytest
import torch
from assertions import assert_all_as_accurate_as, assert_all_close, assert_as_accurate_as
from assertions import assert_bit_equal, assert_close, every_case
from cases import generator, randn

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.complex64]


def flip_one_sign(x):
    x = x.clone()
    largest = x.abs().argmax()
    x.view(-1)[largest] *= -1
    return x


def one_nan(x):
    x = x.clone()
    x.view(-1)[3] = torch.nan
    return x


BREAKAGES = {
    "zeros": torch.zeros_like,
    "nan": lambda x: torch.full_like(x, torch.nan),
    "one-nan": one_nan,
    "inf": lambda x: x / 0.0,
    "flipped-sign": lambda x: -x,
    "one-flipped-sign": flip_one_sign,
    "scale-2": lambda x: 2 * x,
    "scale-1.05": lambda x: (1.05 * x).to(x.dtype),
    "transposed": lambda x: x.transpose(0, 1).reshape(x.shape),
    "shifted": lambda x: x.roll(1, 0),
    "shape": lambda x: x[:-1],
    "dtype": lambda x: x.to(torch.complex128 if x.is_complex() else torch.float64),
}


@pytest.fixture(params=DTYPES, ids=str)
def exact(request):
    """Values in float64 (or complex128), and the same rounded to the dtype."""
    wide = torch.complex128 if request.param.is_complex else torch.float64
    x = randn(generator(0), 7, 5, dtype=wide)
    return x, x.to(request.param)


@pytest.mark.parametrize("breakage", BREAKAGES.values(), ids=BREAKAGES)
def test_helpers_fail_on(breakage, exact):
    wide, rounded = exact
    broken = breakage(rounded)
    with pytest.raises(AssertionError):
        assert_as_accurate_as(broken, rounded, wide, factor=2)
    with pytest.raises(AssertionError):
        assert_close(broken, rounded, tolerance=1e-2)
    with pytest.raises(AssertionError):
        assert_bit_equal({"x": broken}, {"x": rounded})
    with pytest.raises(AssertionError):
        assert_all_as_accurate_as(
            {"a": rounded, "b": broken}, {"a": rounded, "b": rounded}, {"a": wide, "b": wide}, factor=2
        )
    with pytest.raises(AssertionError):
        assert_all_close({"a": rounded, "b": broken}, {"a": rounded, "b": rounded}, tolerance=1e-2)


def test_helpers_pass_on_the_rounded_value(exact):
    wide, rounded = exact
    assert_all_as_accurate_as({"x": rounded}, {"x": rounded}, {"x": wide}, factor=1, floor=0)
    assert_close(rounded.to(wide.dtype), wide, tolerance=torch.finfo(rounded.dtype).eps)
    assert_bit_equal({"x": rounded}, {"x": rounded.clone()})


@pytest.mark.parametrize("assert_all", [assert_all_close, assert_bit_equal], ids=["close", "bit-equal"])
def test_helpers_fail_on_a_missing_tensor(assert_all):
    x = torch.ones(3)
    options = {"tolerance": 1.0} if assert_all is assert_all_close else {}
    with pytest.raises(AssertionError):
        assert_all({"a": x}, {"a": x, "b": x}, **options)


def test_the_bound_is_a_multiple_of_the_references_error():
    wide = torch.linspace(1, 2, 9, dtype=torch.float64)
    reference = (wide + 1e-4).float()
    assert_as_accurate_as((wide - 1.9e-4).float(), reference, wide, factor=2, floor=0)
    with pytest.raises(AssertionError, match="exceeds"):
        assert_as_accurate_as((wide - 2.1e-4).float(), reference, wide, factor=2, floor=0)


def test_a_useless_reference_is_refused():
    wide = torch.linspace(1, 2, 9, dtype=torch.float64)
    with pytest.raises(AssertionError, match="the reference's own error"):
        assert_as_accurate_as(wide.float(), 1.5 * wide.float(), wide, factor=2)


def test_integers_are_compared_exactly():
    count = torch.tensor([3, 4])
    assert_as_accurate_as(count, count, count, factor=2)
    with pytest.raises(AssertionError):
        assert_as_accurate_as(count + 1, count, count, factor=2)


def test_small_elements_count_in_assert_close():
    expected = torch.tensor([1.0, 1.0, 1.0, 1e-3], dtype=torch.float64)
    with pytest.raises(AssertionError, match="1 of 4"):
        assert_close(expected + torch.tensor([0, 0, 0, 1e-9]), expected, tolerance=1e-10)


def test_every_case_runs_all_cases_and_names_the_failures():
    ran = []
    message = "(?s)2 cases failed.*one, 1:.*ZeroDivisionError.*three, 3:.*DID NOT RAISE"
    with pytest.raises(AssertionError, match=message), every_case() as case:
        with case("one", 1):
            1 / 0
        with case("two", 2):
            ran.append(2)
        with case("three", 3), pytest.raises(ValueError):
            ran.append(3)
    assert ran == [2, 3]
    with every_case() as case, case("alone"):
        ran.append(4)
