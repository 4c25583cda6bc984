"""Assertions about the results of an op."""

import functools
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch
from calls import evaluate
from cases import Case, Tensors
from torch import Tensor

from megalodon_ops import reference

# (factor, floor) of assert_as_accurate_as: float32 sums may use another order; a 16-bit result is rounded once.
LIMITS = {
    torch.float32: (4, 8),
    torch.complex64: (4, 8),
    torch.bfloat16: (2, 0.5),
    torch.float16: (2, 0.5),
    torch.int64: (0, 0),
    torch.int8: (0, 0),
}
ROUNDED_BETWEEN = {"normalized_attention": 0.5, "adaptive_working_memory": 1.5}
"""Ops that round intermediate results to the tokens' dtype, and the error that this allows, in spacings of the dtype"""
TOLERANCE = 1e-10  # of float64 against float64


@contextmanager
def every_case() -> Iterator[Callable[..., AbstractContextManager[None]]]:
    """Run all cases of a loop, then fail with the names and errors of those that failed.

    with every_case() as case:
        for dtype in dtypes:
            with case(dtype):
                ...
    """
    failed = []

    @contextmanager
    def case(*names: object) -> Iterator[None]:
        try:
            yield
        except (Exception, pytest.fail.Exception) as error:
            text = "".join(traceback.format_exception(error, limit=-1))
            failed.append(f"{', '.join(map(str, names))}:\n{text}")

    yield case
    assert not failed, f"{len(failed)} cases failed.\n" + "\n".join(failed)


def assert_as_accurate_as(
    actual: Tensor,
    same_dtype_reference: Tensor,
    float64_reference: Tensor,
    *,
    factor: float,
    floor: float = 0.5,
    terms: float = 0.0,
    name: str = "value",
) -> None:
    """Assert that the largest error is at most `factor` times that of plain torch in the same dtype, plus rounding.

    Rounding is `floor` times the spacing of the dtype at the largest value, or at `terms` if a sum has larger terms
    that cancel; a correctly rounded result is off by at most half the spacing.
    Errors are measured against float64. A same-dtype reference that is wrong in its first digit fails, too.
    """
    _assert_same_kind(actual, same_dtype_reference, name)
    assert actual.shape == float64_reference.shape, f"{name}: shape {tuple(float64_reference.shape)} of the reference"
    if actual.numel() == 0:
        return
    if not actual.is_floating_point() and not actual.is_complex():
        assert torch.equal(actual, float64_reference), f"{name}: {actual} is not {float64_reference}"
        return
    exact = _parts(float64_reference)
    scale = max(exact.abs().max().item(), terms)
    rounding = floor * torch.finfo(actual.dtype).eps * scale
    yardstick = (_parts(same_dtype_reference) - exact).abs().max().item()
    assert yardstick <= rounding + 0.1 * scale, f"{name}: the reference's own error is {yardstick:.2e} of {scale:.2e}"
    errors = (_parts(actual) - exact).abs()
    error, bound = errors.max().item(), factor * yardstick + rounding
    assert error <= bound, (  # also false for NaN
        f"{name}: error {error:.2e} exceeds {bound:.2e} = {factor} * {yardstick:.2e} + {rounding:.2e}, "
        f"for values up to {scale:.2e}, at {int((~(errors <= bound)).sum())} of {errors.numel()} elements"
    )


def assert_all_as_accurate_as(
    actual: Tensors, same_dtype_reference: Tensors, float64_reference: Tensors, *, factor: float, floor: float = 0.5
) -> None:
    """Call assert_as_accurate_as for every named tensor."""
    assert actual.keys() == float64_reference.keys()
    for name, value in actual.items():
        assert_as_accurate_as(
            value, same_dtype_reference[name], float64_reference[name], factor=factor, floor=floor, name=name
        )


def references(case: Case, run: Callable[..., Tensors] = evaluate) -> tuple[Tensors, Tensors]:
    """Results of `run` by plain torch, by default with gradients, in the case's dtype and in float64."""
    function = getattr(reference, case.op)
    return run(function, case), run(function, case.double())


def with_references(build: Callable[..., Case]) -> Callable[..., tuple[Case, Tensors, Tensors]]:
    """Let a function that builds a case also return the case's references, computed once for all backends."""

    @functools.cache
    def built(*arguments: str | torch.dtype) -> tuple[Case, Tensors, Tensors]:
        case = build(*arguments)
        return case, *references(case)

    return built


def assert_matches_reference(
    actual: Tensors,
    case: Case,
    *,
    run: Callable[..., Tensors] = evaluate,
    tolerance: float = TOLERANCE,
    limits: dict[torch.dtype, tuple[float, float]] = LIMITS,
) -> None:
    """Assert that the results of `run` are the reference's: in float64 by `tolerance`, else within `limits`."""
    if case.dtype == torch.float64:
        exact = run(getattr(reference, case.op), case)
        assert_all_close(actual, exact, tolerance=tolerance, terms=case.terms)
        return
    same, exact = references(case, run)
    assert actual.keys() == exact.keys()
    for name, value in actual.items():
        factor, floor = limits[value.dtype]
        terms = case.mean_terms if name == "mean" else 0.0
        if name.startswith("d") or name == "memory":  # a gradient, or a sum of outer products
            terms = case.terms
        if case.op in ROUNDED_BETWEEN and value.is_floating_point():
            spacings = torch.finfo(case.dtype).eps / torch.finfo(value.dtype).eps
            floor = max(2 * floor, ROUNDED_BETWEEN[case.op] * spacings)
        assert_as_accurate_as(value, same[name], exact[name], factor=factor, floor=floor, terms=terms, name=name)


def assert_close(
    actual: Tensor, expected: Tensor, *, tolerance: float, terms: float = 0.0, name: str = "value"
) -> None:
    """Assert that |actual - expected| <= tolerance * (|expected| + rms(expected) + terms), element by element."""
    _assert_same_kind(actual, expected, name)
    if actual.numel() == 0:
        return
    a, e = _parts(actual), _parts(expected)
    errors, bounds = (a - e).abs(), tolerance * (e.abs() + e.square().mean().sqrt() + terms)
    wrong = ~(errors <= bounds)  # also true for NaN
    assert not wrong.any(), (
        f"{name}: {int(wrong.sum())} of {wrong.numel()} elements are off by up to {errors[wrong].max().item():.2e}, "
        f"for values up to {e.abs().max().item():.2e}"
    )


def assert_all_close(actual: Tensors, expected: Tensors, *, tolerance: float, terms: float = 0.0) -> None:
    """Call assert_close for every named tensor; `terms` applies to gradients, whose names start with d."""
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        gradient_terms = terms if name.startswith("d") else 0.0
        assert_close(value, expected[name], tolerance=tolerance, terms=gradient_terms, name=name)


def assert_bit_equal(actual: Tensors, expected: Tensors) -> None:
    """Assert that every named tensor has the same bits, except for signs of zeros; NaN equals nothing."""
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        _assert_same_kind(value, expected[name], name)
        assert torch.equal(value, expected[name]), f"{name}: {int((value != expected[name]).sum())} elements differ"


def assert_refuses(error: type[Exception], op: str, argument: str, call: Callable[[], object]) -> None:
    """Assert that the call raises an error with the op, the argument, what was expected and what was given."""
    with pytest.raises(error, match=rf"^{op}: `{re.escape(argument)}` .*\b(must|needs)\b.*, got .*\.$"):
        call()


def message_of(call: Callable[[], object], error: type[Exception] = ValueError) -> str:
    """Return the message of the error that a call raises."""
    with pytest.raises(error) as caught:
        call()
    return str(caught.value)


def _assert_same_kind(actual: Tensor, expected: Tensor, name: str) -> None:
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{name}: dtype {actual.dtype}, not {expected.dtype}"


def _parts(value: Tensor) -> Tensor:
    """The value on the CPU in float64, a complex one as (..., 2)."""
    value = value.detach().cpu()
    return torch.view_as_real(value.to(torch.complex128)) if value.is_complex() else value.double()
