"""The CUDA emulator: it sees each planted bug at its line, raises no false alarm, its instructions do what PTX says."""

from __future__ import annotations

import re

import pytest
import torch
from assertions import assert_bit_equal, assert_close
from cases import BUILDERS, OPS, evaluate
from cuda_emulator.emulator import BINDINGS, FOLDER, Emulator
from cuda_emulator.lint import lint
from hypothesis import given, settings
from strategies import CASES
from test_ops import assert_matches_reference
from torch import Tensor

import megalodon_ops as mo
from megalodon_ops import _C
from megalodon_ops.reference.philox import philox

BUGS = {
    "missing_syncthreads": "race",
    "missing_second_syncthreads": "race",
    "missing_named_barrier": "race",
    "barrier_in_branches": "divergent barrier",
    "return_before_barrier": "divergent barrier",
    "deadlock": "deadlock",
    "missing_syncwarp": "race",
    "shuffle_is_no_barrier": "race",
    "syncwarp_of_half_a_warp": "race",
    "shuffle_after_return": "deadlock",
    "shuffle_outside_mask": "invalid operation",
    "lane_outside_mask": "invalid operation",
    "divergent_shuffle": "invalid operation",
    "divergent_mma": "deadlock",
    "blocks_write_one_element": "race",
    "block_reads_what_another_writes": "race",
    "block_writes_what_another_reads": "race",
    "read_past_the_end": "out of bounds",
    "write_before_the_start": "out of bounds",
    "shared_out_of_bounds": "out of bounds",
    "dynamic_shared_out_of_bounds": "out of bounds",
    "uninitialised_shared": "uninitialised read",
    "uninitialised_global": "uninitialised read",
    "write_to_input": "read-only buffer",
    "null_pointer": "not device memory",
    "host_pointer": "not device memory",
    "wrong_memory": "wrong memory",
    "misaligned_vector": "misaligned",
    "misaligned_store": "misaligned",
    "misaligned_cast": "misaligned",
    "misaligned_copy": "misaligned",
    "misaligned_ldmatrix": "misaligned",
    "missing_copy_wait": "copy in flight",
    "missing_copy_commit": "copy in flight",
    "missing_copy_barrier": "race",
    "copy_over_what_others_read": "race",
    "wrong_fragment_of_a": "wrong mma fragment",
    "wrong_fragment_of_b": "wrong mma fragment",
    "wrong_fragment_of_tf32": "wrong mma fragment",
}
ORDERS = ("forward", "reverse", "random")


def marked_lines(mark: str, name: str) -> set[str]:
    lines = (FOLDER / "planted" / "bugs.cu").read_text().split("\n")
    return {f"bugs.cu:{i}" for i, line in enumerate(lines, start=1) if re.search(rf"// {mark} .*\b{name}\b", line)}


def run_bug(emulator, name: str, *, bug: bool) -> None:
    x, y = emulator.tensor(torch.arange(128.0), "in"), emulator.empty(128, name="out")
    emulator.module.planted.run_bug(name, bug, x.data_ptr(), y.data_ptr())


def run(emulator, name: str, *arguments) -> None:
    """Calls a planted launcher with tensors as addresses."""
    addresses = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    getattr(emulator.module.planted, f"run_{name}")(*addresses)


def test_every_planted_bug_is_tested(emulator):
    assert set(emulator.module.planted.bugs) == set(BUGS)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", BUGS)
def test_a_bug_is_reported_at_its_line(emulator, name, order):
    """In every order of the threads, those included in which the result happens to be right."""
    emulator.set_order(order)
    with pytest.raises(emulator.Error, match=rf"in {name}:"):
        run_bug(emulator, name, bug=True)
    lines, others = marked_lines("at", name), marked_lines("other", name)
    found = [r for r in emulator.reports() if r["kind"] == BUGS[name]]
    assert found, emulator.reports()
    assert lines
    for report in found:
        ends = {place.split(" < ")[i] for place in (report["where"], report["other"]) for i in (0, -1)}
        assert ends & lines, (report, lines)
        assert not others or ends & others, (report, others)
        assert max(report["block"]) < 2 and report["thread"][0] < 64 and report["thread"][1:] == (0, 0)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", BUGS)
def test_a_correct_kernel_raises_no_alarm(emulator, name, order):
    for seed in range(3):
        emulator.set_order(order, seed=seed)
        run_bug(emulator, name, bug=False)


def test_a_report_names_buffer_thread_and_line(emulator):
    with pytest.raises(emulator.Error) as raised:
        run_bug(emulator, "read_past_the_end", bug=True)
    (line,) = marked_lines("at", "read_past_the_end")
    text = str(raised.value)
    assert "0 bytes past the end of buffer 'in' (512 bytes)" in text
    assert f"at {line}" in text and "block (1,0,0) thread (63,0,0)" in text


def test_a_wrong_fragment_names_the_element(emulator):
    emulator.set_order("forward")
    with pytest.raises(emulator.Error, match=r"a\[1\] is not the element of row 15, column 6, byte 492 of .*'tile'"):
        run_bug(emulator, "wrong_fragment_of_a", bug=True)
    assert [report["count"] for report in emulator.reports()] == [2 * 64]  # every lane
    with pytest.raises(emulator.Error, match=r"a\[1\] is not the element of row 15, column 3, byte 372 of .*'tile'"):
        run_bug(emulator, "wrong_fragment_of_tf32", bug=True)


def test_the_device_works_again_after_a_bug(emulator):
    for name in ("deadlock", "null_pointer", "missing_copy_wait"):
        with pytest.raises(emulator.Error):
            run_bug(emulator, name, bug=True)
        run_bug(emulator, name, bug=False)


def test_an_invalid_launch_is_refused(emulator):
    x, y = emulator.tensor(torch.zeros(1024)), emulator.empty(1024)
    emulator.set_order("random", shared_limit=4096)
    run(emulator, "shared_columns", x, y, 32)
    with pytest.raises(emulator.Error, match="4224 bytes of shared memory"):
        run(emulator, "shared_columns", x, y, 33)
    with pytest.raises(emulator.Error, match="48 threads is not whole warps"):
        run(emulator, "reduce", x, y, y, y, 1, 48)
    with pytest.raises(emulator.Error, match="an empty grid"):
        run(emulator, "reduce", x, y, y, y, 0, 64)


@pytest.mark.parametrize(("as_template", "most"), [(False, 64), (True, 96)])
def test_launch_bounds_are_kept(emulator, as_template, most):
    y = emulator.empty(128)
    run(emulator, "bounded", y, most, as_template)
    assert (y[:most] == 1).all()
    with pytest.raises(emulator.Error, match=f"a block of {most + 32} threads, beyond its __launch_bounds__"):
        run(emulator, "bounded", y, most + 32, as_template)


def test_unwritten_results_are_nan(emulator):
    assert emulator.empty(5, 3, dtype=torch.bfloat16).isnan().all()


# Fragments as the PTX ISA gives them ("Matrix Fragments for mma.m16n8k16" and "... mma.m16n8k8"): the row and the
# column of the elements a0, a1, ... that a lane holds, two to a register for 16-bit types, the first in the lower
# half.
LANE = torch.arange(32)[:, None]
GROUP, IN_GROUP = LANE >> 2, LANE % 4
A16 = torch.arange(8)
A16_ROW = torch.where((A16 < 2) | ((A16 >= 4) & (A16 < 6)), GROUP, GROUP + 8)
A16_COLUMN = IN_GROUP * 2 + (A16 & 1) + torch.where(A16 >= 4, 8, 0)
B16 = torch.arange(4)
B16_ROW = IN_GROUP * 2 + (B16 & 1) + torch.where(B16 >= 2, 8, 0)
C4 = torch.arange(4)
C_ROW = torch.where(C4 < 2, GROUP, GROUP + 8)
C_COLUMN = IN_GROUP * 2 + (C4 & 1)
A32_ROW = torch.where((C4 == 0) | (C4 == 2), GROUP, GROUP + 8)
A32_COLUMN = torch.where(C4 < 2, IN_GROUP, IN_GROUP + 4)
B32_ROW = torch.where(torch.arange(2) == 0, IN_GROUP, IN_GROUP + 4)


def fragments(product: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The registers of A (16, k) and B (k, 8), (32, 4) and (32, 2) int32."""
    if product == "tf32":
        return a[A32_ROW, A32_COLUMN].contiguous().view(torch.int32), b[B32_ROW, GROUP].contiguous().view(torch.int32)
    return a[A16_ROW, A16_COLUMN].contiguous().view(torch.int32), b[B16_ROW, GROUP].contiguous().view(torch.int32)


@pytest.mark.parametrize("product", ["bf16", "fp16", "tf32"])
def test_mma_multiplies_the_fragments_of_the_ptx_manual(emulator, product):
    gen = torch.Generator().manual_seed(0)
    depth = 8 if product == "tf32" else 16
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32}[product]
    # Integers, so that products and sums are exact and every misplaced element shows.
    a = torch.randint(-8, 9, (16, depth), generator=gen).to(dtype)
    b = torch.randint(-8, 9, (depth, 8), generator=gen).to(dtype)
    c = torch.randint(-8, 9, (16, 8), generator=gen).float()
    registers = [emulator.tensor(t) for t in (*fragments(product, a, b), c[C_ROW, C_COLUMN])]
    d = emulator.empty(32, 4)
    run(emulator, "mma", getattr(emulator.module.planted.Product, product), *registers, d)
    result = torch.empty(16, 8)
    result[C_ROW, C_COLUMN] = d
    assert torch.equal(result, a.float() @ b.float() + c)


def test_a_wrong_fragment_gives_a_wrong_product(emulator):
    """Two registers of A exchanged, as a kernel that takes them for row-major quarters would."""
    a, b = torch.arange(256.0).reshape(16, 16).bfloat16(), torch.eye(16)[:, :8].bfloat16()
    a_registers, b_registers = fragments("bf16", a, b)
    exchanged = a_registers[:, [0, 2, 1, 3]].contiguous()
    registers = [emulator.tensor(t) for t in (exchanged, b_registers, torch.zeros(32, 4))]
    d, result = emulator.empty(32, 4), torch.empty(16, 8)
    run(emulator, "mma", emulator.module.planted.Product.bf16, *registers, d)
    result[C_ROW, C_COLUMN] = d
    assert not torch.equal(result, a[:, :8].float())


def test_tf32_ignores_the_low_bits(emulator):
    a, b = torch.full((16, 8), 1 + 2**-10 + 2**-13), torch.ones(8, 8)
    registers = [emulator.tensor(t) for t in (*fragments("tf32", a, b), torch.zeros(32, 4))]
    d = emulator.empty(32, 4)
    run(emulator, "mma", emulator.module.planted.Product.tf32, *registers, d)
    assert (d == 8 * (1 + 2**-10)).all()


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
        end = 31 * size + valid  # what lies beyond need not exist
        target = emulator.empty(32 * size, dtype=torch.uint8)
        run(emulator, "cp_async", size, valid, emulator.tensor(source[:end]), target)
        assert torch.equal(target, torch.cat([source[:end], source.new_zeros(size - valid)]))


def narrow_inputs() -> Tensor:
    """Every 16-bit float's neighbourhood: random bits, halfway cases, denormals, overflow, infinities and NaN."""
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
    away = torch.ldexp((mantissa.abs() * 2**11 + 0.5).floor() * mantissa.sign(), exponent - 11)
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
    run(emulator, "tile_load", whole, emulator.tensor(source), tile, rows, width, valid, 1)
    expected = torch.zeros(rows, width, dtype=torch.int16)
    expected[:, :valid] = source
    expected[1] = 0
    assert torch.equal(tile, expected)


# The elements that each loader takes from a tile, in the order of the registers.
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
    shared = [site for site in emulator.sites("tile_fragment_kernel") if site["shared"]]
    assert shared and all(site["transactions"] == site["ideal"] for site in shared)


def test_a_tile_takes_results(emulator):
    d = torch.randint(-100, 100, (16, 8)).float()
    tile, a = emulator.empty(32, 64, dtype=torch.bfloat16), emulator.empty(32, 8, dtype=torch.bfloat16)
    run(emulator, "tile_store", emulator.tensor(d[C_ROW, C_COLUMN]), 8, 24, tile, a)
    expected = torch.zeros(32, 64)
    expected[8:24, 24:32] = d
    assert torch.equal(tile.float(), expected)
    assert torch.equal(a.float(), torch.cat([d, -d], dim=1)[A16_ROW, A16_COLUMN])


@pytest.mark.parametrize(("stride", "width", "load_sectors"), [(1, 1, 128), (2, 1, 256), (8, 1, 1024), (1, 4, 128)])
def test_sectors_of_strided_copies(emulator, stride, width, load_sectors):
    x, y = emulator.tensor(torch.randn(1024 * stride), "x"), emulator.empty(1024, name="y")
    run(emulator, "strided_copy", x, y, stride, width)
    assert torch.equal(y, x[::stride])
    traffic = emulator.traffic("strided_copy_kernel")
    requests = 1024 // (32 * width)
    assert traffic["x"]["load_sectors"] == load_sectors and traffic["x"]["load_footprint"] == load_sectors * 32
    assert traffic["x"]["load_bytes"] == 4096 and traffic["x"]["load_requests"] == requests
    assert traffic["y"]["store_sectors"] == 128 and traffic["y"]["store_footprint"] == 4096
    assert traffic["y"]["store_bytes"] == 4096 and traffic["y"]["load_bytes"] == 0


@pytest.mark.parametrize(("pitch", "conflicts"), [(32, 32), (33, 1), (34, 2)])
def test_bank_conflicts(emulator, pitch, conflicts):
    x, y = emulator.tensor(torch.randn(32, 32)), emulator.empty(32, 32)
    run(emulator, "shared_columns", x, y, pitch)
    assert torch.equal(y, x.T)
    (column,) = [s for s in emulator.sites("shared_columns_kernel") if s["shared"] and not s["store"]]
    assert (column["requests"], column["ideal"], column["transactions"]) == (32, 32, 32 * conflicts)
    assert column["where"].startswith("wrappers.cu:")


@pytest.mark.parametrize("op", OPS)
def test_ops_on_misaligned_memory_in_every_order(emulated_module, op):
    """A kernel, its launcher and its binding, from the public function on. Aligned memory: test_ops.py."""
    emulator = Emulator(emulated_module)

    @settings(max_examples=5)
    @given(case=CASES[op]())
    def check(case):
        results = []
        for order in ORDERS:
            emulator.set_order(order)
            with emulator.replacing(_C, offset=1):
                results.append(evaluate(getattr(mo, op), case))
        assert_matches_reference(results[0], case)
        for result in results[1:]:
            assert_bit_equal(result, results[0])

    check()


ALIGNED = {  # sizes and addresses that allow the widest accesses, and a scan as well as its last state
    "cema": [{"B": 1, "L": 70, "D": 8, "N": 4, "state": True}, {"B": 2, "L": 2, "D": 8, "N": 4, "state": True}],
    "timestep_norm": [{"B": 1, "L": 70, "G": 2, "width": 32, "count": 2}],
    "normalized_qk": [{"K": 16, "position": True}, {"K": 512, "position": True}],
    "chunked_attention": [
        {"B": 2, "L": 9, "H": 1, "K": 16, "V": 16, "C": 20, "state": True, "dropkey": 0.1},
        {"B": 2, "L": 17, "H": 1, "K": 16, "V": 16, "C": 20, "state": True},
        {"B": 2, "L": 2, "H": 1, "K": 16, "V": 16, "C": 20, "state": True},
    ],
}
TENSORS = {op: sorted({name for binding, names in BINDINGS.items() if binding.startswith(op)
                       for name in names.replace("->", "").split()}) for op in ALIGNED}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", ALIGNED)
def test_each_tensor_alone_may_be_misaligned(emulator, op, dtype):
    """A launcher looks at the address of every tensor that its kernels read or write in vectors."""
    for shape in ALIGNED[op]:
        case, moved = BUILDERS[op](dtype=dtype, **shape), set()
        call = emulator.call

        def record(name, *arguments, offset, call=call, moved=moved):
            labels = BINDINGS[name].replace("->", "").split()
            given = (name for name, a in zip(labels, arguments, strict=True) if isinstance(a, Tensor))
            moved.update(name for name in given if name in offset)
            call(name, *arguments, offset=offset)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(emulator, "call", record)
            for name in TENSORS[op]:
                with emulator.replacing(_C, offset={name: 1}):
                    results = evaluate(getattr(mo, op), case)
                if name in moved:
                    assert_matches_reference(results, case)
        assert len(moved) >= 10, moved


@pytest.mark.parametrize("op", ALIGNED)
def test_more_sequences_than_1024(emulator, op):
    """Each token, also of the last sequence, finds its own: of 1,100 that have a token or two, some none."""
    lengths = [(s % 3 + 1) // 2 for s in range(1100)]
    lengths[1090] = 40
    cu_seqlens = [sum(lengths[:s]) for s in range(1101)]
    small = {"cema": {"D": 2, "N": 1}, "timestep_norm": {"G": 1, "width": 2}, "normalized_qk": {"H": 1, "K": 2}}
    shape = small.get(op, {"H": 1, "K": 2, "V": 2, "C": 3})
    with_state = {"timestep_norm": {"count": 2}, "normalized_qk": {"position": True}}.get(op, {"state": True})
    case = BUILDERS[op](B=1, L=cu_seqlens[-1] + 3, cu_seqlens=cu_seqlens, **shape, **with_state)
    with emulator.replacing(_C):
        results = evaluate(getattr(mo, op), case)
    expected = evaluate(getattr(mo, op), case)
    for name, value in results.items():
        assert_close(value, expected[name], tolerance=1e-4, terms=case.terms, name=name)


def test_kernels_obey_the_rules():
    assert lint() == []


BREACHES = {
    'asm volatile("bar.sync 0;");': "inline PTX",
    "__shared__ float tile[32];": "SMEM_ARRAY",
    "kernel<<<1, 32>>>(x);": "LAUNCH",
    "LAUNCH((kernel<float, 4>), blocks, 32, 0, nullptr, x);": "a launch on nullptr",
    "LAUNCH(kernel, dim3(1, 2), 32, 0);": "a launch on no stream",
    "const int64_t at = blockIdx.x * kThreads + threadIdx.x;": "32 bits overflow",
    "const int64_t at = threadIdx.x + blockDim.x * blockIdx.x;": "32 bits overflow",
    "const int at = static_cast<int>(token * p.channels) + lane;": "a cast to 32 bits of a product, token * p.channels",
    "const auto at = static_cast<unsigned>(f(s) * (p.heads + 1));": "a cast to 32 bits of a product",
    "#if defined(__CUDACC__)": "every compiler",
    "memcpy(&u, &v, 4);": "memcpy",
    "#include <cub/cub.cuh>": "C headers only",
    "unsigned mask = __activemask();": "name the mask",
    "atomicAdd(out, x);": "fixed order",
    "__threadfence();": "launch another kernel",
    "while (flag[0] == 0);": "spin wait",
    "__device__ float table[4];": "device globals",
    "__device__ int counter = 0;": "device globals",
    "auto f = [=] __device__(int i) { return i; };": "device lambdas",
    "namespace cg = cooperative_groups;": "cooperative groups",
    "static const std::vector<int> v = make();": "run time",
    "static float table[2] = {a, b};": "run time",
    "static Table table(7);": "run time",
    '#include "timestep_norm.cuh"': "another op",
}


@pytest.mark.parametrize("line", BREACHES)
def test_lint_finds_a_breach(tmp_path, line):
    (tmp_path / "cema_fwd.cu").write_text(f'#include "cema.cuh"\n// {line}\n{line}\n')
    (problem, *_) = lint(tmp_path)
    assert problem.startswith("cema_fwd.cu:3: ") and BREACHES[line] in problem


def test_lint_lets_kernels_pass(tmp_path):
    (tmp_path / "cema_fwd.cu").write_text(
        '#include "cema.cuh"\n#include "cema_scan.cuh"\n#include <cstdint>\n'
        "GPU_INLINE float f(float x) { return static_cast<float>(x); }\n"
        "__device__ float g(float x) { return x; }\n"
        'static_assert(kTile % 2 == 0, "an asm-like <<< in a string");\n'
        "while (n > 0) n /= 2;\n"
        "const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x, head = blockIdx.x / p.heads * kTokens;\n"
        "const int64_t plane = blockIdx.y * p.width;\n"
        "struct Tile { GPU_INLINE static int lane() { return 0; } static constexpr int kRows = f(4); };\n"
        "LAUNCH((kernel<float, 4>), dim3(1, 2),\n       32, f(1, 2), stream, x);\n"
    )
    (tmp_path / "cema_scan.cuh").write_text('#include "philox.h"\n')
    assert lint(tmp_path) == []
