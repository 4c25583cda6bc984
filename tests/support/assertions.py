"""What it means for an op's results to be right."""

from __future__ import annotations

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

# (factor, floor) of assert_as_accurate_as: sums of float32 may be taken in any order, a 16-bit result is rounded once.
LIMITS = {
    torch.float32: (4, 8),
    torch.complex64: (4, 8),
    torch.bfloat16: (2, 0.5),
    torch.float16: (2, 0.5),
    torch.int64: (0, 0),
}
ROUNDED_BETWEEN = {"normalized_attention": 0.5, "adaptive_working_memory": 1.5}
"""Ops that round to the tokens' dtype in between, q and k or factors of products, and by how many spacings results may be off"""
TOLERANCE = 1e-10  # of float64 against float64


@contextmanager
def every_case() -> Iterator[Callable[..., AbstractContextManager[None]]]:
    """Runs the cases of a loop to its end, then fails with the names and the errors of all cases that failed.

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
    """The worst error of `actual` is at most `factor` times that of plain torch in the same dtype, plus rounding.

    Rounding is `floor` times the spacing of the dtype at the largest value, or at `terms` where larger terms cancel in
    a sum; a correctly rounded result is off by at most half the spacing.
    Errors are measured against float64. A reference that is wrong in its first digit is no yardstick, and is refused.
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
    """assert_as_accurate_as for every named tensor."""
    assert actual.keys() == float64_reference.keys()
    for name, value in actual.items():
        assert_as_accurate_as(
            value, same_dtype_reference[name], float64_reference[name], factor=factor, floor=floor, name=name
        )


def references(case: Case, incoming: Callable[[str, Tensor], Tensor] | None = None) -> tuple[Tensors, Tensors]:
    """What plain torch makes of the case: in the case's dtype, and in float64."""
    function = getattr(reference, case.op)
    return evaluate(function, case, incoming), evaluate(function, case.double(), incoming)


def with_references(build: Callable[..., Case]) -> Callable[..., tuple[Case, Tensors, Tensors]]:
    """Makes a function return, beside its case, what `references` gives: once for all backends, as that takes longest."""

    @functools.cache
    def built(*arguments: str | torch.dtype) -> tuple[Case, Tensors, Tensors]:
        case = build(*arguments)
        return case, *references(case)

    return built


def assert_matches_reference(actual: Tensors, case: Case) -> None:
    """Results and gradients of the case, as `evaluate` names them, are the reference's, by the limits of its dtypes."""
    if case.dtype == torch.float64:
        exact = evaluate(getattr(reference, case.op), case)
        assert_all_close(actual, exact, tolerance=TOLERANCE, terms=case.terms)
        return
    same, exact = references(case)
    assert actual.keys() == exact.keys()
    for name, value in actual.items():
        factor, floor = LIMITS[value.dtype]
        terms = case.terms if name.startswith("d") or name == "memory" else case.mean_terms if name == "mean" else 0.0
        if case.op in ROUNDED_BETWEEN and value.is_floating_point():
            floor = max(
                2 * floor, ROUNDED_BETWEEN[case.op] * torch.finfo(case.dtype).eps / torch.finfo(value.dtype).eps
            )
        assert_as_accurate_as(value, same[name], exact[name], factor=factor, floor=floor, terms=terms, name=name)


def assert_close(
    actual: Tensor, expected: Tensor, *, tolerance: float, terms: float = 0.0, name: str = "value"
) -> None:
    """|actual - expected| <= tolerance * (|expected| + rms(expected) + terms), element by element."""
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
    """assert_close for every named tensor; `terms` counts for gradients, whose names start with d."""
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        gradient_terms = terms if name.startswith("d") else 0.0
        assert_close(value, expected[name], tolerance=tolerance, terms=gradient_terms, name=name)


def assert_bit_equal(actual: Tensors, expected: Tensors) -> None:
    """Every named tensor has the same bits, signs of zeros apart; NaN equals nothing."""
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        _assert_same_kind(value, expected[name], name)
        assert torch.equal(value, expected[name]), f"{name}: {int((value != expected[name]).sum())} elements differ"


def assert_refuses(error: type[Exception], op: str, argument: str, call: Callable[[], object]) -> None:
    """The call raises an error that names the op, the argument, what was expected and what came, in one sentence."""
    with pytest.raises(error, match=rf"^{op}: `{re.escape(argument)}` .*\b(must|needs)\b.*, got .*\.$"):
        call()


def _assert_same_kind(actual: Tensor, expected: Tensor, name: str) -> None:
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{name}: dtype {actual.dtype}, not {expected.dtype}"


def _parts(value: Tensor) -> Tensor:
    """The value on the CPU in float64, a complex one as (..., 2)."""
    value = value.detach().cpu()
    return torch.view_as_real(value.to(torch.complex128)) if value.is_complex() else value.double()
