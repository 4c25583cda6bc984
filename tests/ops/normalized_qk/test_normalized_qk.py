"""normalized_qk: rotary angles far into a chunk, degenerate z, positions, errors. See also test_ops.py."""

import pytest
import torch
from assertions import assert_all_as_accurate_as, assert_close, assert_refuses, with_references
from backends import every_backend
from calls import evaluate, forward
from cases import generator, normalized_qk_case, randn

import megalodon_ops as mo
from megalodon_ops.ops.normalized_qk.normalized_qk import rotary_frequencies, rotary_rows, rotary_table_of

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@with_references
def far_case(dtype):
    return normalized_qk_case(B=1, L=4100, H=1, K=8, C=4096, rope_base=1e5, dtype=dtype)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_angles_keep_their_digits_far_into_a_chunk(dtype, backend):
    """A table of bfloat16 angles would be off by radians at position 4095."""
    case, same, exact = far_case(dtype)
    factor, floor = (4, 8) if dtype == torch.float32 else (2, 8)
    assert_all_as_accurate_as(evaluate(mo.normalized_qk, case), same, exact, factor=factor, floor=floor)


def test_rotation_by_complex_numbers():
    """Pairs (2i, 2i + 1) rotate by pos * base^(-2i/K), here by complex multiplication."""
    case = normalized_qk_case(B=1, L=10, H=2, K=6, C=7, dtype=torch.float64, position=True)
    start = int(case.options["position"][0])
    unrotated = forward(mo.normalized_qk, case.with_options(chunk_size=1, position=None))
    turn = ((start + torch.arange(10)) % 7)[:, None] * 10000.0 ** (-torch.arange(0, 6, 2).double() / 6)
    for name, value in forward(mo.normalized_qk, case).items():
        pairs = torch.view_as_complex(unrotated[name].unflatten(-1, (3, 2)))
        expected = pairs * torch.polar(torch.ones_like(turn), turn)[None, :, None]
        assert_close(value, torch.view_as_real(expected).flatten(-2), tolerance=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_zero_z_gives_beta(dtype):
    case = normalized_qk_case(B=1, L=3, C=1, dtype=dtype)
    case = case.with_tensors(z=torch.zeros_like(case.tensors["z"]))
    results = evaluate(mo.normalized_qk, case)
    assert torch.equal(results["q"][0, 0].flatten(), case.tensors["beta"][0].to(dtype))
    assert all(value.isfinite().all() for value in results.values())


def test_gain_is_an_offset_and_beta_is_not_divided():
    z, ones = randn(generator(0), 1, 1, 16), torch.ones(2, 16, dtype=torch.float64)
    q, _ = mo.normalized_qk(z, 0 * ones, 0 * ones, num_heads=1, chunk_size=4, eps=0.0)
    assert_close(q.square().sum(), torch.ones((), dtype=torch.float64), tolerance=1e-12)  # |zn|^2 / K = 1
    q2, k2 = mo.normalized_qk(z, ones, 3 * ones, num_heads=1, chunk_size=4, eps=0.0)
    assert_close(q2, 2 * q + 3, tolerance=1e-12)
    assert torch.equal(q2, k2)


ERRORS = {  # test_wrong_calls.py has wrong numbers
    "no-batch": (ValueError, "z", {"z": torch.zeros(9, 12)}),
    "one-axis": (ValueError, "z", {"z": torch.zeros(12)}),
    "z-integer": (TypeError, "z", {"z": torch.zeros(2, 9, 12, dtype=torch.int32)}),
    "gamma-shape": (ValueError, "gamma", {"gamma": torch.zeros(12)}),
    "gamma-dtype": (TypeError, "gamma", {"gamma": torch.zeros(2, 12, dtype=torch.bfloat16)}),
    "beta-shape": (ValueError, "beta", {"beta": torch.zeros(2, 6)}),
    "beta-dtype": (TypeError, "beta", {"beta": torch.zeros(2, 12, dtype=torch.float64)}),
    "heads-odd-size": (ValueError, "num_heads", {"num_heads": 4}),
    "position-shape": (ValueError, "position", {"position": torch.tensor([0])}),
    "position-too-large": (ValueError, "position", {"position": torch.tensor([0, 4])}),
    "position-negative": (ValueError, "position", {"position": torch.tensor([-1, 0])}),
    "position-float": (TypeError, "position", {"position": torch.tensor([0.0, 0.0])}),
    "lengths-too-long": (ValueError, "lengths", {"lengths": torch.tensor([3, 10])}),
    "packed-batch": (ValueError, "cu_seqlens", {"cu_seqlens": torch.tensor([0, 9])}),
}


@pytest.mark.parametrize(("error", "argument", "changes"), ERRORS.values(), ids=ERRORS)
def test_errors(error, argument, changes):
    arguments = {**normalized_qk_case(B=2, L=9, H=2, K=6).tensors, "num_heads": 2, "chunk_size": 4, **changes}
    assert_refuses(error, "normalized_qk", argument, lambda: mo.normalized_qk(**arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rows_of_a_table_for_few_tokens_are_those_of_torch(dtype):
    """By the kernel for few tokens and, in longer calls, by torch, far into a stream."""
    end = torch.tensor([1_000_007, 40, 25])
    frequencies = rotary_frequencies(10, 1e4, torch.device("cpu"))
    for length in (1, 10, 25):  # 3, 30 and 75 rows
        positions = (end[:, None] + torch.arange(-length, 0)).flatten()
        found = rotary_rows(end, frequencies, length, dtype == torch.float64)
        tolerance = 1e-7 if dtype == torch.float32 else 1e-14
        assert_close(found, rotary_table_of(positions, 10, 1e4, dtype), tolerance=tolerance)
    assert rotary_rows(end[:0], frequencies, 5, True).shape == (1, 5, 2)
