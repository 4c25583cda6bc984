"""Emulated CUDA kernels of layer_norm and rms_norm: every path, shares, orders of threads, bytes moved."""

import itertools

import pytest
import torch
from assertions import assert_bit_equal
from emulated import assert_equal_in_every_order
from layer_norm import test_layer_norm as on_cpu
from layer_norm.test_layer_norm import DTYPES, assert_matches_the_reference, each_norm, inputs, results

from megalodon_ops import _C
from megalodon_ops.ops.layer_norm import layer_norm as module

WIDTHS = {  # D for vectors of v elements
    "idle-lanes": lambda v: 3 * v,
    "two-warps": lambda v: 33 * v,
    "two-vectors-a-thread": lambda v: 257 * v,
    "three-vectors-a-thread": lambda v: 513 * v,
    "elements": lambda v: 3 * v + 1,
    "elements-of-two-warps": lambda v: 35,
    "three-elements-a-thread": lambda v: 515,
}
BF16 = torch.bfloat16


def gradients(norm, tensors, dy):
    return results(getattr(module, norm), tensors, dy)


DIVISIONS = [  # each width takes both norms, and each dtype does
    (width, dtype, ("layer_norm", "rms_norm")[(i + j) % 2])
    for (i, width), (j, dtype) in itertools.product(enumerate(WIDTHS), enumerate(DTYPES))
]


@pytest.mark.parametrize(("width", "dtype", "norm"), DIVISIONS, ids=str)
def test_each_division_of_a_row(emulator, norm, dtype, width):
    """Eight rows, of which blocks and parts take two or three; then one row, with elements instead of vectors."""
    width = WIDTHS[width](16 // dtype.itemsize)
    tensors, dy = inputs(norm, 8, width, dtype=dtype)
    with emulator.replacing(_C), emulator.launch_sizes(norm_blocks=3, norm_part=3):
        assert_matches_the_reference(norm, tensors, dy, terms=4.0)
    tensors, dy = inputs(norm, 1, width, dtype=dtype)
    with emulator.replacing(_C, offset=1):
        assert_matches_the_reference(norm, tensors, dy, terms=4.0)


@pytest.mark.parametrize("name", ["x", "y", "weight", "bias", "dy", "dx"])
def test_each_tensor_alone_may_be_misaligned(emulator, name):
    tensors, dy = inputs("layer_norm", 3, 64, dtype=BF16)
    with emulator.replacing(_C, offset={name: 1}):
        assert_matches_the_reference("layer_norm", tensors, dy, terms=4.0)


@each_norm
def test_sums_of_rows_too_wide_for_shared_memory(emulator, norm):
    for width in (64, 65):
        tensors, dy = inputs(norm, 5, width, dtype=BF16)
        with emulator.replacing(_C):
            narrow = gradients(norm, tensors, dy)
            with emulator.launch_sizes(norm_sums=0):
                assert_bit_equal(gradients(norm, tensors, dy), narrow)


@each_norm
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_squares_out_of_range(emulator, norm, dtype):
    """With eps 0, rows whose squares overflow or vanish give the results of the same rows in range."""
    (x, *parameters), dy = inputs(norm, 2, 40, dtype=dtype, mean=0.1)
    with emulator.replacing(_C):
        function = getattr(module, norm)
        expected = results(lambda *tensors: function(*tensors, eps=0.0), [x, *parameters], dy)
        power = 2.0 ** (100 if dtype == torch.float32 else 900)
        for scale in (power, 1 / power):
            found = results(lambda *tensors: function(*tensors, eps=0.0), [x * scale, *parameters], dy)
            found["dx"] = found["dx"] * scale
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


@each_norm
def test_orders_of_threads_give_equal_bits(emulator, norm):
    for width in (64, 2080):
        tensors, dy = inputs(norm, 9, width, dtype=BF16)
        with emulator.replacing(_C):
            assert_equal_in_every_order(emulator, lambda: gradients(norm, tensors, dy))


@pytest.mark.parametrize(("dtype", "width"), [(BF16, 256), (torch.float32, 128)], ids=str)
def test_bytes_moved(emulator, dtype, width):
    """x, y, dy and dx once, in whole sectors; sums for the parameters' gradients from each share."""
    tensors, dy = inputs("layer_norm", 40, width, dtype=dtype)
    with emulator.replacing(_C):
        gradients("layer_norm", tensors, dy)
    forward, backward = (emulator.traffic(f"layer_norm_{name}_kernel") for name in ("fwd", "bwd"))
    for traffic, names in (
        (forward, {"x": "load", "y": "store"}),
        (backward, {"x": "load", "dy": "load", "dx": "store"}),
    ):
        for name, access in names.items():
            assert traffic[name][f"{access}_footprint"] == dy.nbytes, name
    for traffic, name in (forward, "y"), (backward, "dx"):
        assert traffic[name]["store_sectors"] * 32 == dy.nbytes
    shares = 5 * 2 * width * 4
    assert backward["workspace"]["store_footprint"] == shares
    assert emulator.traffic("sum_shares_kernel")["workspace"]["load_sectors"] * 32 == shares


def test_no_bank_conflicts(emulator):
    tensors, dy = inputs("layer_norm", 3, 512, dtype=BF16)
    with emulator.replacing(_C):
        gradients("layer_norm", tensors, dy)
    sites = [site for site in emulator.sites("layer_norm_bwd_kernel") if site["shared"]]
    assert sites and all(site["transactions"] <= site["ideal"] for site in sites)


@each_norm
def test_what_holds_for_the_kernels_of_the_cpu(emulator, norm):
    """Constant rows, NaN and infinities, missing parameters, no rows, no channels, a mean that dwarfs the spread."""
    with emulator.replacing(_C):
        for dtype in DTYPES:
            on_cpu.test_constant_rows_and_special_values(norm, dtype)
        on_cpu.test_without_parameters(norm)
        on_cpu.test_a_mean_that_dwarfs_the_spread(_C.active_isa(), width=77)
        assert "layer_norm_bwd_kernel" in emulator.launched()
        emulator.reset()
        for shape in (0, 5), (3, 0):
            on_cpu.test_nothing_to_do(norm, shape)
        assert not emulator.launched() & {"layer_norm_fwd_kernel", "layer_norm_bwd_kernel"}
