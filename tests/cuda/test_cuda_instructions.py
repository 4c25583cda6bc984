"""Wrappers of cuda/common on the emulator: instructions follow the PTX manual, conversions round like torch."""

from collections.abc import Sequence

import pytest
import torch
from emulated import assert_no_bank_conflicts
from emulator.planted_launchers import run
from torch import Tensor

from megalodon_ops.ops.common.philox import philox

# Fragments of the PTX ISA ("Matrix Fragments for mma.m16n8k16" and "... mma.m16n8k8"): row and column of the elements
# a0, a1, ... (dimension 1) of each lane (dimension 0). A register has two 16-bit elements, the first in the lower half.
LANE = torch.arange(32)[:, None]
GROUP = LANE // 4
IN_GROUP = LANE % 4
TWO, FOUR, EIGHT = torch.arange(2), torch.arange(4), torch.arange(8)
A16_ROW = GROUP + 8 * (EIGHT // 2 % 2)  # A (16, 16) of 16-bit elements
A16_COLUMN = 2 * IN_GROUP + EIGHT % 2 + 8 * (EIGHT // 4)
B16_ROW = 2 * IN_GROUP + FOUR % 2 + 8 * (FOUR // 2)  # B (16, 8); each B has column GROUP
A32_ROW = GROUP + 8 * (FOUR % 2)  # A (16, 8) of tf32
A32_COLUMN = IN_GROUP + 4 * (FOUR // 2)
B32_ROW = IN_GROUP + 4 * TWO  # B (8, 8)
C_ROW = GROUP + 8 * (FOUR // 2)  # C and D (16, 8) of float32
C_COLUMN = 2 * IN_GROUP + FOUR % 2


def fragments(product: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The registers of A (16, k) and B (k, 8), (32, 4) and (32, 2) int32."""
    elements_of_a = a[A32_ROW, A32_COLUMN] if product == "tf32" else a[A16_ROW, A16_COLUMN]
    elements_of_b = b[B32_ROW if product == "tf32" else B16_ROW, GROUP]
    return elements_of_a.contiguous().view(torch.int32), elements_of_b.contiguous().view(torch.int32)


TYPES = {"bf16": (torch.bfloat16, 16), "fp16": (torch.float16, 16), "tf32": (torch.float32, 8)}
each_product = pytest.mark.parametrize("product", TYPES)


def multiply(emulator, product: str, a: Tensor, b: Tensor, c: Tensor, order: Sequence[int] = range(4)) -> Tensor:
    """a b + c, (16, 8), by one mma that gets the registers of A in this order."""
    a_registers, b_registers = fragments(product, a, b)
    registers = (a_registers[:, list(order)].contiguous(), b_registers, c[C_ROW, C_COLUMN])
    d = emulator.empty(32, 4)
    kind = getattr(emulator.module.planted.Product, product)
    run(emulator, "mma", kind, *map(emulator.tensor, registers), d)
    result = torch.empty(16, 8)
    result[C_ROW, C_COLUMN] = d
    return result


@each_product
def test_mma_multiplies_the_fragments_of_the_ptx_manual(emulator, product):
    gen = torch.Generator().manual_seed(0)
    dtype, depth = TYPES[product]
    # Integers, so that products and sums are exact and every misplaced element shows.
    a = torch.randint(-8, 9, (16, depth), generator=gen).to(dtype)
    b = torch.randint(-8, 9, (depth, 8), generator=gen).to(dtype)
    c = torch.randint(-8, 9, (16, 8), generator=gen).float()
    assert torch.equal(multiply(emulator, product, a, b, c), a.float() @ b.float() + c)


TINY = 2.0**-24
LATER = 100  # stands for the first k of the second block
# An A100 adds a block of products to a sum: it cuts each term at 2^-24 of the largest, then the result to float32.
# Rows: the sum before, the products by their k, the sum after.
CUT = [
    (1.0, {0: TINY}, 1.0),
    (1.0, {0: TINY, 1: TINY}, 1 + 2 * TINY),
    (1.0, {0: TINY, LATER: TINY}, 1.0),
    (1.0, {k: TINY / 2 for k in range(4)}, 1.0),
    (1.0, {0: 3 * TINY}, 1 + 2 * TINY),
    (-1.0, {0: -3 * TINY}, -1 - 2 * TINY),
    (1.0, {0: -TINY}, 1 - TINY),
    (1.0, {0: -TINY / 2}, 1.0),
    (0.0, {0: TINY, LATER: TINY * TINY}, TINY),
    (2.0, {0: -2.0, 1: TINY}, 0.0),
    (2.0, {0: -2.0, LATER: TINY}, TINY),
    (0.0, {}, 0.0),
]


@each_product
def test_a_sum_of_products_is_cut_as_on_an_a100(emulator, product):
    """Each row of A is a case; B is 2^-12."""
    dtype, depth = TYPES[product]
    a, c, expected = torch.zeros(16, depth), torch.zeros(16, 8), torch.zeros(16, 8)
    for row, (before, products, after) in enumerate(CUT):
        c[row] = before
        expected[row] = after
        for k, value in products.items():
            a[row, depth // 2 if k == LATER else k] = value * 2**12
    b = torch.full((depth, 8), 2.0**-12)
    assert torch.equal(multiply(emulator, product, a.to(dtype), b.to(dtype), c), expected)


def test_a_wrong_fragment_gives_a_wrong_product(emulator):
    """Two registers of A are exchanged, as if they were row-major quarters."""
    a = torch.arange(256.0).reshape(16, 16).bfloat16()
    b = torch.eye(16)[:, :8].bfloat16()
    found = multiply(emulator, "bf16", a, b, torch.zeros(16, 8), order=[0, 2, 1, 3])
    assert not torch.equal(found, a[:, :8].float())


def test_tf32_ignores_the_low_bits(emulator):
    a, b = torch.full((16, 8), 1 + 2**-10 + 2**-13), torch.ones(8, 8)
    assert (multiply(emulator, "tf32", a, b, torch.zeros(16, 8)) == 8 * (1 + 2**-10)).all()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix_distributes_rows_as_the_ptx_manual_says(emulator, count, transposed):
    """Lane l gets the elements 2 (l % 4) and the next of row l / 4 of each matrix, or of each transposed matrix."""
    matrices = torch.arange(count * 64, dtype=torch.int16).reshape(count, 8, 8)
    registers = emulator.empty(32, count, dtype=torch.int32)
    run(emulator, "ldmatrix", count, transposed, emulator.tensor(matrices), registers)
    rows = matrices.mT if transposed else matrices
    pairs = rows.reshape(count, 32, 2).transpose(0, 1)  # lane, matrix
    assert torch.equal(registers, pairs.contiguous().view(torch.int32)[..., 0])


@pytest.mark.parametrize("size", [4, 8, 16])
def test_cp_async_copies_and_fills_with_zeros(emulator, size):
    source = torch.arange(1, 32 * size + 1, dtype=torch.int32).to(torch.uint8)
    for valid in (0, size // 2, size):
        end = 31 * size + valid  # memory beyond may not exist
        target = emulator.empty(32 * size, dtype=torch.uint8)
        run(emulator, "cp_async", size, valid, emulator.tensor(source[:end]), target)
        assert torch.equal(target, torch.cat([source[:end], source.new_zeros(size - valid)]))


def narrow_inputs() -> Tensor:
    """Random bits, halfway cases between 16-bit floats, denormals, overflow, infinities and NaN."""
    gen = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (4096,), generator=gen, dtype=torch.int64).to(torch.int32)
    halfway = (torch.randint(-(2**15), 2**15, (2048,), generator=gen) * 65536 + 32768).to(torch.int32)
    halves = torch.arange(-32768, 32768, 31).to(torch.int16).view(torch.float16).float()
    between = (halves[:-1] + halves[1:]) / 2
    special = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 65504.0, 65519.0, 65520.0, 65536.0, 6e-8, 2e-8, 3e-8]
    return torch.cat([bits.view(torch.float32), halfway.view(torch.float32), halves, between, torch.tensor(special)])


def test_conversions_to_16_bits_round_as_torch(emulator):
    x = narrow_inputs()
    n = len(x)
    bf16, fp16 = emulator.empty(n, dtype=torch.bfloat16), emulator.empty(n, dtype=torch.float16)
    pairs_bf16, pairs_fp16 = emulator.empty(n, 2, dtype=torch.bfloat16), emulator.empty(n, 2, dtype=torch.float16)
    tf32 = emulator.empty(n)
    run(emulator, "narrow", emulator.tensor(x), bf16, fp16, pairs_bf16, pairs_fp16, tf32, n)
    for narrow, pairs in ((bf16, pairs_bf16), (fp16, pairs_fp16)):
        torch.testing.assert_close(narrow, x.to(narrow.dtype), rtol=0, atol=0, equal_nan=True)
        assert torch.equal(narrow.view(torch.int16), pairs[:, 0].contiguous().view(torch.int16))
        assert (pairs[:, 1] == 1).all()
    finite = x[x.abs() < 3e38].double()
    mantissa, exponent = torch.frexp(finite)
    integers = (mantissa.abs() * 2**11 + 0.5).floor()  # tf32 has 11 bits; ties are rounded away from zero
    away = torch.ldexp(integers * mantissa.sign(), exponent - 11)
    normal = finite.abs() >= torch.finfo(torch.float32).tiny
    assert torch.equal(tf32[x.abs() < 3e38].double()[normal], away[normal])


def test_every_16_bit_value_widens_as_in_torch(emulator):
    bits = torch.arange(-32768, 32768).to(torch.int16)
    bf16, fp16 = emulator.empty(65536), emulator.empty(65536)
    run(emulator, "widen", emulator.tensor(bits), bf16, fp16, 65536)
    torch.testing.assert_close(bf16, bits.view(torch.bfloat16).float(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(fp16, bits.view(torch.float16).float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("threads", [32, 96, 1024])
def test_reductions(emulator, threads):
    x = torch.randint(-100, 100, (2, threads)).float()
    sums, warp_sums, warp_maxima = (emulator.empty(2, threads) for _ in range(3))
    run(emulator, "reduce", emulator.tensor(x), sums, warp_sums, warp_maxima, 2, threads)
    warps = x.reshape(2, -1, 32)
    assert torch.equal(sums, x.sum(1, keepdim=True).expand_as(x))
    assert torch.equal(warp_sums, warps.sum(2).repeat_interleave(32, 1))
    assert torch.equal(warp_maxima, warps.amax(2).repeat_interleave(32, 1))


@pytest.mark.parametrize("seed", [0, 12345, 2**32, 2**64 - 1], ids=str)
def test_philox_draws_the_words_of_the_reference(emulator, seed):
    gen = torch.Generator().manual_seed(0)
    counters = torch.randint(0, 2**32, (200, 4), generator=gen)
    words = emulator.empty(200, 4, dtype=torch.int32)
    run(emulator, "philox", emulator.tensor(counters.to(torch.int32)), seed, words, 200)
    expected = torch.stack(philox(counters.unbind(1), seed), dim=1)
    assert torch.equal(words.long() & 0xFFFFFFFF, expected)


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "by-element"])
@pytest.mark.parametrize(("rows", "width", "valid"), [(16, 64, 64), (5, 16, 8), (33, 208, 200), (3, 16, 13), (2, 8, 1)])
def test_a_tile_is_loaded_with_zeros_around(emulator, whole, rows, width, valid):
    valid = max(valid // 8 * 8, 8) if whole else valid
    source = torch.randint(-(2**15), 2**15, (rows, valid)).to(torch.int16)
    tile = emulator.empty(rows, width, dtype=torch.int16)
    missing = 1  # row without a source
    run(emulator, "tile_load", whole, emulator.tensor(source), tile, rows, width, valid, missing)
    expected = torch.zeros(rows, width, dtype=torch.int16)
    expected[:, :valid] = source
    expected[missing] = 0
    assert torch.equal(tile, expected)


# Elements that each loader takes from a tile, in the order of the registers.
FRAGMENTS = {
    "a": lambda tile: tile[A16_ROW, A16_COLUMN],
    "a_trans": lambda tile: tile.mT[A16_ROW, A16_COLUMN],
    "b": lambda tile: torch.cat([tile[8 * n + GROUP, B16_ROW] for n in range(2)], dim=1),
    "b_trans": lambda tile: torch.cat([tile[B16_ROW, 8 * n + GROUP] for n in range(2)], dim=1),
}


@pytest.mark.parametrize(("row", "column"), [(0, 0), (8, 16), (16, 40), (16, 112)])
@pytest.mark.parametrize("fragment", FRAGMENTS)
def test_a_tile_gives_fragments_without_bank_conflicts(emulator, fragment, row, column):
    tile = torch.arange(32 * 128, dtype=torch.int16).reshape(32, 128)
    registers = emulator.empty(32, 4, dtype=torch.int32)
    kind = getattr(emulator.module.planted.Fragment, fragment)
    run(emulator, "tile_fragment", kind, emulator.tensor(tile), row, column, registers)
    expected = FRAGMENTS[fragment](tile[row:, column:]).contiguous().view(torch.int32)
    assert torch.equal(registers, expected)
    assert_no_bank_conflicts(emulator, "tile_fragment_kernel")


def test_a_tile_stores_results(emulator):
    d = torch.randint(-100, 100, (16, 8)).float()
    tile, a = emulator.empty(32, 64, dtype=torch.bfloat16), emulator.empty(32, 8, dtype=torch.bfloat16)
    row, column = 8, 24
    run(emulator, "tile_store", emulator.tensor(d[C_ROW, C_COLUMN]), row, column, tile, a)
    expected = torch.zeros(32, 64)
    expected[row : row + 16, column : column + 8] = d
    assert torch.equal(tile.float(), expected)
    assert torch.equal(a.float(), torch.cat([d, -d], dim=1)[A16_ROW, A16_COLUMN])
