"""What tests/cuda_emulator/mutate.py breaks in a kernel, and how it reads what the tests said."""

from __future__ import annotations

import shutil
import signal
import subprocess

import pytest
from cuda_emulator import mutate
from cuda_emulator.emulator import FOLDER
from cuda_emulator.mutants import mutants, switched

MUTANTS = {
    "  __syncthreads();": ["`__syncthreads()` deleted"],
    "  if (x) __syncwarp(mask(1));": ["`x` becomes `true`", "`__syncwarp(mask(1))` deleted"],
    "  gpu::named_barrier(1, kThreads);": ["`gpu::named_barrier(1, kThreads)` deleted"],
    "  gpu::cp_async_commit();": ["`gpu::cp_async_commit()` deleted"],
    "  gpu::cp_async_wait<1>();": ["`1` becomes `1 + 1`", "`gpu::cp_async_wait<1>()` deleted"],
    "  if (i >= n) return;": ["`i >= n` becomes `false`"],
    "  if (i < n) {": ["`i < n` becomes `true`"],
    "  const bool active = i < n;": ["`i < n` becomes `true`"],
    "  const bool a = x, b = f<1, 2>(y, z), c = z;": [
        "`x` becomes `true`",
        "`f<1, 2>(y, z)` becomes `true`",
        "`z` becomes `true`",
    ],
    "  if (f(a, b) && x[i] < (n + 1)) g();": [
        "`f(a, b) && x[i] < (n + 1)` becomes `true`",
        "`f(a, b)` becomes `true`",
        "`x[i] < (n + 1)` becomes `true`",
    ],
    "  return a || b == c;": ["`a` becomes `false`", "`b == c` becomes `false`"],
    "  y = i < n && j != m ? x[i] : R{0};": [
        "`i < n && j != m` becomes `true`",
        "`i < n && j != m` becomes `false`",
        "`i < n` becomes `true`",
        "`j != m` becomes `true`",
    ],
    "  y += i >= n ? x : R{0};": ["`i >= n` becomes `true`", "`i >= n` becomes `false`"],
    "  y = x == -R{INFINITY} ? R{0} : x;": [
        "`x == -R{INFINITY}` becomes `true`",
        "`x == -R{INFINITY}` becomes `false`",
    ],
    "  g(p.state ? *p.state : 0);": ["`p.state` becomes `true`", "`p.state` becomes `false`"],
    "  for (int i = 0; valid && i < n; ++i) sum += x[i];": [
        "`i <` becomes `i <=`",
        "`valid` becomes `true`",  # without the other bound the loop would not end
    ],
    "  GPU_UNROLL\n  for (int i = 0; i < 4; ++i) sum += x[i];": [],
    "  // if (i < n) __syncthreads();": [],
    '  f("a ? b : c");': [],
    "  R x[kLong ? n : 1][2];": [],
    "  constexpr int width = n < 4 ? n : 4;": [],
    "  f(std::forward<A>(a)); auto&& b = a;": [],
}


@pytest.mark.parametrize("code", MUTANTS)
def test_mutants(code):
    text = f"void kernel() {{\n{code}\n}}\n"
    found = mutants(text)
    assert sorted(mutant.change for mutant in found) == sorted(MUTANTS[code])
    assert len({mutant.text for mutant in found} | {text}) == len(found) + 1
    for mutant in found:
        assert mutant.line == 2 + code.startswith("  GPU_UNROLL")


def test_a_mutant_differs_in_one_place():
    (mutant,) = mutants("a();\n__syncthreads();\nb();\n")
    assert (mutant.line, mutant.text) == (2, "a();\n;\nb();\n")


PROGRAM = r"""#include <cstdio>
#include <cstdlib>
unsigned calls = 0;
void __syncthreads() { calls = 3 * calls + 1; }
namespace gpu {
template <int kPending> void cp_async_wait() { calls = 5 * calls + kPending; }
}

int f(int a, int b, int n) {
  if (b > 8 || n > 99) return -1;
  int sum = 0;
  for (int i = 0; a > 0 && i < n; ++i) sum += b || i == 1 ? 1 : 10;
  const bool even = n % 2 == 0, both = a &&  // at the end of a line
                                       b;
  if (even && (a > 1 || both)) __syncthreads();
  else sum += 100;
  gpu::cp_async_wait<1>();
  return sum;
}
"""
MAIN = r"""
#include <cstdio>
#include <cstdlib>
#include <vector>
namespace emu { extern std::vector<unsigned char> mattered; }
extern "C" { extern int gpu_mutant; }
extern unsigned calls;
int f(int a, int b, int n);

int main(int, char** arguments) {
  gpu_mutant = std::atoi(arguments[1]);
  for (int i = 0; i < 250; ++i) std::printf("%d ", f(i % 5 - 1, i / 5 % 5 * 3, i / 25));
  std::printf("%u\n", calls);
  for (size_t i = 0; i < emu::mattered.size(); ++i)
    if (emu::mattered[i]) std::printf("%d ", static_cast<int>(i));
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_a_switch_does_what_the_mutants_do(tmp_path):
    """One program that holds all of them prints what each of them prints by itself, and knows which matter."""

    def compiled(*arguments: str) -> None:
        subprocess.run(["g++", "-std=c++17", "-w", *arguments], cwd=tmp_path, check=True)

    def program(name: str, text: str) -> str:
        (tmp_path / f"{name}.cpp").write_text(text)
        compiled(f"{name}.cpp", "main.o", "mutants.o", "-o", name)
        return str(tmp_path / name)

    def output(program: str, number: int) -> list[str]:
        return subprocess.run([program, str(number)], capture_output=True, text=True, check=True).stdout.split("\n")

    (tmp_path / "main.cpp").write_text(MAIN)
    compiled("-c", "main.cpp", str(FOLDER / "runtime" / "mutants.cpp"))
    found = list(enumerate(mutants(PROGRAM), start=1))
    text = switched(PROGRAM, found)
    assert text.count("\n") == PROGRAM.count("\n")
    switch = program("switched", text)
    plain, mattered = output(switch, 0)
    assert plain == output(program("plain", PROGRAM), 0)[0]
    assert len(mattered.split()) == len(found) - 1  # n > 99 is never true
    for number, mutant in found:
        alone = output(program(f"mutant{number}", mutant.text), 0)[0]
        assert output(switch, number)[0] == alone, mutant.change
        assert (alone != plain) == (str(number) in mattered.split()), mutant.change


OUTPUTS = {
    "E   EmulationError: in k:\nE     race: read after write of byte 3\nFAILED tests/test_x.py::test_y[1] - E": (
        "race, `test_y`"
    ),
    "E   EmulationError: in k:\nE     out of bounds: read of 4 bytes\nFAILED tests/test_x.py::test_y - E": (
        "out of bounds, `test_y`"
    ),
    "E   EmulationError: invalid launch of k: no grid\nFAILED tests/test_x.py::test_y - E": "invalid launch, `test_y`",
    "E   AssertionError: q: error 3 > 2\nFAILED tests/test_x.py::test_y - A": "wrong result, `test_y`",
}


@pytest.mark.parametrize("output", OUTPUTS)
def test_what_killed_a_mutant(output):
    assert mutate._cause(1, output) == OUTPUTS[output]


def test_a_mutant_that_hangs_or_crashes_is_dead():
    assert mutate._cause(-signal.SIGPROF, "") == "never ends"
    assert mutate._cause(-11, "") == "crash (SIGSEGV)"
    with pytest.raises(RuntimeError, match="ended with 4 and no failed test"):
        mutate._cause(4, "usage")


def test_the_table_keeps_explanations(tmp_path, monkeypatch):
    """An explanation belongs to a file and a mutation, wherever its line is; rows of files that were not run stay."""
    texts = {
        "a.cu": "f(a || b);\n__syncthreads();\n__syncthreads();\n",
        "b.cu": "__syncwarp();\n",
        "c.cu": "__syncwarp();\n",
    }
    monkeypatch.setattr(mutate, "ROOT", tmp_path)
    monkeypatch.setattr(mutate, "TABLE", tmp_path / "docs" / "mutation.md")
    monkeypatch.setattr(mutate, "kernel_files", lambda only: [mutate.Path(name) for name in texts])

    def write(dead: dict[str, int], barriers: bool = False) -> str:
        """The table after a run of these files, in which the first `dead` mutants of each died."""
        done = []
        for name, count in dead.items():
            found = enumerate(mutants((tmp_path / name).read_text()))
            done += [
                (mutate.Job(mutate.Path(name), m, ""), mutate.SURVIVED if i >= count else "race") for i, m in found
            ]
        done = [(job, outcome) for job, outcome in done if not barriers or "sync" in job.mutant.change]
        mutate.write_table(done, barriers)
        return mutate.TABLE.read_text()

    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    table = write({"a.cu": 0, "b.cu": 0})
    assert "5 mutants, 0 killed, 5 alive. Not run: c.cu.\nBy file: a.cu 4, b.cu 1.\n" in table
    assert "| a.cu | `__syncthreads()` deleted |  |\n| a.cu | `__syncthreads()` deleted, number 2 |  |" in table
    explained = table.replace("number 2 |  |", "number 2 | not \\| needed |").replace(
        "`a` becomes `false` |  |", "`a` becomes `false` | why |"
    )
    mutate.TABLE.write_text(explained)
    (tmp_path / "a.cu").write_text("\n" + texts["a.cu"])  # one line further down
    table = write({"a.cu": 1})
    assert "5 mutants, 1 killed, 4 alive. Not run: c.cu." in table
    assert "| a.cu | `__syncthreads()` deleted, number 2 | not \\| needed |" in table
    assert "`a` becomes" not in table and "| b.cu | `__syncwarp()` deleted |  |" in table
    table = write({"a.cu": 4}, barriers=True)
    assert "5 mutants, 3 killed, 2 alive" in table
    assert "`b` becomes `false`" in table and "syncthreads" not in table and "b.cu | `__syncwarp()`" in table
    assert mutate.rows_of(table) == [
        mutate.Row("a.cu", "`b` becomes `false`", 1, ""),
        mutate.Row("b.cu", "`__syncwarp()` deleted", 1, ""),
    ]


def test_the_table_names_mutants_that_there_are():
    """Every row has a reason; no row is of an expression that has gone from the kernels."""
    found = {(file.name, *numbered) for file in mutate.kernel_files([]) for numbered in mutate.numbered(file)}
    text = mutate.TABLE.read_text()
    rows = mutate.rows_of(text)
    assert rows and [row for row in rows if row[:3] not in found or not row.why] == []
