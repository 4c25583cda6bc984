"""Outputs of cema, and dx, on emulated tensor cores: cuda/cema/cema_mma_scan.cuh."""

import megalodon_ops as mo
import pytest
import torch
from assertions import assert_as_accurate_as, assert_bit_equal, every_case
from calls import forward
from cases import cema_case, generator, randn
from emulated import ORDERS
from megalodon_ops import _C

LOCAL, OUTPUT = "cema_mma_local_kernel", "cema_mma_output_kernel"
SCAN = {"cema_local_kernel", "cema_output_kernel"}
A100 = 163 * 1024  # bytes of shared memory of a block; cards with less take the scan


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
    """The largest error beyond half the spacing of bf16, in units of the largest value."""
    half = torch.exp2(torch.frexp(exact.abs()).exponent.double() - 9)
    return ((actual.double() - exact).abs() - half).max().item() / exact.abs().max().item()


def assert_as_accurate_as_the_scan(emulator, case, run=output):
    """Errors beyond one rounding are at most 2^-15, and at most twice the scan's, which misaligned tensors take."""
    actual, launched = run_emulated(emulator, case, run)
    scanned, others = run_emulated(emulator, case, run, offset=1)
    assert OUTPUT in launched and "cema_output_kernel" not in launched and "cema_output_kernel" in others
    exact, same = run(mo.reference.cema, case.double()), run(mo.reference.cema, case)
    for name, value in actual.items():
        if value.dtype == torch.bfloat16:
            assert beyond_rounding(value, exact[name]) <= 2**-15
            error, bound = ((found - exact[name]).abs().max() for found in (value, scanned[name]))
            assert error <= 2 * bound
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


POLES = {
    "slow": {"radius": (1 - 1e-5, 1 - 1e-5), "angle": (0.0, 1e-4)},
    "on-the-circle": {"radius": (1.0, 1.0), "angle": (-3.1, 3.1)},
    "real": {"radius": (0.9, 1.0), "angle": (0.0, 0.0)},
    "short": {"radius": (0.0, 0.1)},
}


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
    tokens, channels = torch.tensor([0, 5, 15, 16, 77, 127, 200]), torch.arange(7)
    x, later = case.tensors["x"].clone(), torch.zeros(8, 256, 8, dtype=torch.bool)
    x[range(7), tokens, channels] = value
    later[:7].diagonal(dim1=0, dim2=2)[:] = torch.arange(256)[:, None] >= tokens
    clean, _ = run_emulated(emulator, case)
    struck, _ = run_emulated(emulator, case.with_tensors(x=x))
    assert torch.equal(struck["y"][~later], clean["y"][~later])
    assert not struck["y"][later].isfinite().any()
    ends = later[:, -1, :, None].expand(8, 8, 5)
    assert torch.equal(struck["state"][~ends], clean["state"][~ends])
    assert not struck["state"][ends].isfinite().any()

    reversed_dy = torch.where(x.isfinite(), dy.flip(1), x).flip(1)
    clean, _ = run_emulated(emulator, case, lambda *call: dx_of_y(*call, dy))
    struck, _ = run_emulated(emulator, case, lambda *call: dx_of_y(*call, reversed_dy))
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
    local, outputs = emulator.traffic(LOCAL), emulator.traffic(OUTPUT)
    x, pairs = case.tensors["x"].nbytes, 16 * 32 * 16 * 8
    assert (
        local["x"]["load_sectors"] * 32 == outputs["x"]["load_sectors"] * 32 == outputs["y"]["store_sectors"] * 32 == x
    )
    assert local["workspace"]["store_sectors"] * 32 == pairs + 2 * 32  # and flags of tiles that start a sequence
    assert "store_sectors" not in outputs["workspace"] or outputs["workspace"]["store_sectors"] == 0
    shared = [site for kernel in (LOCAL, OUTPUT) for site in emulator.sites(kernel) if site["shared"]]
    assert {site["kernel"] for site in shared} == {LOCAL, OUTPUT}
    assert not [site for site in shared if site["transactions"] != site["ideal"]]
