"""Emulated CUDA kernels of timestep_norm: every path, sequences across tiles, orders of threads, bytes moved.

The public op on these kernels: test_ops.py.
"""

import itertools

import pytest
import torch
from assertions import assert_all_close, assert_bit_equal, assert_close, assert_matches_reference
from calls import evaluate, forward
from cases import Case, timestep_norm_case
from emulated import ORDERS, assert_equal_in_every_order, assert_no_bank_conflicts, run_emulated
from emulator.device import Emulator
from hypothesis import given
from hypothesis import strategies as st

import megalodon_ops as mo
from megalodon_ops import _C

TILE = 64  # tokens of a block
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
EIGHT_SEQUENCES = [1, 4, 4, 10, 31, TILE, TILE + 1, TILE + 2, TILE + 4]


def vector(dtype: torch.dtype) -> int:
    return 16 // dtype.itemsize


WIDTHS = {  # channels of a group
    "a-vector-a-group": lambda vector: vector,
    "lanes-share-a-group": lambda vector: 4 * vector,
    "idle-lanes": lambda vector: 3 * vector,
    "more-vectors-than-lanes": lambda vector: 33 * vector,
    "elements": lambda _: 5,
    "more-elements-than-lanes": lambda _: 37,
}


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_division_of_a_row(emulator, dtype, width):
    """Three groups, which leave lanes of a warp idle; two tiles, the second one short."""
    case = timestep_norm_case(B=1, L=TILE + 5, G=3, width=width(vector(dtype)), dtype=dtype, count=2)
    assert_matches_reference(run_emulated(emulator, case), case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_misaligned_tensors(emulator, dtype):
    sizes = dict(B=1, L=TILE + 5, G=2, width=vector(dtype), dtype=dtype, count=2)
    case = timestep_norm_case(**sizes, cu_seqlens=EIGHT_SEQUENCES)
    assert_matches_reference(run_emulated(emulator, case, offset=1), case)


def test_a_state_counts_with_its_residual(emulator):
    """A million values at 10^4 with spread 0.01: rounding the mean to float32 would cost as much as rounding x."""
    case = timestep_norm_case(B=2, L=5, G=3, width=8, mean=1e4, std=1e-2, count=10**6)

    def results(function, case):
        x, weight, bias, mean, var = case.tensors.values()
        options = dict(case.options)
        state = mo.TimestepNormState(options.pop("count"), mean, var, options.pop("residual"))
        y, after = function(x, weight, bias, **options, state=state, return_state=True)
        rest_of_mean, rest_of_var = after.residual.unbind(1)
        wide = {"mean": after.mean.double() + rest_of_mean, "var": after.var.double() + rest_of_var}
        return {"y": y.double(), **wide}

    with emulator.replacing(_C):
        actual = results(mo.timestep_norm, case)
    for name, exact in results(mo.reference.timestep_norm, case.double()).items():
        assert_close(actual[name], exact, tolerance=1e-4 if name == "y" else 1e-11, name=name)


@pytest.mark.parametrize("before", [2**31 - 40, 2**32 + 3])
@pytest.mark.parametrize("L", [5, 2 * TILE + 9])
def test_counts_beyond_32_bits(emulator, before, L):
    """The count passes 2^31 inside the call, or its lower half is small; two tiles enter a third one."""
    case = timestep_norm_case(B=2, L=L, G=2, width=4, count=before, dtype=torch.float64)
    assert_matches_reference(run_emulated(emulator, case), case)


def test_a_large_mean_beside_a_small_deviation(emulator):
    """Means near 3e5 with deviation 1, over six tiles: a float's spacing there is 1/32. Gradients use the same means."""
    case = timestep_norm_case(B=1, L=5 * TILE + 20, G=2, width=8, mean=3e5, std=1.0)
    actual = run_emulated(emulator, case)
    exact = evaluate(mo.reference.timestep_norm, case.double())
    for name in ("y", "dx", "dweight", "dbias"):
        assert_close(actual[name].double(), exact[name], tolerance=1e-5, name=name)


@pytest.mark.parametrize("garbage", [0.0, 1e6])
def test_a_state_of_count_0_keeps_the_residual_of_a_large_mean(emulator, garbage):
    """Values at 10^4 with spread 0.01. Mean and variance of a state with count 0 do not count."""
    case = timestep_norm_case(B=1, L=5, G=3, width=8, mean=1e4, std=1e-2)
    x, weight, bias = (case.tensors[name] for name in ("x", "weight", "bias"))
    moment = torch.full((1, 3), garbage)
    state = mo.TimestepNormState(
        count=torch.zeros(1, dtype=torch.int64), mean=moment, var=moment.clone(), residual=None
    )
    with emulator.replacing(_C):
        y, after = mo.timestep_norm(x, weight, bias, num_groups=3, state=state, return_state=True)
    exact, expected = mo.reference.timestep_norm(
        x.double(), weight.double(), bias.double(), num_groups=3, return_state=True
    )
    assert_close(y.double(), exact, tolerance=1e-4, name="y")
    mean = after.mean.double() + after.residual[:, 0]
    assert_close(mean, expected.mean, tolerance=1e-11, name="mean")


def test_a_state_may_lack_its_residual(emulator):
    case = timestep_norm_case(B=2, L=5, G=3, width=8, count=3)
    zero = case.with_options(residual=torch.zeros_like(case.options["residual"]))
    assert_bit_equal(run_emulated(emulator, case.with_options(residual=None)), run_emulated(emulator, zero))


def test_null_pointers_for_gradients_of_states(emulator):
    """One sequence is empty."""
    case = timestep_norm_case(B=2, L=9, G=2, width=4, count=3, lengths=[9, 0])
    launches = []
    call = emulator.call

    def record(name, *arguments, offset):
        launches.append(arguments)
        call(name, *arguments, offset=offset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emulator, "call", record)
        run_emulated(emulator, case)
    *inputs, dx, dweight, dbias, dmean, dvar = launches[-1]
    others = [torch.empty_like(t) for t in (dx, dweight, dbias)]
    emulator.call("timestep_norm_bwd", *inputs, *others, None, None)
    for actual, expected in zip(others, (dx, dweight, dbias), strict=True):
        assert torch.equal(actual, expected)


def test_no_channels(emulator):
    case = timestep_norm_case(B=2, L=5, G=1, width=0, count=2)
    assert run_emulated(emulator, case)["y"].numel() == 0
    assert emulator.launched() == {f"timestep_norm_{way}_empty_kernel" for way in ("fwd", "bwd")}


@pytest.mark.parametrize("L", [0, TILE + 5])
def test_null_pointers_for_statistics_and_the_end_state(emulator, L):
    case = timestep_norm_case(B=2, L=L, G=2, width=4)
    inputs = {name: case.tensors[name] for name in ("x", "weight", "bias")}
    y = torch.full_like(inputs["x"], torch.nan)
    emulator.call("timestep_norm_fwd", **inputs, num_groups=2, eps=case.options["eps"], y=y)
    assert_close(y, forward(mo.timestep_norm, case)["y"], tolerance=1e-5)


def test_the_workspace_of_many_channels(emulator):
    """There is a share even if D exceeds the room for all shares."""
    case = timestep_norm_case(B=1, L=1, G=1, width=2**18 + 1)
    inputs = {name: case.tensors[name] for name in ("x", "weight", "bias")}
    shares = []
    results = {f"d{name}": torch.empty_like(tensor) for name, tensor in inputs.items()}
    inputs |= {"num_groups": 1, "eps": 1e-5, "stats": torch.ones(3, 1, 1, 1), "dy": torch.ones_like(inputs["x"])}
    with emulator.only_asking(shares), pytest.raises(InterruptedError):
        emulator.call("timestep_norm_bwd", **inputs, **results)
    assert shares[0] >= 2 * inputs["x"].nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_groups_than_a_warp_holds(emulator, dtype):
    case = timestep_norm_case(B=1, L=TILE + 5, G=37, width=vector(dtype), dtype=dtype)
    assert_matches_reference(run_emulated(emulator, case), case)


# Multiples of warps and tiles, and their neighbours.
LENGTHS = st.sampled_from([0, 1, 2, 7, 8, 9, 56, 63, 64, 65, 120, 127, 128, 129, 200])


@st.composite
def tiled_cases(draw) -> Case:
    lengths = draw(st.lists(LENGTHS, min_size=1, max_size=4))
    before, after = draw(st.integers(0, 9)), draw(st.integers(0, 9))
    cu_seqlens = list(itertools.accumulate(lengths, initial=before))
    sizes = {"B": 1, "L": cu_seqlens[-1] + after, "G": draw(st.sampled_from([1, 3])), "width": draw(st.integers(1, 2))}
    count = draw(st.sampled_from([None, 0, 3]))
    return timestep_norm_case(**sizes, count=count, cu_seqlens=cu_seqlens, dtype=torch.float64)


def test_sequences_that_begin_and_end_anywhere_in_tiles(emulated_module):
    emulator = Emulator(emulated_module)

    @given(case=tiled_cases(), order=st.sampled_from(ORDERS))
    def check(case, order):
        emulator.set_order(order)
        assert_matches_reference(run_emulated(emulator, case), case)

    check()


@pytest.mark.slow
def test_more_tiles_than_scan_threads_and_shares(emulator):
    """The CPU kernels in float64 are the reference, since plain torch is slow at this length."""
    tokens = 257 * TILE + 70  # two tiles a share, one in the last
    case = timestep_norm_case(
        B=1, L=tokens, G=1, width=1, dtype=torch.float64, count=3, cu_seqlens=[5, 40 * TILE + 3, tokens - 1]
    )
    assert_all_close(run_emulated(emulator, case), evaluate(mo.timestep_norm, case), tolerance=1e-10, terms=case.terms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_orders_of_threads_give_equal_bits(emulator, dtype):
    case = timestep_norm_case(B=3, L=TILE + 9, G=3, width=16, lengths=[TILE + 9, 0, 30], dtype=dtype, count=2)
    assert_equal_in_every_order(emulator, lambda: run_emulated(emulator, case))


@pytest.mark.parametrize(("B", "L"), [(70, 1), (3, 32), (1, TILE)])
def test_one_launch_where_no_sequence_crosses_tiles(emulator, B, L):
    case = timestep_norm_case(B=B, L=L, G=2, width=8, count=5)
    run_emulated(emulator, case, forward)
    (traffic,) = emulator.module.traffic().values()
    assert "y" in traffic and "workspace" not in traffic


def footprint(emulator, kernel: str) -> int:
    """Bytes of all different sectors that `kernel` loads or stores: its traffic with perfect caches."""
    return sum(t["load_footprint"] + t["store_footprint"] for t in emulator.traffic(kernel).values())


WIDE = [pytest.param(torch.bfloat16, 64, id="bfloat16-64"), pytest.param(torch.float32, 32, id="float32-32")]


@pytest.mark.parametrize(("dtype", "width"), WIDE)
def test_bytes_moved_by_the_forward(emulator, dtype, width):
    """y is written once, x is read once by each of two kernels; other traffic is small."""
    case = timestep_norm_case(B=1, L=6 * TILE, G=8, width=width, dtype=dtype)
    run_emulated(emulator, case, forward)
    x = case.tensors["x"].nbytes
    stats = 3 * 6 * TILE * 8 * 4  # three numbers of 4 bytes for each token and group
    kernels = [f"timestep_norm_{name}_kernel" for name in ("fwd_moments", "fwd", "carry")]
    moments, final, _ = kernels
    assert emulator.sectors(moments, "x", "load") == x
    assert emulator.sectors(final, "x", "load") == x
    assert emulator.sectors(final, "y", "store") == x
    assert sum(footprint(emulator, kernel) for kernel in kernels) - x <= 1.15 * (2 * x + stats)


@pytest.mark.parametrize(("dtype", "width"), WIDE)
def test_bytes_moved_by_the_backward(emulator, dtype, width):
    """dx is written once; x, dy and the statistics are read once by each of two kernels; other traffic is small."""
    case = timestep_norm_case(B=1, L=6 * TILE, G=8, width=width, dtype=dtype)
    run_emulated(emulator, case)
    x = case.tensors["x"].nbytes
    stats = 3 * 6 * TILE * 8 * 4  # three numbers of 4 bytes for each token and group
    kernels = [f"timestep_norm_{name}_kernel" for name in ("bwd_sums", "bwd", "carry")]
    sums, final, _ = kernels
    for kernel in (sums, final):
        assert emulator.sectors(kernel, "x", "load") == x
        assert emulator.sectors(kernel, "dy", "load") == x
    assert emulator.sectors(final, "dx", "store") == x
    moved = sum(footprint(emulator, kernel) for kernel in [*kernels, "sum_shares_kernel"])
    assert moved - 2 * x - stats <= 1.15 * (3 * x + stats)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_bank_conflicts(emulator, dtype):
    run_emulated(emulator, timestep_norm_case(B=1, L=3 * TILE, G=8, width=32, dtype=dtype))
    names = ("fwd_moments", "fwd", "bwd_sums", "bwd")
    assert_no_bank_conflicts(emulator, *(f"timestep_norm_{name}_kernel" for name in names))
