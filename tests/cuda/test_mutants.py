"""Mutants of kernels by tests/cuda/emulator/mutate.py, and its reading of test output."""

import shutil
import signal
import subprocess
import sys

import pybind11
import pytest
from emulator import mutate
from emulator.device import FOLDER
from emulator.mutants import SWITCH, mutants, with_mutants

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
        "`valid` becomes `true`",  # a mutant of the other bound would loop forever
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
extern unsigned* const calls_of[];
extern int (*const f_of[])(int a, int b, int n);

int main(int, char** arguments) {
  const int program = std::atoi(arguments[1]);
  gpu_mutant = std::atoi(arguments[2]);
  for (int i = 0; i < 250; ++i) std::printf("%d ", f_of[program](i % 5 - 1, i / 5 % 5 * 3, i / 25));
  std::printf("%u\n", *calls_of[program]);
  for (size_t i = 0; i < emu::mattered.size(); ++i)
    if (emu::mattered[i]) std::printf("%d ", static_cast<int>(i));
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_a_switched_program_behaves_like_its_mutants(tmp_path):
    """One program with all mutants prints what each of them prints alone, and records which of them matter."""
    found = list(enumerate(mutants(PROGRAM), start=1))
    text = with_mutants(PROGRAM, found)
    assert text.count("\n") == PROGRAM.count("\n")
    programs = [PROGRAM, *(mutant.text for _, mutant in found), SWITCH + text]  # each in a namespace of its own
    switch = len(programs) - 1

    def table(declaration: str, name: str) -> str:
        return f"{declaration} = {{{', '.join(name.format(i) for i in range(len(programs)))}}};\n"

    (tmp_path / "main.cpp").write_text(MAIN)
    (tmp_path / "programs.cpp").write_text(
        "#include <cstdio>\n#include <cstdlib>\n"
        + "".join(f"namespace p{i} {{\n{program}}}\n" for i, program in enumerate(programs))
        + table("extern unsigned* const calls_of[]", "&p{}::calls")
        + table("extern int (*const f_of[])(int, int, int)", "p{}::f")
    )
    sources = ["main.cpp", "programs.cpp", str(FOLDER / "runtime" / "mutants.cpp")]
    subprocess.run(["g++", "-std=c++17", "-w", *sources, "-o", "all"], cwd=tmp_path, check=True)

    def output(program: int, number: int = 0) -> list[str]:
        command = [str(tmp_path / "all"), str(program), str(number)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")

    plain, mattered = output(switch)
    assert plain == output(0)[0]
    assert len(mattered.split()) == len(found) - 1  # n > 99 is never true
    for number, mutant in found:
        expected = output(number)[0]
        assert output(switch, number)[0] == expected, mutant.change
        assert (expected != plain) == (str(number) in mattered.split()), mutant.change


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
def test_the_cause_of_a_mutants_death(output):
    assert mutate._cause(1, output) == OUTPUTS[output]


def test_a_mutant_that_hangs_or_crashes_is_dead():
    assert mutate._cause(-signal.SIGPROF, "") == "never ends"
    assert mutate._cause(-11, "") == "crash (SIGSEGV)"
    with pytest.raises(RuntimeError, match="ended with 4 and no failed test"):
        mutate._cause(4, "usage")


@pytest.mark.slow
def test_a_session_starts_in_a_workshop(tmp_path):
    """The copy has all that tests import and that the emulator's build includes. Nothing is compiled."""
    folder = mutate.Workshop(tmp_path / "copy", {}).folder
    session = mutate.Session(folder, tmp_path / "session.txt", {"test_cuda_normalized_qk.py", "test_ops.py"})
    assert {test.partition("::")[0] for test in session.tests} == {
        "tests/cuda/normalized_qk/test_cuda_normalized_qk.py",
        "tests/ops/common/test_ops.py",
    }
    session.close()
    options = [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}"]
    configure = ["cmake", "-S", folder / "tests/cuda/emulator", "-B", tmp_path / "build", *options]
    subprocess.run(configure, check=True, capture_output=True)


def test_the_table_keeps_explanations(tmp_path, monkeypatch):
    """Explanations belong to a file and a mutation, not to a line; rows of mutants that were not run stay."""
    texts = {
        "a.cu": "f(a || b);\n__syncthreads();\n__syncthreads();\n",
        "b.cu": "__syncwarp();\n",
        "c.cu": "__syncwarp();\n",
    }
    monkeypatch.setattr(mutate, "ROOT", tmp_path)
    monkeypatch.setattr(mutate, "TABLE", tmp_path / "survivors.tsv")
    monkeypatch.setattr(mutate, "kernel_files", lambda only: [mutate.Path(name) for name in texts])

    def write(dead: dict[str, int], only: str = "") -> str:
        """The table after a run of mutants that contain `only`; the first `dead[file]` of each file died."""
        done = []
        for name, count in dead.items():
            for i, (mutant, nth) in enumerate(mutate.numbered(mutate.Path(name))):
                if only in mutant.change:
                    job = mutate.Job(mutate.Path(name), mutant, nth, key="")
                    done.append((job, "race" if i < count else mutate.SURVIVED))
        mutate.write_table(done)
        return mutate.TABLE.read_text()

    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    table = write({"a.cu": 0, "b.cu": 0})
    assert table.startswith("# 5 mutants were run: 0 killed, 5 alive.\n# By file: a.cu 4, b.cu 1\n# Not run: c.cu\n")
    assert "a.cu\t`__syncthreads()` deleted\t1\t\na.cu\t`__syncthreads()` deleted\t2\t\n" in table
    explained = table.replace("deleted\t2\t\n", "deleted\t2\tnot | needed\n")
    explained = explained.replace("`false`\t1\t\n", "`false`\t1\twhy\n")
    mutate.TABLE.write_text(explained)
    (tmp_path / "a.cu").write_text("\n" + texts["a.cu"])  # one line further down
    table = write({"a.cu": 1})
    assert table.startswith("# 5 mutants were run: 1 killed, 4 alive.\n")
    assert "a.cu\t`__syncthreads()` deleted\t2\tnot | needed\n" in table
    assert "`a` becomes" not in table and "b.cu\t`__syncwarp()` deleted\t1\t\n" in table
    table = write({"a.cu": 4}, only="sync")
    assert table.startswith("# 5 mutants were run: 3 killed, 2 alive.\n# By file: a.cu 4, b.cu 1\n")
    assert mutate.rows_of(table) == [
        mutate.Row("a.cu", "`b` becomes `false`", 1, "why"),
        mutate.Row("b.cu", "`__syncwarp()` deleted", 1, ""),
    ]
    (tmp_path / "a.cu").write_text("f(a);\n")
    assert mutate.rows_of(write({})) == [mutate.Row("b.cu", "`__syncwarp()` deleted", 1, "")]


def test_the_table_names_existing_mutants():
    """Every row has a reason and names an expression that the kernels have."""
    found = {
        (file.name, mutant.change, nth) for file in mutate.kernel_files([]) for mutant, nth in mutate.numbered(file)
    }
    rows = mutate.rows_of(mutate.TABLE.read_text())
    assert rows and [row for row in rows if row[:3] not in found or not row.why] == []
