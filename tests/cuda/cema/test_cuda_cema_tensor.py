"""Sums of cema's backward on emulated tensor cores: cuda/cema/cema_mma.cuh."""

import pytest
import torch
from assertions import assert_all_close, assert_as_accurate_as, assert_bit_equal, references
from calls import evaluate
from cases import cema_case
from emulated import A100, ORDERS
from emulator.device import Emulator
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cuda_cema import gradients_of_y

import megalodon_ops as mo
from megalodon_ops import _C

TENSOR = {"cema_tiles_kernel", "cema_cross_kernel"}
SCAN = {"cema_sums_kernel"}
LIMITS = {4: (4, 8), 2: (2, 0.5)}  # (factor, floor) of assert_as_accurate_as for results in 32 and in 16 bits


def tensor_case(**sizes):
    return cema_case(**{"dtype": torch.bfloat16, "D": 8, **sizes})


def run_emulated(emulator, case, offset=0, order="random", shared_limit=A100, **sizes):
    """The gradients, and the kernels launched so far; `sizes` are LAUNCH_SIZEs."""
    emulator.set_order(order, shared_limit=shared_limit)
    with emulator.replacing(_C, offset=offset), emulator.launch_sizes(**{"cema_tile": 128} | sizes):
        found = gradients_of_y(mo.cema, case)
    return found, emulator.launched()


def assert_matches_reference(actual, case, limits=LIMITS, run=gradients_of_y):
    same, exact = references(case, run)
    for name, value in actual.items():
        factor, floor = limits[2 if value.dtype.itemsize == 2 else 4]
        assert_as_accurate_as(value, same[name], exact[name], factor=factor, floor=floor, terms=case.terms, name=name)


SIZES = {
    "tiles-alone": {"B": 2, "L": 128, "N": 16},
    "one-mode": {"B": 1, "L": 256, "N": 1},
    "starts-in-a-group": {"B": 3, "L": 256, "N": 6},
    "three-blocks-of-channels": {"B": 1, "L": 256, "D": 40, "N": 11},
    "groups-of-tiles": {"B": 1, "L": 1280, "N": 3},
    "starts-in-the-second-group": {"B": 4, "L": 384, "N": 2, "radius": (0.999, 1.0), "angle": (-0.01, 0.01)},
    "all-modes-of-a-launch": {"B": 2, "L": 128, "N": 20},
    "two-launches": {"B": 1, "L": 256, "N": 37},
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_gradients(emulator, sizes):
    case = tensor_case(**sizes)
    actual, launched = run_emulated(emulator, case)
    assert launched >= TENSOR and not launched & SCAN
    assert_matches_reference(actual, case)


@pytest.mark.parametrize("tiles", [9, 17])
def test_a_share_takes_several_groups_of_tiles(emulator, tiles):
    """One share adds up groups of eight tiles."""
    case = tensor_case(B=1, L=tiles * 128, N=1)
    actual, _ = run_emulated(emulator, case, cema_shares=1)
    assert_matches_reference(actual, case)


def test_three_shares_one_of_them_empty(emulator):
    case = tensor_case(B=1, L=9 * 128, N=2)
    actual, _ = run_emulated(emulator, case, cema_shares=3)
    assert_matches_reference(actual, case)


@pytest.mark.slow
def test_two_rounds_of_the_carry(emulator):
    """More than 128 tiles, poles that remember all of them; compared with the scan, which misaligned tensors take."""
    case = tensor_case(B=1, L=129 * 128, N=1, radius=(1.0, 1.0), angle=(-0.01, 0.01))
    actual, launched = run_emulated(emulator, case)
    expected, others = run_emulated(emulator, case, offset=1)
    assert launched >= TENSOR and others >= SCAN
    for name, value in actual.items():
        close = 1e-2 if value.dtype == torch.bfloat16 else 1e-4
        assert_all_close({name: value}, {name: expected[name]}, tolerance=close, terms=case.terms)


POLES = {
    "slow": {"radius": (1 - 1e-5, 1 - 1e-5), "angle": (0.0, 1e-4)},
    "on-the-circle": {"radius": (1.0, 1.0), "angle": (-3.1, 3.1)},
    "real": {"radius": (0.9, 1.0), "angle": (0.0, 0.0)},
}


@pytest.mark.parametrize("poles", POLES.values(), ids=POLES)
def test_long_memory_is_as_accurate_as_the_direct_form(emulator, poles):
    case = tensor_case(B=1, L=640, N=4, **poles)
    actual, _ = run_emulated(emulator, case)
    assert_matches_reference(actual, case, limits={4: (1, 4), 2: (1, 0.6)})


# Cases that take the scan: sizes, options of `run_emulated`.
SCANNED = {
    "fp16": ({"dtype": torch.float16}, {}),
    "float32": ({"dtype": torch.float32}, {}),
    "state": ({"state": True}, {}),
    "packed": ({"B": 1, "L": 256, "cu_seqlens": [0, 128, 256]}, {}),
    "lengths": ({"lengths": [128, 3]}, {}),
    "cut-tile": ({"L": 130}, {}),
    "whole-tiles-of-cut-rows": ({"L": 192}, {}),
    "short-tiles": ({}, {"cema_tile": 64}),
    "one-tile": ({"B": 1}, {}),
    "channels": ({"D": 10}, {}),
    "misaligned": ({}, {"offset": 1}),
    "small-card": ({}, {"shared_limit": 99 * 1024}),
}


@pytest.mark.parametrize(("sizes", "options"), SCANNED.values(), ids=SCANNED)
def test_cases_that_take_the_scan(emulator, sizes, options):
    case = tensor_case(**{"B": 2, "L": 128, "N": 3, **sizes})
    actual, launched = run_emulated(emulator, case, **options)
    assert launched >= SCAN and not launched & TENSOR
    assert_matches_reference(actual, case)


def test_a_gradient_of_the_final_state_takes_the_scan(emulator):
    """At a size for which the gradient of y alone takes tensor cores."""
    case = tensor_case(B=8, L=128, N=5)
    emulator.set_order("random", shared_limit=A100)
    with emulator.replacing(_C), emulator.launch_sizes(cema_tile=128):
        actual = evaluate(mo.cema, case)
    assert emulator.launched() >= SCAN and not emulator.launched() & TENSOR
    assert_matches_reference(actual, case, run=evaluate)


@pytest.mark.slow
def test_random_dense_shapes(emulated_module):
    """Around the units of all kernels: tiles, groups of tiles, blocks of channels, modes of a launch."""
    emulator = Emulator(emulated_module)

    @settings(max_examples=150)
    @given(
        B=st.integers(1, 9),
        L=st.one_of(st.integers(1, 6).map(lambda halves: 64 * halves), st.integers(1, 300)),
        D=st.sampled_from([2, 6, 8, 16, 24]),
        N=st.one_of(st.integers(1, 20), st.integers(21, 66)),
    )
    def check(B, L, D, N):
        case = tensor_case(B=B, L=L, D=D, N=N)
        assert_matches_reference(run_emulated(emulator, case)[0], case)

    check()


def test_orders_of_threads_give_equal_bits(emulator):
    case = tensor_case(B=2, L=128, D=24, N=3)
    results = [run_emulated(emulator, case, order=order, cema_shares=1)[0] for order in ORDERS]
    for other in results[1:]:
        assert_bit_equal(other, results[0])


def test_bytes_moved_and_bank_conflicts(emulator):
    """x and dy are read once; ends and slopes of both scans are written once and read once."""
    L, D, N, tile, sector = 1024, 32, 16, 128, 32
    case = tensor_case(B=1, L=L, D=D, N=N)
    run_emulated(emulator, case)
    x = case.tensors["x"].nbytes
    assert emulator.sectors("cema_tiles_kernel", "x", "load") == x
    assert emulator.sectors("cema_tiles_kernel", "dy", "load") == x
    pairs = L // tile * D * N * 8  # bytes of the states of one scan
    lags = tile * D * 4  # a warp stores two channels of a sector
    assert emulator.sectors("cema_tiles_kernel", "workspace", "store") == 4 * pairs + 4 * lags + 2 * sector
    sums = 4 * N * D // 2 * sector  # two channels a sector
    assert emulator.sectors("cema_cross_kernel", "workspace", "store") == pairs + sums
    shared = [site for kernel in TENSOR for site in emulator.sites(kernel) if site["shared"]]
    assert {site["kernel"] for site in shared} == TENSOR
    # One load of x: lanes that skip reads before a tile's start are counted with earlier loads of other lanes.
    conflicts = [site for site in shared if site["transactions"] != site["ideal"]]
    assert len(conflicts) == 1 and not conflicts[0]["store"], conflicts
