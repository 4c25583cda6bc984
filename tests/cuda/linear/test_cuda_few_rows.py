"""Emulated CUDA kernel of linear_few_rows: products of few rows, and what follows them in a layer."""

import itertools

import pytest
import torch
from assertions import assert_close
from cases import generator, randn
from emulated import assert_equal_in_every_order

from megalodon_ops import _C
from megalodon_ops.ops.linear.linear import linear_few_rows

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
TOLERANCE = {BF16: 2**-8, F16: 2**-11, F32: 1e-6, F64: 4e-15}
WIDTHS = {  # I for vectors of v elements
    "one-vector": lambda v: v,
    "idle-lanes": lambda v: 31 * v,
    "a-warp": lambda v: 32 * v,
    "33-vectors": lambda v: 33 * v,
    "four-vectors-a-lane": lambda v: 128 * v,
    "five-vectors-a-lane": lambda v: 129 * v,
    "nine-vectors-a-lane": lambda v: 257 * v,
    "elements": lambda v: 3 * v + 1,
    "three-elements-a-lane": lambda v: 95,
}

# Columns below which blocks share rows of the weights, columns, rows of x.
SIZES = [(0, 1, 1), (0, 5, 8), (0, 8, 9), (0, 5, 17), (9, 1, 8), (9, 5, 1), (9, 8, 17), (9, 1, 9)]


def inputs(rows, width, columns, dtype):
    gen = generator(0)
    shapes = (rows, width), (columns, width), (columns,), *[(rows, columns)] * 2
    return [randn(gen, *shape, dtype=F64).to(dtype) for shape in shapes]


def expected(x, weight, bias=None, silu=False, value=None, add=None):
    """The same in float64, rounded once."""
    y = x.double() @ weight.double().T
    y = y if bias is None else y + bias.double()
    y = torch.nn.functional.silu(y) if silu else y
    y = y if value is None else y * value.double()
    return y if add is None else y + add.double()


def assert_right(emulator, *arguments, offset=0):
    """Assert that results are those in float64, rounded once, and return how many have not the same bits."""
    with emulator.replacing(_C, offset=offset):
        found = linear_few_rows(*arguments)
    wide = expected(*arguments)
    assert_close(found.double(), wide, tolerance=TOLERANCE[found.dtype])
    return (found != wide.to(found.dtype)).sum()


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("dtype", [BF16, F16, F32, F64], ids=str)
def test_each_division_of_a_row(emulator, dtype, width):
    """A warp, and a block, for each column; numbers of rows and of columns beside those of a block."""
    differing = 0
    for shared, columns, rows in SIZES:
        x, weight, bias, *others = inputs(rows, width(16 // dtype.itemsize), columns, dtype)
        with emulator.launch_sizes(linear_shared=shared):
            differing += assert_right(emulator, x, weight, bias, True, *others)
    assert dtype in (F32, F64) or differing <= 0.01 * sum(columns * rows for _, columns, rows in SIZES)


def test_what_follows_the_product_is_optional(emulator):
    x, weight, *others = inputs(3, 64, 40, BF16)
    for silu, *chosen in itertools.product((False, True), repeat=4):
        bias, *terms = (t if c else None for t, c in zip(others, chosen, strict=True))
        assert assert_right(emulator, x, weight, bias, silu, *terms) <= 1


def test_addresses_that_are_no_multiples_of_a_vector(emulator):
    for offset in (1, {"x": 1}, {"weight": 1}, {"y": 1, "value": 1}):
        x, weight, bias, *others = inputs(2, 64, 5, BF16)
        assert_right(emulator, x, weight, bias, True, *others, offset=offset)


def test_large_values(emulator):
    """silu of large negative numbers is 0, NaN stays in its row, and an infinity in its column."""
    x, weight = torch.tensor([[1.0], [torch.nan], [-1.0]]), torch.tensor([[300.0], [-300.0], [torch.inf]])
    with emulator.replacing(_C):
        found = linear_few_rows(x, weight, None, True)
    torch.testing.assert_close(found, expected(x, weight, None, True).float(), equal_nan=True)


def test_orders_of_threads_give_equal_bits(emulator):
    for shared in (0, 2048):
        tensors = inputs(5, 1100, 6, BF16)
        with emulator.replacing(_C), emulator.launch_sizes(linear_shared=shared):
            assert_equal_in_every_order(emulator, lambda: {"y": linear_few_rows(*tensors[:3], True, *tensors[3:])})


def test_each_weight_is_read_once(emulator):
    x, weight, *_ = inputs(8, 512, 64, BF16)
    with emulator.replacing(_C):
        linear_few_rows(x, weight, None)
    traffic = emulator.traffic("linear_few_rows_kernel")
    assert traffic["weight"]["load_sectors"] * 32 == weight.nbytes
    assert traffic["x"]["load_footprint"] == x.nbytes


def test_nothing_is_launched_for_no_columns(emulator):
    with emulator.replacing(_C):
        assert linear_few_rows(torch.ones(2, 4), torch.ones(0, 4), None, True).shape == (2, 0)
    assert not emulator.launched()


def test_errors(emulator):
    x, weight, bias, _, add = inputs(9, 4, 3, F32)
    with pytest.raises(ValueError, match="linear: `x` must be on CUDA, as what follows"):
        linear_few_rows(x, weight, bias, True)
    with emulator.replacing(_C):
        with pytest.raises(ValueError, match=r"must have fewer than 2\^19 and 2\^33 rows, got 524281 and 3"):
            linear_few_rows(x[:1, :1].expand(8 * 65535 + 1, 1), weight[:, :1], None)
        with pytest.raises(ValueError, match=r"`add` must have shape \(T, O\) = \(2, 3\)"):
            linear_few_rows(x[:2], weight, bias, False, None, add)
