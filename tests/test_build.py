"""What CMake decides: the instruction set that a kernel runs in."""

from __future__ import annotations

import os
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

DISPATCH = """
#include <cstdio>
#include "isa.h"
namespace megalodon {
Isa active_isa{};
struct Params { DType dtype; };
MEGALODON_CPU_KERNEL(everywhere, Params)
MEGALODON_CPU_KERNEL(some, Params)
#define DEFINE(isa, name) namespace isa { void name(const Params&) { std::printf(" %s", #isa); } }
DEFINE(v2, everywhere) DEFINE(v3, everywhere) DEFINE(v4, everywhere) DEFINE(v4_bf16, everywhere) DEFINE(v4_amx, everywhere)
DEFINE(v2, some) DEFINE(v4, some) DEFINE(v4_bf16, some)
}
int main() {
  using namespace megalodon;
  const DType dtypes[] = {DType::f32, DType::bf16};
  for (int i = 0; i < 5; ++i) {
    active_isa = static_cast<Isa>(i);
    for (const DType dtype : dtypes) {
      launch_everywhere({dtype});
      launch_some({dtype});
    }
    std::puts("");
  }
}
"""
needs_x86 = pytest.mark.skipif(
    "x86_64" not in sysconfig.get_platform(), reason="other processors have one instruction set"
)


def compile_and_link(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    (folder / "dispatch.cpp").write_text(code)
    compiler = os.environ.get("CXX", "g++")
    command = [compiler, "-std=c++17", "-fPIC", "-pie", f"-I{ROOT / 'cpp'}", "dispatch.cpp", "-o", "dispatch"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@needs_x86
def test_a_kernel_runs_as_compiled_for_the_best_suitable_instruction_set_up_to_the_active_one(tmp_path):
    compiled = compile_and_link(tmp_path, DISPATCH)
    assert compiled.returncode == 0, compiled.stderr
    lines = subprocess.run([tmp_path / "dispatch"], capture_output=True, text=True, check=True).stdout.splitlines()
    # Of float32: everywhere, some; of bfloat16 the same.
    assert lines == [
        " v2 v2 v2 v2",
        " v3 v2 v3 v2",
        " v4 v4 v4 v4",
        " v4 v4 v4_bf16 v4_bf16",
        " v4 v4 v4_amx v4_bf16",
    ]


@needs_x86
def test_a_kernel_that_the_lowest_instruction_set_lacks_does_not_link(tmp_path):
    linked = compile_and_link(tmp_path, DISPATCH.replace("DEFINE(v2, some) ", ""))
    assert linked.returncode != 0 and "megalodon::v2::some" in linked.stderr
