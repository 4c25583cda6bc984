"""Rules of kernel files: kernels obey them, and lint.py finds each breach."""

from pathlib import Path

import pytest
from emulator import widened
from emulator.known_bugs import BUGS
from emulator.lint import CUDA, lint
from emulator.widened import EXCEPTIONS, widened_products


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


def test_no_product_of_32_bits_becomes_64(emulated_module):
    """Only known bugs have such products and cut sizes, and the rule finds each that casts a 64-bit number."""
    planted = {}
    for name, bug in BUGS.items():
        if "=> static_cast<int>(it)" in bug.code:
            before, _, _ = bug.path.read_text().partition(bug.right)
            planted[bug.file, before.count("\n") + 1] = name
    found = widened_products(Path(emulated_module.__file__).parent, CUDA)
    assert {place: line for place, line in found.items() if line not in EXCEPTIONS and place not in planted} == {}
    assert planted and planted.keys() <= found.keys(), {planted[place] for place in planted.keys() - found.keys()}
    assert set(EXCEPTIONS) <= set(found.values())


def test_multiples_and_loops_multiply(emulated_module):
    planted = Path(widened.__file__).parent / "planted"
    found = widened_products(Path(emulated_module.__file__).parent, planted).values()
    lines = (planted / "wrappers.cu").read_text().partition("struct Rows")[2].splitlines()
    assert [line for line in lines if line.strip() in found] == [line for line in lines if line.endswith("// found")]
