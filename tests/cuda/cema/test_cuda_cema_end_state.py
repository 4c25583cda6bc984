"""Emulated CUDA kernels of cema_end_state: every template, sequences against tiles, bytes moved.

The public op on these kernels: test_ops.py, test_end_states.py. Orders of threads: test_cuda_ops.py.
"""

import pytest
import torch
from assertions import assert_bit_equal, assert_matches_reference
from calls import forward
from cases import cema_end_state_case
from emulated import assert_no_bank_conflicts, run_emulated
from test_cuda_cema import DTYPES, MANY_MODES, MODES, SEQUENCES, TILES

import megalodon_ops as mo
from megalodon_ops import _C

FORWARD = {f"cema_{name}_kernel" for name in ("table", "local", "carry", "ends")}
BACKWARD = {f"cema_{name}_kernel" for name in ("table", "local", "carry", "output", "sums", "finish")}


@pytest.mark.parametrize("N", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_number_of_modes_and_type(emulator, dtype, N):
    """Several tiles; vector and scalar accesses."""
    case = cema_end_state_case(B=1, L=67, D=4, N=N, dtype=dtype)
    actual = run_emulated(emulator, case)
    assert emulator.launched() == FORWARD | BACKWARD
    assert_matches_reference(actual, case)
    assert_bit_equal(run_emulated(emulator, case, offset=1), actual)


def test_few_tokens_take_the_scan(emulator):
    run_emulated(emulator, cema_end_state_case(B=3, L=1, D=4, N=4), forward)
    assert emulator.launched() == {"cema_table_kernel", "cema_ends_kernel"}


@pytest.mark.parametrize(("dtype", "sequences"), MANY_MODES.values(), ids=MANY_MODES)
def test_more_modes_than_a_launch_takes(emulator, dtype, sequences):
    case = cema_end_state_case(**sequences, D=3, N=70, dtype=dtype)
    assert_matches_reference(run_emulated(emulator, case), case)


CHANNELS = [(1, "starts-in-tiles"), *((6, sequences) for sequences in SEQUENCES), (70, "several-in-a-tile")]


@pytest.mark.parametrize(("D", "sequences"), CHANNELS)
def test_sequences_against_tiles(emulator, D, sequences):
    sequences = SEQUENCES[sequences]
    case = cema_end_state_case(**sequences, D=D, N=5)
    assert_matches_reference(run_emulated(emulator, case), case)


@pytest.mark.parametrize("tile", TILES[1:])
def test_sequences_against_longer_tiles(emulator, tile):
    """A sequence that fills tiles, sequences inside one tile, padding, and a short last tile."""
    ends = [3, 2 * tile + 9, 2 * tile + 9, 2 * tile + 20, 3 * tile + 5]
    case = cema_end_state_case(B=1, L=3 * tile + 7, D=2, N=3, radius=(0.9, 1.0), cu_seqlens=ends)
    with emulator.launch_sizes(cema_tile=tile):
        assert_matches_reference(run_emulated(emulator, case), case)


def test_small_weights_keep_their_gradients(emulator):
    """p and Im(q) near 0: the kernel must not divide a gradient by them."""
    case = cema_end_state_case(B=1, L=100, D=3, N=4)
    zero = torch.tensor([0.0, 1e-30, 1e-6, 1.0])
    q = torch.complex(case.tensors["q"].real, case.tensors["q"].imag * zero)
    case = case.with_tensors(p=case.tensors["p"] * zero.flip(0), q=q)
    assert_matches_reference(run_emulated(emulator, case), case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_moved_by_the_forward(emulator, dtype):
    """x is read once, and again in the two of six tiles where sequences end; only states are written."""
    B, D, N = 2, 32, 16
    case = cema_end_state_case(B=B, L=96, D=D, N=N, dtype=dtype)
    run_emulated(emulator, case, forward)
    x = case.tensors["x"].nbytes
    state = B * D * N * 8  # a complex number has 8 bytes
    assert emulator.sectors("cema_local_kernel", "x", "load") == x
    assert emulator.sectors("cema_ends_kernel", "x", "load") == x // 3
    assert emulator.traffic("cema_ends_kernel")["state_out"]["store_bytes"] == state
    traffic = [item for kernel in emulator.launched() for item in emulator.traffic(kernel).items()]
    written = {name for name, t in traffic if t["store_bytes"]}
    assert written == {"workspace", "state_out"}


def test_bytes_moved_by_the_backward(emulator):
    """x is read for the states, for dp and for dq; dx is written once."""
    case = cema_end_state_case(B=2, L=64, D=32, N=16, dtype=torch.bfloat16)
    with emulator.replacing(_C):
        leaves = {name: t.clone().requires_grad_() for name, t in case.tensors.items()}
        state = mo.cema_end_state(*leaves.values())
        emulator.module.reset_counters()
        state.abs().sum().backward()
    x = case.tensors["x"].nbytes
    for kernel in ("cema_local_kernel", "cema_output_kernel", "cema_sums_kernel"):
        assert emulator.sectors(kernel, "x", "load") == x, kernel
    assert emulator.sectors("cema_output_kernel", "dx", "store") == x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_no_bank_conflicts(emulator, dtype):
    run_emulated(emulator, cema_end_state_case(B=1, L=35, D=34, N=16, dtype=dtype))
    assert_no_bank_conflicts(emulator, *FORWARD - {"cema_table_kernel"})
