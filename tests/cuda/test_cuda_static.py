"""Machine code of the installed CUDA kernels, for each architecture: no spills, the promised instructions.

Without CUDA kernels, or without nvcc for the planted ones, these tests are skipped. The tests of the installed kernels
are slow ones: nvdisasm takes 18 s for one architecture. static/README.md says how to read and add promises.
"""

import re
import shutil
from collections.abc import Callable

from paths import TESTS
import pytest
from static.promises import LOAD_64, LOAD_128, PROMISES, STORE_128, Promise, breaches, promises_of
from bench.sass import ROOT, Kernel, MissingTool, assembly, compiled, demangle, installed, kernels_of, ptx_of, table

from megalodon_ops.ops.common import definition as library

PLANTED = TESTS / "cuda" / "static" / "planted" / "breaches.cu"


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
    problems = breaches(kernels, promises_of(library.cuda_extension().build_info()["compiler"]))
    assert not problems, "\n" + "\n".join(problems)


@pytest.mark.slow
def test_code_and_ptx_are_for_the_architectures_that_the_build_names(kernels):
    named = library.cuda_extension().build_info()["architectures"].split(", ")
    assert {kernel.architecture for kernel in kernels} == {int(name.removesuffix("-real")) for name in named}
    assert ptx_of(installed()) == {100 if int(name) >= 100 else 80 for name in named if name.isdigit()}


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


def test_exceptions_of_one_compiler_hold_for_no_other():
    """Exceptions of nvcc 12 do not hold for nvcc 13."""
    assert promises_of("nvcc 13.0.88") == promises_of("nvcc 14.0.1") == list(PROMISES)
    name = "chunked_attention_bwd_products_kernel<PlainProduct<float, 64, 64>>"
    takes_216 = Kernel(name, architecture=80, registers=216)
    for compiler, problems in {"nvcc 12.9.86": 0, "nvcc 13.0.88": 1}.items():
        own = [promise for promise in promises_of(compiler) if re.fullmatch(promise.kernel, name)]
        assert len(breaches([takes_216], own)) == problems, compiler


# Instructions of the wrappers in cuda/common, from the PTX ISA: words are numbered as in its figures of fragments, and
# the first word of "cvt.rn.bf16x2.f32 d, a, b" is the upper half. Only this table checks nvcc's branch of a wrapper;
# test_cuda_instructions.py checks the emulator's.
VALUES = {  # by C++ type: suffix of an access, words of its operand
    "unsigned short": ("b16", "{}0"),
    "Pack<unsigned int, 1>": ("b32", "{}0"),
    "Pack<unsigned int, 2>": ("v2.b32", "{{{0}0,{0}1}}"),
    "Pack<unsigned int, 4>": ("v4.b32", "{{{0}0,{0}1,{0}2,{0}3}}"),
}
MMA = "mma.sync.aligned.{}.row.col.f32.{}.f32 {{z0,z1,z2,z3}}, {{x0,x1,x2,x3}}, {{y0,y1}}, {{z0,z1,z2,z3}}"
LDMATRIX = "ldmatrix.sync.aligned.m8n8.{}.shared.b16 {{{}}}, [shared]"
INSTRUCTIONS = {
    **{f"loads<{V}>": f"ld.global.{kind} {words.format('y')}, [x]" for V, (kind, words) in VALUES.items()},
    **{f"stores<{V}>": f"st.global.{kind} [y], {words.format('x')}" for V, (kind, words) in VALUES.items()},
    **{f"loads_shared<{V}>": f"ld.shared.{kind} {words.format('x')}, [shared]" for V, (kind, words) in VALUES.items()},
    **{f"stores_shared<{V}>": f"st.shared.{kind} [shared], {words.format('x')}" for V, (kind, words) in VALUES.items()},
    "copies<4>": "cp.async.ca.shared.global [shared], [x], 4, y0",  # y0 bytes are read, the others zeros
    "copies<8>": "cp.async.ca.shared.global [shared], [x], 8, y0",
    "copies<16>": "cp.async.cg.shared.global [shared], [x], 16, y0",
    "commits": "cp.async.commit_group",
    "waits<0>": "cp.async.wait_group 0",
    "waits<2>": "cp.async.wait_group 2",
    "matrices<1>": LDMATRIX.format("x1", "x0"),
    "matrices<2>": LDMATRIX.format("x2", "x0,x1"),
    "matrices<4>": LDMATRIX.format("x4", "x0,x1,x2,x3"),
    "transposed<1>": LDMATRIX.format("x1.trans", "x0"),
    "transposed<2>": LDMATRIX.format("x2.trans", "x0,x1"),
    "transposed<4>": LDMATRIX.format("x4.trans", "x0,x1,x2,x3"),
    "multiplies<bf16>": MMA.format("m16n8k16", "bf16.bf16"),
    "multiplies<fp16>": MMA.format("m16n8k16", "f16.f16"),
    "multiplies<float>": MMA.format("m16n8k8", "tf32.tf32"),
    "packs<bf16>": "cvt.rn.bf16x2.f32 y0, x1, x0",
    "packs<fp16>": "cvt.rn.f16x2.f32 y0, x1, x0",
    "joins<0>": "prmt.b32 y0, x0, x1, 21520",  # 0x5410: bytes 0 and 1 of x0, then of x1
    "joins<1>": "prmt.b32 y0, x0, x1, 30258",  # 0x7632: bytes 2 and 3
    "narrows<bf16>": "cvt.rn.bf16.f32 y0, x0",
    "narrows<fp16>": "cvt.rn.f16.f32 y0, x0",
    "widens": "cvt.f32.f16 y0, x0",
    "rounds": "cvt.rna.tf32.f32 y0, x0",
    "exponential": "ex2.approx.ftz.f32 y0, x0",
    "barrier": "bar.sync x0, y0",
}
WRAPPERS = PLANTED.parent / "wrappers.cu"


def test_wrappers_compile_to_their_instructions():
    assert or_skip(lambda: assembly(WRAPPERS)) == INSTRUCTIONS
    sources = "".join(file.read_text() for file in (ROOT / "cuda" / "common").glob("*.cuh"))
    written = re.findall(r'\basm(?: volatile)?\(\s*"([\w.]+)', sources)
    assert len(written) > 20
    for opcode in written:  # in a macro, only its beginning
        assert any(instruction.startswith(opcode) for instruction in INSTRUCTIONS.values()), f"{opcode} has no kernel"


BUGS = {  # (file, right, wrong): kernels of wrappers.cu that change
    ("async.cuh", "[%1], 16, %2;", "[%1], 16;"): {"copies<16>"},
    ("async.cuh", "[%1], %2, %3;", "[%1], %3, %3;"): {"copies<4>", "copies<8>"},
    ("async.cuh", '"n"(kPending)', '"n"(kPending + 1)'): {"waits<0>", "waits<2>"},
    ("matrix.cuh", "x4.trans.", "x4."): {"transposed<4>"},
    ("matrix.cuh", "m8n8.x2.shared", "m8n8.x2.trans.shared"): {"matrices<2>"},
    ("matrix.cuh", "bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}", "bf16.f32 {%0,%1,%2,%3}, {%4,%6,%5,%7}"): {
        "multiplies<bf16>"
    },
    ("matrix.cuh", "f16.f16.f32 {%0,%1,%2,%3}, {%4", "f16.f16.f32 {%0,%2,%1,%3}, {%4"): {"multiplies<fp16>"},
    (
        "matrix.cuh",
        "tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}",
        "tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%9,%8}",
    ): {"multiplies<float>"},
    ("convert.cuh", '"f"(high), "f"(low)', '"f"(low), "f"(high)'): {"packs<bf16>", "packs<fp16>"},
    ("convert.cuh", "__byte_perm(low, high,", "__byte_perm(high, low,"): {"joins<0>", "joins<1>"},
    ("portable.cuh", '"bar.sync %0, %1;"', '"bar.sync %1, %0;"'): {"barrier"},
}


def test_bugs_in_the_branch_for_nvcc_are_found(tmp_path):
    """All bugs are compiled at once; each changes other kernels."""
    shutil.copytree(ROOT / "cuda" / "common", tmp_path, dirs_exist_ok=True)
    shutil.copy(WRAPPERS, tmp_path)
    for file, right, wrong in BUGS:
        text = (tmp_path / file).read_text()
        assert right in text, right
        (tmp_path / file).write_text(text.replace(right, wrong))
    found = or_skip(lambda: assembly(tmp_path / WRAPPERS.name))
    assert {name for name in found if found[name] != INSTRUCTIONS[name]} == set().union(*BUGS.values())


def test_demangled_names_are_short():
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
