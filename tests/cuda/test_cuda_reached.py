"""Iteration counts of loops by tests/cuda/emulator/reached.py, and the gaps that it finds in them."""

import shutil
import subprocess

import pytest
import torch
from assertions import assert_matches_reference
from calls import evaluate, forward
from cases import cema_case, chunked_attention_case, normalized_qk_case, timestep_norm_case
from emulator import reached
from emulator.device import FOLDER
from emulator.reached import Place, Reached

import megalodon_ops as mo
from megalodon_ops import _C

HEADS = {
    "  for (int i = 0; i < n; ++i) f(i);": [("for (int i = 0; i < n; ++i)", False)],
    "  for (int64_t i = 0; i < kRows; i += 2) {\n    while (x > 0) --x;\n  }": [
        ("for (int64_t i = 0; i < kRows; i += 2)", True),
        ("while (x > 0)", False),
    ],
    "  for (int i = threadIdx.x; i < kRows; ++i) {}": [("for (int i = threadIdx.x; i < kRows; ++i)", True)],
    "  for (int i = n / 2; i > 0; i /= 2) {}": [("for (int i = n / 2; i > 0; i /= 2)", False)],
    "  constexpr int step = 8;\n  for (int i = 0; i < step; ++i) {}": [("for (int i = 0; i < step; ++i)", True)],
    "  for (const float x : {a, b}) f(x);": [("for (const float x : {a, b})", True)],
    "  for (; a &&  // why\n       b;) {}": [("for (; a && // why b;)", False)],
    "  GPU_UNROLL\n  for (int i = 0; i < n; ++i) f(i);": [],
    "  // for (;;) {}": [],
}


@pytest.mark.parametrize("code", HEADS)
def test_loops(code):
    text = f"void kernel() {{\n{code}\n}}\n"
    assert [(loop.head, loop.is_constant) for loop in reached.loops_of(text)] == HEADS[code]


PROGRAM = r"""
#include <cstdio>

int search(const int* of, int n, int wanted) {
  for (int i = 0; i < n; ++i) {
    if (of[i] == wanted) return i;
  }
  return -1;
}

int main() {
  const int numbers[] = {3, 1, 4, 1, 5}, both[] = {3, 4};
  for (int n = 5; n > 3; --n)
    if (n == 4) std::printf("%d\n", search(numbers, n, 9));
    else for (int wanted : both) std::printf("%d ", search(numbers, n, wanted));
  int left = 7;
  while (left > 0)
    if (left -= 3; left < 2) break;
  for (; left < 0;) ++left;
  std::printf("%d\n", left);
}
"""
COUNTER = """
#include <cstdint>
#include <cstdio>
#define EMU_BUILTIN
namespace emu {
%s
void finish_loop(Loop& loop, int64_t turns) noexcept { std::printf("[%%d: %%d] ", loop.nth, int(turns)); }
}
%s
"""
ITERATIONS = "[0: 1] 0 [0: 3] 2 [2: 2] [0: 4] -1\n[1: 2] [3: 2] [4: 0] 1\n"  # [loop: iterations]


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_counting_does_not_change_a_program(tmp_path):
    """Iterations are counted for each entry of a loop, also if it ends by `break` or `return`."""
    builtins = (FOLDER / "runtime" / "builtins.h").read_text()
    counter = "struct Loop {" + builtins.partition("struct Loop {")[2].partition("// A kernel and its arguments")[0]
    macros = "#define EMU_LOOP" + builtins.partition("#define EMU_LOOP")[2]
    path = tmp_path / "program.cpp"
    path.write_text(COUNTER % (counter, macros) + reached.with_counters(path, PROGRAM))
    subprocess.run(["g++", "-std=c++17", path, "-o", "counted"], cwd=tmp_path, check=True)
    printed = subprocess.run([tmp_path / "counted"], capture_output=True, text=True, check=True).stdout
    assert printed == ITERATIONS


ROW = Place("kernel", "a.cuh", "for (;;)", 1)


@pytest.mark.parametrize(
    ("turns", "row", "missing"),
    [
        (":123", None, []),
        (":023", None, []),
        (":12", None, ["3"]),
        ("16:123 wide:12", None, ["3 of wide"]),
        ("16:123 wide:12", ("16:123 wide:12", "why"), []),
        ("16:12 wide:12", ("16:123 wide:12", "why"), ["3 of 16"]),
        ("16:12 wide:12", ("16:123 wide:12", ""), ["3 of 16", "3 of wide"]),
        ("wide:123", ("16:123 wide:123", ""), ["1 of 16", "2 of 16", "3 of 16"]),
        (None, (":123", ""), ["1", "2", "3"]),
        (None, (":1", "why"), ["1"]),
    ],
)
def test_a_gap_without_a_reason_is_a_problem(turns, row, missing):
    table = {} if row is None else {ROW: Reached(row[0], 3, row[1])}
    reached_now = {} if turns is None else {ROW: Reached(turns, 3)}
    problems = [problem.partition("no test reaches ")[2] for problem in reached.gaps(reached_now, table)]
    assert problems == ([", ".join(missing)] if missing else [])


def test_the_table_knows_every_loop():
    """Rows name existing loops; exactly the rows with gaps have reasons."""
    table = reached.read_table(reached.TABLE.read_text())
    loops = set(reached.places().values())
    assert {place[1:] for place in table if place.file} == loops
    assert [place for place, row in table.items() if bool(row.lacks()) != bool(row.why)] == []


def test_the_emulator_records_iterations(emulator, tmp_path, monkeypatch):
    """One token takes one iteration of the loop over positions."""
    monkeypatch.setenv("MEGALODON_OPS_REACHED", str(tmp_path))
    case = cema_case(B=1, L=1, D=3, N=2, dtype=torch.float32)
    with emulator.replacing(_C):
        forward(mo.cema, case)
    reached.write_record(emulator.module)
    result = reached.merge(tmp_path)
    loop = Place("cema_step_kernel", "cema_step.cuh", "for (int64_t t = begin; t < end; t += kSteps)", 1)
    assert 1 in result[loop].turns["wide"] and result[loop].most >= 1
    assert 1 in result[Place("cema_step_kernel", "", "grid.x", 1)].turns[""]


# Numbers of iterations and blocks that no other test reaches: builder of the case, launch sizes, sizes of the case.
# `NINE`: a binary search among nine sequences takes three steps or more.
BF16 = torch.bfloat16
NINE = list(range(10))
SPANS = {"B": 1, "L": 1, "H": 1, "K": 200, "V": 200, "C": 100, "scale": 0.05, "state": True}
LOOKUPS = {"B": 1, "L": 49, "H": 1, "K": 264, "C": 9, "cu_seqlens": [*NINE, 49]}
CASES = {
    "two-groups-of-modes": (cema_case, {}, {"D": 3, "N": 40}),
    "one-packed-sequence": (cema_case, {}, {"B": 1, "L": 70, "cu_seqlens": [0, 70], "dtype": BF16}),
    "one-token-of-two-modes": (cema_case, {}, {"L": 1, "N": 2, "dtype": BF16}),
    "two-warps-of-channels": (cema_case, {}, {"B": 1, "L": 9, "D": 80, "cu_seqlens": NINE, "dtype": BF16}),
    "one-block-of-queries": (chunked_attention_case, {}, {"B": 1, "L": 1, "H": 1, "state": True}),
    "nine-queries": (chunked_attention_case, {}, {"B": 1, "H": 1, "state": True, "cu_seqlens": NINE}),
    "nine-queries-16": (chunked_attention_case, {}, {"B": 1, "H": 1, "state": True, "cu_seqlens": NINE, "dtype": BF16}),
    "two-turns-of-spans": (chunked_attention_case, {"attention_tile": 8}, SPANS),
    "two-turns-of-spans-16": (chunked_attention_case, {"attention_tile": 8}, SPANS | {"dtype": BF16}),
    "nine-sequences": (chunked_attention_case, {}, {"B": 1, "cu_seqlens": NINE, "dtype": BF16}),
    "more-depth-than-tensor-cores-take": (
        chunked_attention_case,
        {},
        {"B": 2, "L": 70, "H": 1, "K": 258, "V": 10, "C": 70, "lengths": [0, 69], "dtype": BF16},
    ),
    "elements-of-that": (chunked_attention_case, {}, {"B": 1, "L": 5, "H": 1, "K": 257, "V": 6, "C": 5, "dtype": BF16}),
    "three-lookups-of-a-part": (normalized_qk_case, {"qk_part": 24}, LOOKUPS),
    "three-lookups-of-a-part-16": (normalized_qk_case, {"qk_part": 24}, LOOKUPS | {"dtype": BF16}),
    "nine-sequences-of-queries": (normalized_qk_case, {}, {"B": 1, "cu_seqlens": NINE, "dtype": BF16}),
    "two-blocks-of-empty-groups": (timestep_norm_case, {}, {"B": 1, "L": 2, "G": 300, "width": 1, "lengths": [0]}),
    "nine-sequences-of-the-norm": (timestep_norm_case, {}, {"B": 1, "cu_seqlens": NINE, "count": 3, "dtype": BF16}),
    "two-warps-of-tiles": (timestep_norm_case, {}, {"B": 1, "L": 768, "G": 1, "width": 1, "count": 3}),
}


@pytest.mark.parametrize("name", CASES)
def test_sizes_that_no_other_test_reaches(emulator, name):
    build, launch_sizes, sizes = CASES[name]
    case = build(**sizes)
    with emulator.replacing(_C), emulator.launch_sizes(**launch_sizes):
        actual = evaluate(getattr(mo, case.op), case)
    assert_matches_reference(actual, case)
