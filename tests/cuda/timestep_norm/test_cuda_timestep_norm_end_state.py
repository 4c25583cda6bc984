"""Emulated CUDA kernels of timestep_norm_end_state: every path, sequences across tiles, bytes moved.

The public op on these kernels: test_ops.py, test_end_states.py. Orders of threads: test_cuda_ops.py.
"""

import pytest
import torch
from assertions import assert_matches_reference
from calls import evaluate, forward
from cases import timestep_norm_end_state_case
from emulator.device import Emulator
from hypothesis import given
from hypothesis import strategies as st
from test_cuda_timestep_norm import DTYPES, TILE, WIDE, WIDTHS, footprint, tiled_cases, vector

import megalodon_ops as mo
from megalodon_ops import _C


def run_emulated(emulator, case, offset=0, run=evaluate):
    with emulator.replacing(_C, offset=offset):
        return run(mo.timestep_norm_end_state, case)


def launched_kernels(emulator):
    return set(emulator.module.traffic())


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_division_of_a_row(emulator, dtype, width):
    """Three groups, which leave lanes of a warp idle; two tiles, the second one short."""
    case = timestep_norm_end_state_case(B=1, L=TILE + 5, G=3, width=width(vector(dtype)), dtype=dtype)
    actual = run_emulated(emulator, case)
    assert_matches_reference(actual, case)
    assert_matches_reference(run_emulated(emulator, case, offset=1), case)


def test_sequences_that_begin_and_end_anywhere_in_tiles(emulated_module):
    emulator = Emulator(emulated_module)

    @given(case=tiled_cases(), order=st.sampled_from(["forward", "reverse", "random"]))
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
    run_emulated(emulator, case, run=forward)
    x = case.tensors["x"].nbytes
    kernels = [f"timestep_norm_{name}_kernel" for name in ("fwd_moments", "end_state", "carry")]
    assert launched_kernels(emulator) == set(kernels)
    assert emulator.sectors(kernels[0], "x", "load") == x
    assert emulator.sectors(kernels[1], "x", "load") == x // 6
    assert sum(footprint(emulator, kernel) for kernel in kernels) - x // 6 <= 1.15 * x


@pytest.mark.parametrize(("dtype", "width"), WIDE)
def test_bytes_moved_by_the_backward(emulator, dtype, width):
    case = timestep_norm_end_state_case(B=1, L=6 * TILE, G=8, width=width, dtype=dtype)
    run_emulated(emulator, case)
    x, kernel = case.tensors["x"].nbytes, "timestep_norm_end_state_bwd_kernel"
    assert emulator.sectors(kernel, "x", "load") == emulator.sectors(kernel, "dx", "store") == x
    assert footprint(emulator, kernel) <= 1.05 * 2 * x


def test_one_launch_where_no_sequence_crosses_tiles(emulator):
    run_emulated(emulator, timestep_norm_end_state_case(B=3, L=32, G=2, width=8), run=forward)
    assert launched_kernels(emulator) == {"timestep_norm_end_state_kernel"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_no_bank_conflicts(emulator, dtype):
    run_emulated(emulator, timestep_norm_end_state_case(B=1, L=3 * TILE, G=8, width=32, dtype=dtype))
    for kernel in ("timestep_norm_end_state_kernel", "timestep_norm_end_state_bwd_kernel"):
        sites = [site for site in emulator.sites(kernel) if site["shared"]]
        assert sites
        for site in sites:
            assert site["transactions"] <= site["ideal"], site
