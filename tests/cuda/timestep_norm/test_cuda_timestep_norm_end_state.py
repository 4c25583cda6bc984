"""Emulated CUDA kernels of timestep_norm_end_state: every path, sequences across tiles, bytes moved.

The public op on these kernels: test_ops.py, test_end_states.py. Orders of threads: test_cuda_ops.py.
"""

import pytest
import torch
from assertions import assert_matches_reference
from calls import forward
from cases import timestep_norm_end_state_case
from emulated import ORDERS, assert_no_bank_conflicts, run_emulated
from emulator.device import Emulator
from hypothesis import given
from hypothesis import strategies as st
from test_cuda_timestep_norm import DTYPES, EIGHT_SEQUENCES, TILE, WIDE, WIDTHS, footprint, tiled_cases, vector


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_division_of_a_row(emulator, dtype, width):
    """Three groups, which leave lanes of a warp idle; two tiles, the second one short; one sequence, then eight."""
    sizes = dict(B=1, L=TILE + 5, G=3, width=width(vector(dtype)), dtype=dtype)
    case = timestep_norm_end_state_case(**sizes)
    assert_matches_reference(run_emulated(emulator, case), case)
    case = timestep_norm_end_state_case(**sizes, cu_seqlens=EIGHT_SEQUENCES)
    assert_matches_reference(run_emulated(emulator, case, offset=1), case)


def test_sequences_that_begin_and_end_anywhere_in_tiles(emulated_module):
    emulator = Emulator(emulated_module)

    @given(case=tiled_cases(), order=st.sampled_from(ORDERS))
    def check(case, order):
        sizes = {"G": case.options["num_groups"], "width": case.tensors["x"].shape[2] // case.options["num_groups"]}
        L, cu_seqlens = case.tensors["x"].shape[1], case.options["cu_seqlens"].tolist()
        case = timestep_norm_end_state_case(B=1, L=L, cu_seqlens=cu_seqlens, **sizes, dtype=case.dtype)
        emulator.set_order(order)
        assert_matches_reference(run_emulated(emulator, case), case)

    check()


@pytest.mark.parametrize(("dtype", "width"), WIDE)
def test_bytes_moved_by_the_forward(emulator, dtype, width):
    """x is read once, and again in the last of six tiles; other traffic is small."""
    case = timestep_norm_end_state_case(B=1, L=6 * TILE, G=8, width=width, dtype=dtype)
    run_emulated(emulator, case, forward)
    x = case.tensors["x"].nbytes
    kernels = [f"timestep_norm_{name}_kernel" for name in ("fwd_moments", "end_state", "carry")]
    assert emulator.launched() == set(kernels)
    assert emulator.sectors(kernels[0], "x", "load") == x
    assert emulator.sectors(kernels[1], "x", "load") == x // 6
    assert sum(footprint(emulator, kernel) for kernel in kernels) - x // 6 <= 1.15 * x


@pytest.mark.parametrize(("dtype", "width"), WIDE)
def test_bytes_moved_by_the_backward(emulator, dtype, width):
    case = timestep_norm_end_state_case(B=1, L=6 * TILE, G=8, width=width, dtype=dtype)
    run_emulated(emulator, case)
    x = case.tensors["x"].nbytes
    kernel = "timestep_norm_end_state_bwd_kernel"
    assert emulator.sectors(kernel, "x", "load") == emulator.sectors(kernel, "dx", "store") == x
    assert footprint(emulator, kernel) <= 1.05 * 2 * x


def test_one_launch_where_no_sequence_crosses_tiles(emulator):
    run_emulated(emulator, timestep_norm_end_state_case(B=3, L=32, G=2, width=8), forward)
    assert emulator.launched() == {"timestep_norm_end_state_kernel"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_no_bank_conflicts(emulator, dtype):
    run_emulated(emulator, timestep_norm_end_state_case(B=1, L=3 * TILE, G=8, width=32, dtype=dtype))
    assert_no_bank_conflicts(emulator, "timestep_norm_end_state_kernel", "timestep_norm_end_state_bwd_kernel")
