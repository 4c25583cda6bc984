"""What nvcc has made of the installed CUDA kernels, for each architecture: no spills, the promised instructions.

Without CUDA kernels, or without nvcc for the planted ones, these tests are skipped. The tests of the installed kernels
are slow ones: nvdisasm takes 18 s for one architecture. cuda_static/README.md says how to read and add promises.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cuda_static.promises import LOAD_64, LOAD_128, STORE_128, Promise, breaches
from cuda_static.sass import ROOT, Kernel, MissingTool, compiled, demangle, installed, kernels_of, ptx, ptx_of, table

from megalodon_ops.ops import library

PLANTED = Path(__file__).parent / "cuda_static" / "planted" / "breaches.cu"


def or_skip(kernels: Callable[[], list[Kernel]]) -> list[Kernel]:
    try:
        return kernels()
    except MissingTool as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    return or_skip(lambda: kernels_of(installed()))


@pytest.fixture(scope="module")
def planted() -> dict[str, Kernel]:
    return {kernel.name: kernel for kernel in or_skip(lambda: compiled(PLANTED))}


@pytest.mark.slow
def test_kernels_keep_their_promises(kernels):
    print(table(kernels))
    problems = breaches(kernels)
    assert not problems, "\n" + "\n".join(problems)


@pytest.mark.slow
def test_code_and_ptx_are_for_the_architectures_that_the_build_names(kernels):
    named = library.cuda_extension().build_info()["architectures"].split(", ")
    assert {kernel.architecture for kernel in kernels} == {int(name.removesuffix("-real")) for name in named}
    assert ptx_of(installed()) == {int(name) for name in named if name.isdigit()}


BREACHES = {
    "array_in_local_memory": [
        r"\d+ bytes of stack",
        r"\d+ accesses to local memory \(LDL\), the first at breaches.cu:",
    ],
    "spills": [r"\d+ bytes of stack", r"accesses to local memory \(STL"],
    "calculates_in_double<float>": [r"1 fp64 operations \(DMUL\), the first at breaches.cu:\d+"],
    "accesses_bytes": [r"1 global accesses of single bytes \(LDG", r"1 global accesses of single bytes \(STG"],
    "adds_atomically": [r"1 atomic operations \(\w+"],
    "calls": ["not_inlined is not inlined; mark it GPU_INLINE"],
}


@pytest.mark.parametrize("name", BREACHES)
def test_a_breach_is_found(planted, name):
    problems = breaches([planted[name]], [Promise(re.escape(name), registers=255)])
    for pattern in BREACHES[name]:
        assert any(re.search(pattern, problem) for problem in problems), problems
    assert all(problem.startswith(f"{name} (sm_90): ") for problem in problems)


@pytest.mark.parametrize(
    ("promise", "problem"),
    [
        (Promise(r"copies<4>", 24, uses=(LOAD_128, STORE_128), avoids=(LOAD_64,)), ""),
        (Promise(r"copies<4>", 24, uses=(LOAD_64,)), "no instruction"),
        (Promise(r"copies<4>", 24, avoids=(LOAD_128,)), r"1 instructions that it promises to avoid \(LDG\.E\.128"),
        (Promise(r"copies<4>", 4), r"takes \d+ registers, not the promised 4"),
        (Promise(r"copies<2>", 24), "has 0 entries in promises.py instead of one; no kernel is called copies<2>"),
    ],
)
def test_a_promise_is_checked(planted, promise, problem):
    problems = "; ".join(breaches([planted["copies<4>"]], [promise]))
    assert re.search(problem, problems) and bool(problems) == bool(problem), problems


def test_two_promises_for_a_kernel_are_one_too_many(planted):
    assert breaches([planted["copies<4>"]], [Promise("copies<4>", 24), Promise("copies<.>", 24)]) == [
        "copies<4> (sm_90): has 2 entries in promises.py instead of one"
    ]


def test_what_a_promise_allows_is_no_breach(planted):
    double, local = planted["calculates_in_double<float>"], planted["array_in_local_memory"]
    assert breaches([double], [Promise(r"calculates_in_double<float>", 24, doubles="a planted kernel")]) == []
    assert breaches([local], [Promise(r"array_in_local_memory", 64, stack={90: "a planted kernel"})]) == []
    assert breaches([local], [Promise(r"array_in_local_memory", 64, stack={80: "of another architecture"})])
    assert breaches([planted["calculates_in_double<double>"]], [Promise(r"calculates_in_double<double>", 24)]) == []


# The halves of a packed pair, as the PTX ISA gives them for "cvt.rn.bf16x2.f32 d, a, b": a is the upper one, b the lower.
PACKED = r"cvt\.rn\.(bf16x2|f16x2)\.f32\s+%r\d+,\s*(%f\d+|%r\d+),\s*(%f\d+|%r\d+);"


def packed_halves(source: Path) -> dict[str, tuple[int, int]]:
    """By type: which of two floats in memory goes to the lower half and which to the upper."""
    found = {}
    for kernel in or_skip(lambda: ptx(source)).split(".entry")[1:]:
        loads = re.findall(r"ld\.global\S*\.[fb]32\s+(%[fr]\d+),\s*\[%\w+(?:\+(\d+))?\];", kernel)
        index = {register: int(offset or 0) // 4 for register, offset in loads}
        ((name, upper, lower),) = re.findall(PACKED, kernel)
        found[name] = index[lower], index[upper]
    return found


def test_the_first_of_a_packed_pair_is_the_lower_half(tmp_path):
    """The emulator packs by itself, so that nothing else sees nvcc's branch."""
    assert packed_halves(PLANTED.parent / "packs.cu") == {"bf16x2": (0, 1), "f16x2": (0, 1)}
    shutil.copy(PLANTED.parent / "packs.cu", tmp_path)
    right = (ROOT / "cuda" / "common" / "convert.cuh").read_text()
    swapped = right.replace('"f"(high), "f"(low)', '"f"(low), "f"(high)')
    (tmp_path / "convert.cuh").write_text(swapped)
    assert packed_halves(tmp_path / "packs.cu") == {"bf16x2": (1, 0), "f16x2": (1, 0)}


def test_names_are_short():
    mangled = [
        "_ZN9megalodon13normalized_qk29normalized_qk_fwd_warp_kernelINS_4bf16ELi8ELb1EEEvNS_21NormalizedQkFwdParamsE",
        "_ZN12_GLOBAL__N_16kernelIfLi4EEEvPKfPf",
        "_Z5scalePf",
        "_Z1kI1AIfEEvv",
    ]
    names = ["normalized_qk_fwd_warp_kernel<bf16, 8, true>", "kernel<float, 4>", "scale", "k<A<float>>"]
    assert demangle(mangled) == names


def test_a_compile_error_is_shown(planted, tmp_path):
    (tmp_path / "broken.cu").write_text("__global__ void broken() { undeclared = 1; }\n")
    with pytest.raises(RuntimeError, match='identifier "undeclared" is undefined'):
        compiled(tmp_path / "broken.cu")
