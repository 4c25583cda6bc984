"""The CUDA kernels of end states, emulated: every template, sequences against tiles, orders of threads, bytes moved.

test_ops.py and test_end_states.py show that the public ops on these kernels keep what they promise.
"""

from __future__ import annotations

import pytest
import torch
from assertions import assert_bit_equal
from cases import cema_end_state_case, evaluate, forward, timestep_norm_end_state_case
from cuda_emulator.emulator import Emulator
from hypothesis import given
from hypothesis import strategies as st
from test_cuda_cema import SEQUENCES, TILES
from test_cuda_timestep_norm import DTYPES, TILE, WIDE, WIDTHS, footprint, sectors, tiled_cases, vector
from test_ops import assert_matches_reference

import megalodon_ops as mo
from megalodon_ops import _C

ORDERS = ("forward", "reverse", "random")
CEMA_FORWARD = {f"cema_{name}_kernel" for name in ("table", "local", "carry", "ends")}
CEMA_BACKWARD = {f"cema_{name}_kernel" for name in ("table", "local", "carry", "output", "sums", "finish")}


def emulated(emulator, case, offset=0, run=evaluate):
    with emulator.replacing(_C, offset=offset):
        return run(getattr(mo, case.op), case)


def launched(emulator):
    return set(emulator.module.traffic())


@pytest.mark.parametrize("N", [3, 8, 11, 17])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_number_of_modes_and_type(emulator, dtype, N):
    """Templates of 4, 8, 16 and 32 modes, over several tiles; pairs of channels, by vector and by scalar accesses."""
    case = cema_end_state_case(B=1, L=99, D=4, N=N, dtype=dtype)
    actual = emulated(emulator, case)
    assert launched(emulator) == CEMA_FORWARD | CEMA_BACKWARD
    assert_matches_reference(actual, case)
    assert_bit_equal(emulated(emulator, case, offset=1), actual)


def test_the_forward_alone_and_few_steps_take_the_scan(emulator):
    emulated(emulator, cema_end_state_case(B=3, L=1, D=4, N=4), run=forward)
    assert launched(emulator) == {"cema_table_kernel", "cema_ends_kernel"}


@pytest.mark.parametrize("sequences", [{"B": 2, "L": 40}, {"B": 1, "cu_seqlens": [1, 4, 4, 40, 70], "L": 80}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_more_modes_than_a_launch_takes(emulator, dtype, sequences):
    case = cema_end_state_case(**sequences, D=3, N=70, dtype=dtype)
    assert_matches_reference(emulated(emulator, case), case)


@pytest.mark.parametrize("D", [1, 6, 70])
@pytest.mark.parametrize("sequences", SEQUENCES.values(), ids=SEQUENCES)
def test_sequences_of_cema_against_tiles(emulator, sequences, D):
    case = cema_end_state_case(**sequences, D=D, N=5)
    assert_matches_reference(emulated(emulator, case), case)


@pytest.mark.parametrize("tile", TILES[1:])
def test_sequences_of_cema_against_longer_tiles(emulator, tile):
    """A sequence that fills tiles, some that begin and end inside of one, padding, and a last tile that is cut short."""
    ends = [3, 2 * tile + 9, 2 * tile + 9, 2 * tile + 20, 3 * tile + 5]
    case = cema_end_state_case(B=1, L=3 * tile + 7, D=2, N=3, radius=(0.9, 1.0), cu_seqlens=ends)
    with emulator.launch_sizes(cema_tile=tile):
        assert_matches_reference(emulated(emulator, case), case)


def test_small_weights_keep_their_gradients(emulator):
    """p and Im(q) of 0, by which a state's gradient cannot be divided."""
    case = cema_end_state_case(B=1, L=100, D=3, N=4)
    zero = torch.tensor([0.0, 1e-30, 1e-6, 1.0])
    q = torch.complex(case.tensors["q"].real, case.tensors["q"].imag * zero)
    case = case.with_tensors(p=case.tensors["p"] * zero.flip(0), q=q)
    assert_matches_reference(emulated(emulator, case), case)


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_way_to_share_a_row(emulator, dtype, width):
    """Three groups, which leave lanes of a warp over; two tiles, of which the second is cut short."""
    case = timestep_norm_end_state_case(B=1, L=TILE + 5, G=3, width=width(vector(dtype)), dtype=dtype)
    actual = emulated(emulator, case)
    assert_matches_reference(actual, case)
    assert_matches_reference(emulated(emulator, case, offset=1), case)


def test_sequences_of_timestep_norm_that_begin_and_end_anywhere_in_tiles(emulated_module):
    emulator = Emulator(emulated_module)

    @given(case=tiled_cases(), order=st.sampled_from(ORDERS))
    def check(case, order):
        sizes = {"G": case.options["num_groups"], "width": case.tensors["x"].shape[2] // case.options["num_groups"]}
        L, cu_seqlens = case.tensors["x"].shape[1], case.options["cu_seqlens"].tolist()
        case = timestep_norm_end_state_case(B=1, L=L, cu_seqlens=cu_seqlens, **sizes, dtype=case.dtype)
        emulator.set_order(order)
        assert_matches_reference(emulated(emulator, case), case)

    check()


CASES = {
    "cema": cema_end_state_case(B=1, L=130, D=5, N=16, cu_seqlens=[2, 40, 40, 105, 125]),
    "timestep_norm": timestep_norm_end_state_case(B=3, L=TILE + 9, G=3, width=16, lengths=[TILE + 9, 0, 30]),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_orders_of_threads_give_equal_bits(emulator, case):
    results = []
    for order in ORDERS:
        emulator.set_order(order)
        results.append(emulated(emulator, case))
    assert_bit_equal(results[1], results[0])
    assert_bit_equal(results[2], results[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_moved_by_the_forward_of_cema(emulator, dtype):
    """x is read once, and again in the two of ten tiles in which the sequences end; nothing of x's size is written."""
    case = cema_end_state_case(B=2, L=160, D=64, N=16, dtype=dtype)
    emulated(emulator, case, run=forward)
    x, state = case.tensors["x"].nbytes, 2 * 64 * 16 * 8
    assert sectors(emulator, "cema_local_kernel", "x", "load") == x
    assert sectors(emulator, "cema_ends_kernel", "x", "load") == x // 5
    assert emulator.traffic("cema_ends_kernel")["state_out"]["store_bytes"] == state
    written = {
        name for kernel in launched(emulator) for name, t in emulator.traffic(kernel).items() if t["store_bytes"]
    }
    assert written == {"workspace", "state_out"}


def test_bytes_moved_by_the_backward_of_cema(emulator):
    """No dy: x is read for the states, for dp and for dq; dx is written once."""
    case = cema_end_state_case(B=2, L=160, D=64, N=16, dtype=torch.bfloat16)
    with emulator.replacing(_C):
        leaves = {name: t.clone().requires_grad_() for name, t in case.tensors.items()}
        state = mo.cema_end_state(*leaves.values())
        emulator.module.reset_counters()
        state.abs().sum().backward()
    x = case.tensors["x"].nbytes
    for kernel in ("cema_local_kernel", "cema_output_kernel", "cema_sums_kernel"):
        assert sectors(emulator, kernel, "x", "load") == x, kernel
    assert sectors(emulator, "cema_output_kernel", "dx", "store") == x


@pytest.mark.parametrize(("dtype", "width"), WIDE)
def test_bytes_moved_by_the_forward_of_timestep_norm(emulator, dtype, width):
    """x is read once, and again in the last of six tiles; all else is small."""
    case = timestep_norm_end_state_case(B=1, L=6 * TILE, G=8, width=width, dtype=dtype)
    emulated(emulator, case, run=forward)
    x = case.tensors["x"].nbytes
    kernels = [f"timestep_norm_{name}_kernel" for name in ("fwd_moments", "end_state", "carry")]
    assert launched(emulator) == set(kernels)
    assert sectors(emulator, kernels[0], "x", "load") == x
    assert sectors(emulator, kernels[1], "x", "load") == x // 6
    assert sum(footprint(emulator, kernel) for kernel in kernels) - x // 6 <= 1.15 * x


@pytest.mark.parametrize(("dtype", "width"), WIDE)
def test_bytes_moved_by_the_backward_of_timestep_norm(emulator, dtype, width):
    case = timestep_norm_end_state_case(B=1, L=6 * TILE, G=8, width=width, dtype=dtype)
    emulated(emulator, case)
    x, kernel = case.tensors["x"].nbytes, "timestep_norm_end_state_bwd_kernel"
    assert sectors(emulator, kernel, "x", "load") == sectors(emulator, kernel, "dx", "store") == x
    assert footprint(emulator, kernel) <= 1.05 * 2 * x


def test_one_launch_where_no_sequence_passes_from_tile_to_tile(emulator):
    emulated(emulator, timestep_norm_end_state_case(B=3, L=32, G=2, width=8), run=forward)
    assert launched(emulator) == {"timestep_norm_end_state_kernel"}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_no_bank_conflicts(emulator, case):
    emulated(emulator, case)
    kernels = {kernel for kernel in launched(emulator) if "ends" in kernel or "end_state" in kernel}
    shared = [site for kernel in kernels for site in emulator.sites(kernel) if site["shared"]]
    assert {site["kernel"] for site in shared} == kernels
    for site in shared:
        assert site["transactions"] <= site["ideal"], site
