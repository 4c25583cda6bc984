"""Outputs of cema, and dx, on emulated tensor cores: cuda/cema/cema_mma_scan.cuh."""

from functools import partial

import megalodon_ops as mo
import pytest
import torch
from assertions import assert_as_accurate_as, assert_bit_equal, every_case, references
from calls import forward
from cases import cema_case, generator, randn
from emulated import A100, ORDERS, assert_no_bank_conflicts
from megalodon_ops import _C
from test_cuda_cema_tensor import POLES as LONG_POLES

LOCAL, OUTPUT = "cema_mma_local_kernel", "cema_mma_output_kernel"
SCAN = {"cema_local_kernel", "cema_output_kernel"}


def tensor_case(**sizes):
    return cema_case(**{"dtype": torch.bfloat16, "B": 8, "L": 128, "D": 8, "N": 5, **sizes})


def output(function, case):
    with torch.no_grad():
        return forward(function, case)


def dx_of_y(function, case, dy=None):
    leaf = case.tensors["x"].detach().requires_grad_()
    y = function(**case.tensors | {"x": leaf}, **case.options)
    dy = randn(generator(1), *y.shape, dtype=torch.bfloat16) if dy is None else dy
    return {"dx": torch.autograd.grad(y, leaf, dy.to(y.dtype))[0]}


def run_emulated(emulator, case, run=output, *, offset=0, order="random", shared_limit=A100):
    """The results of `run` and the launched kernels."""
    emulator.reset()
    emulator.set_order(order, shared_limit=shared_limit)
    with emulator.replacing(_C, offset=offset), emulator.launch_sizes(cema_tile=128):
        found = run(mo.cema, case)
    return found, emulator.launched()


def beyond_rounding(actual, exact):
    """The largest error beyond half the spacing of bf16 (8 bits), in units of the largest value."""
    half = torch.exp2(torch.frexp(exact.abs()).exponent.double() - 9)
    return ((actual.double() - exact).abs() - half).max().item() / exact.abs().max().item()


def assert_as_accurate_as_the_scan(emulator, case, run=output):
    """Errors beyond one rounding are at most 2^-15, and at most twice the scan's, which misaligned tensors take."""
    actual, launched = run_emulated(emulator, case, run)
    scanned, others = run_emulated(emulator, case, run, offset=1)
    assert OUTPUT in launched and "cema_output_kernel" not in launched and "cema_output_kernel" in others
    same, exact = references(case, run)
    for name, value in actual.items():
        if value.dtype == torch.bfloat16:
            assert beyond_rounding(value, exact[name]) <= 2**-15
            error = (value - exact[name]).abs().max()
            assert error <= 2 * (scanned[name] - exact[name]).abs().max()
        else:
            assert_as_accurate_as(value, same[name], exact[name], factor=4, floor=8, name=name)


SIZES = {
    "half-a-product": {"B": 1, "L": 1024, "N": 16},
    "tiles-alone": {"D": 16, "N": 9},
    "starts-in-a-product-and-two-blocks-of-channels": {"B": 3, "L": 384, "D": 24, "N": 8},
    "two-products-and-three-blocks-of-channels": {"B": 1, "L": 17 * 128, "D": 40},
    "three-products": {"B": 3, "L": 11 * 128},
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_outputs_and_end_states(emulator, sizes):
    assert_as_accurate_as_the_scan(emulator, tensor_case(**sizes))


@pytest.mark.parametrize("sizes", [SIZES["half-a-product"], SIZES["starts-in-a-product-and-two-blocks-of-channels"]])
def test_dx(emulator, sizes):
    assert_as_accurate_as_the_scan(emulator, tensor_case(**sizes), dx_of_y)


POLES = LONG_POLES | {"short": {"radius": (0.0, 0.1)}}


@pytest.mark.parametrize("poles", POLES.values(), ids=POLES)
def test_long_and_short_memory(emulator, poles):
    case = tensor_case(B=1, L=1152, N=16, **poles)
    assert_as_accurate_as_the_scan(emulator, case)
    assert_as_accurate_as_the_scan(emulator, case, dx_of_y)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_non_finite_values_reach_later_tokens_of_their_channel_only(emulator, value):
    """One value in each sequence, at the ends of blocks and tiles and between; the last sequence has none."""
    case = tensor_case(L=256)
    dy = randn(generator(1), 8, 256, 8, dtype=torch.bfloat16)
    tokens = torch.tensor([0, 5, 15, 16, 77, 127, 200])
    x = case.tensors["x"].clone()
    later = torch.zeros(8, 256, 8, dtype=torch.bool)  # positions that the values reach
    for i, token in enumerate(tokens):  # in sequence i and channel i
        x[i, token, i] = value
        later[i, token:, i] = True
    clean, _ = run_emulated(emulator, case)
    struck, _ = run_emulated(emulator, case.with_tensors(x=x))
    assert torch.equal(struck["y"][~later], clean["y"][~later])
    assert not struck["y"][later].isfinite().any()
    ends = later[:, -1, :, None].expand(8, 8, 5)
    assert torch.equal(struck["state"][~ends], clean["state"][~ends])
    assert not struck["state"][ends].isfinite().any()

    reversed_dy = torch.where(x.isfinite(), dy.flip(1), x).flip(1)
    clean, _ = run_emulated(emulator, case, partial(dx_of_y, dy=dy))
    struck, _ = run_emulated(emulator, case, partial(dx_of_y, dy=reversed_dy))
    assert torch.equal(struck["dx"][~later.flip(1)], clean["dx"][~later.flip(1)])
    assert not struck["dx"][later.flip(1)].isfinite().any()


def test_cases_that_take_the_scan(emulator):
    """Too few tiles or modes, too many modes, and the conditions of cema_mma.cuh."""
    cases = {
        "four-modes": ({"N": 4}, {}),
        "seventeen-modes": ({"N": 17}, {}),
        "seven-tiles": ({"B": 7}, {}),
        "cut-tile": ({"L": 130}, {}),
        "whole-tiles-of-cut-rows": ({"L": 192}, {}),
        "fp16": ({"dtype": torch.float16}, {}),
        "state": ({"state": True}, {}),
        "packed": ({"B": 1, "L": 1024, "cu_seqlens": [0, 128, 1024]}, {}),
        "lengths": ({"lengths": [128] * 7 + [3]}, {}),
        "channels": ({"D": 10}, {}),
        "x-misaligned": ({}, {"offset": {"x": 1}}),
        "y-misaligned": ({}, {"offset": {"y": 1}}),
        "small-card": ({}, {"shared_limit": 99 * 1024}),
    }
    with every_case() as each:
        for name, (sizes, options) in cases.items():
            with each(name):
                _, launched = run_emulated(emulator, tensor_case(**sizes), **options)
                assert launched >= SCAN and not launched & {LOCAL, OUTPUT}
        for name in ("dy", "dx"):
            with each(f"{name}-misaligned"):
                _, launched = run_emulated(emulator, tensor_case(), dx_of_y, offset={name: 1})
                assert "cema_output_kernel" in launched


def test_orders_of_threads_give_equal_bits(emulator):
    case = tensor_case(D=24)
    results = [run_emulated(emulator, case, order=order)[0] for order in ORDERS]
    for other in results[1:]:
        assert_bit_equal(other, results[0])


def test_bytes_moved_and_bank_conflicts(emulator):
    """Both phases read x once, y is written once; states are written once."""
    case = tensor_case(B=4, L=512, D=32, N=16)
    with torch.no_grad():
        run_emulated(emulator, case, lambda function, case: function(**case.tensors))
    x = case.tensors["x"].nbytes
    for kernel, name, access in ((LOCAL, "x", "load"), (OUTPUT, "x", "load"), (OUTPUT, "y", "store")):
        assert emulator.sectors(kernel, name, access) == x
    states = 16 * 32 * 16 * 8  # bytes for 16 tiles, D = 32 and N = 16
    flags = 2 * 32  # of tiles that start a sequence
    assert emulator.sectors(LOCAL, "workspace", "store") == states + flags
    assert emulator.sectors(OUTPUT, "workspace", "store") == 0
    assert_no_bank_conflicts(emulator, LOCAL, OUTPUT)
