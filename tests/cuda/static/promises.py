"""What each kernel promises about its instructions, and the rules that all kernels keep.

A kernel of cuda/ is matched by exactly one entry of PROMISES.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from bench.sass import Kernel

# Accesses of 16 and of 8 bytes, and of less; products of tensor cores, and the loads that feed them.
LOAD_128, STORE_128, COPY_128 = r"LDG\.(\w+\.)*128\b", r"STG\.(\w+\.)*128\b", r"LDGSTS\.(\w+\.)*128\b"
LOAD_64, STORE_64 = r"LDG\.(\w+\.)*64\b", r"STG\.(\w+\.)*64\b"
NOT_STORE_128 = r"STG\.(?!(\w+\.)*128\b)"
MMA_BF16, MMA_FP16, MMA_TF32 = r"HMMA\.16816\.F32\.BF16", r"HMMA\.16816\.F32$", r"HMMA\.1688\.F32\.TF32"
LDMATRIX = r"LDSM\."

DOUBLE_ARITHMETIC = r"D(ADD|MUL|FMA|SETP|MNMX|MMA)\b|MUFU\.R(CP|SQ)64H"  # conversions are allowed: `eps` is a double
LOCAL_ACCESS = r"(LD|ST)L\b"
RULES = {
    r"(LD|ST)G?\.(\w+\.)*[US]8\b": "global accesses of single bytes",
    r"(ATOM|ATOMG|ATOMS|RED|REDG)\b": "atomic operations",
}


@dataclass(frozen=True)
class Promise:
    kernel: str  # a regular expression for the whole name, as `sass.py` prints it
    registers: int  # at most, on every architecture
    uses: tuple[str, ...] = ()  # regular expressions for the beginning of an opcode; each finds one
    avoids: tuple[str, ...] = ()  # expressions that find no opcode
    doubles: str = ""  # why a kernel of narrower types calculates in fp64
    stack: dict[int, str] = field(default_factory=dict)  # why it spills or has an array in memory, by architecture
    nvcc_12: dict[str, Any] = field(default_factory=dict)  # fields that differ where CUDA 12 compiled it


_SCAN = "the scan over time: two numbers a group of channels and warp of rows"
_DROPKEY = "the threshold of DropKey, a product a thread"
_LAST_SEEN = "four registers spill with 64 columns and 48 keys: the last column that a row sees is one number more"
_LATER = "2 to 4 registers spill with float, read outside of loops over groups of steps; on 120 with fp16, too"
_TOO_LITTLE = "four registers spill; cards of sm_120 have too little shared memory to take it"
_AGAIN = "a number that its end needs spills, once a thread: two blocks on a multiprocessor leave 128 registers"

PROMISES = (
    Promise(
        r"normalized_qk_fwd_(warp|block)_kernel<\w+, \d, true>", 80, uses=(LOAD_128, STORE_128), avoids=(NOT_STORE_128,)
    ),
    Promise(r"normalized_qk_fwd_(warp|block)_kernel<(bf16|fp16|float), \d, false>", 64),
    Promise(r"normalized_qk_fwd_(warp|block)_kernel<double, \d, false>", 72),
    Promise(r"normalized_qk_bwd_(warp|block)_kernel<(bf16|fp16|float), .*, true>", 128, uses=(LOAD_128, STORE_128)),
    Promise(r"normalized_qk_bwd_(warp|block)_kernel<double, .*, true>", 160, uses=(LOAD_128, STORE_128)),
    Promise(r"normalized_qk_bwd_(warp|block)_kernel<.*, false>", 160),
    Promise(r"sum_shares_kernel<\w+>", 40, doubles="few sums of many terms each"),
    Promise(
        r"timestep_norm_fwd_kernel<(?!fp16, 8, true)\w+, [248], \w+>", 128, uses=(LOAD_128, STORE_128), doubles=_SCAN
    ),
    Promise(
        r"timestep_norm_fwd_kernel<fp16, 8, true>",
        128,
        uses=(LOAD_128, STORE_128),
        doubles=_SCAN,
        stack={80: "3 registers spill, once a thread; a second block on a multiprocessor is worth more"},
    ),
    Promise(r"timestep_norm_fwd_kernel<\w+, 1, false>", 128, doubles=_SCAN),
    Promise(r"timestep_norm_fwd_moments_kernel<\w+, [248], \w+>", 128, uses=(LOAD_128,), doubles=_SCAN),
    Promise(r"timestep_norm_fwd_moments_kernel<\w+, 1, false>", 128, doubles=_SCAN),
    Promise(r"timestep_norm_end_state_kernel<\w+, [248], \w+>", 128, uses=(LOAD_128,), doubles=_SCAN),
    Promise(r"timestep_norm_end_state_kernel<\w+, 1, false>", 128, doubles=_SCAN),
    Promise(r"timestep_norm_end_state_bwd_kernel<\w+, [248]>", 128, uses=(LOAD_128, STORE_128)),
    Promise(r"timestep_norm_end_state_bwd_kernel<\w+, 1>", 72),
    Promise(
        r"timestep_norm_bwd_kernel<\w+, [248]>",
        128,
        uses=(LOAD_128, STORE_128),
        nvcc_12={"stack": {100: "two registers of <fp16, 8> spill, read once a tile of steps"}},
    ),
    Promise(r"timestep_norm_bwd_kernel<\w+, 1>", 128),
    Promise(r"timestep_norm_bwd_sums_kernel<(float|bf16|fp16), [48], true>", 128, uses=(LOAD_128,), doubles=_SCAN),
    Promise(r"timestep_norm_bwd_sums_kernel<(float|bf16|fp16), [48], false>", 192, uses=(LOAD_128,), doubles=_SCAN),
    Promise(r"timestep_norm_bwd_sums_kernel<double, 2, \w+>", 224, uses=(LOAD_128,)),
    Promise(r"timestep_norm_bwd_sums_kernel<\w+, 1, \w+>", 168, doubles=_SCAN),
    Promise(r"timestep_norm_carry_kernel<.*>", 104, doubles=_SCAN),
    Promise(r"timestep_norm_(fwd|bwd)_empty_kernel<\w+>", 40),
    Promise(r"cema_local_kernel<(bf16|fp16|float)\b.*>", 168, uses=(LOAD_64, STORE_128), avoids=(STORE_64,)),
    Promise(
        r"cema_(output|sums)_kernel<(bf16|fp16|float)\b.*>",
        168,
        uses=(LOAD_64, STORE_64),
        nvcc_12={"stack": {100: _LATER, 120: _LATER}},
    ),
    Promise(r"cema_(local|output|sums)_kernel<double\b.*>", 255, uses=(LOAD_128,)),
    Promise(r"cema_ends_kernel<(bf16|fp16|float)\b.*>", 168, uses=(LOAD_64, STORE_64)),
    Promise(r"cema_ends_kernel<double\b.*>", 255, uses=(LOAD_128,)),
    Promise(
        r"cema_tiles_kernel<[12]>",
        128,
        uses=(MMA_BF16, LOAD_128, STORE_64),
        stack={120: _TOO_LITTLE},
        nvcc_12={"stack": {100: "two registers spill, read once a tile", 120: _TOO_LITTLE}},
    ),
    Promise(r"cema_mma_local_kernel<[24]>", 128, uses=(MMA_BF16, LOAD_128, STORE_64)),
    Promise(r"cema_mma_output_kernel<[24]>", 128, uses=(MMA_BF16, LOAD_128, STORE_128)),
    Promise(r"cema_finish_kernel<\w+, false>", 64, doubles="sums of parameter gradients"),
    Promise(r"cema_finish_kernel<float, true>", 80, doubles="sums of parameter gradients and polynomials in q"),
    Promise(r"cema_table_kernel<\w+>", 128, doubles="coefficients and their powers, once a mode and channel"),
    Promise(r"cema_(carry|cross|empty|step)_kernel<\w+>", 128),
    Promise(
        r"chunked_attention_fwd_mma_kernel<bf16, .*>",
        255,
        uses=(MMA_BF16, LDMATRIX, COPY_128),
        doubles=_DROPKEY,
        stack={100: _LAST_SEEN},
    ),
    Promise(
        r"chunked_attention_fwd_mma_kernel<fp16, .*>",
        255,
        uses=(MMA_FP16, LDMATRIX, COPY_128),
        doubles=_DROPKEY,
        stack={100: _LAST_SEEN},
    ),
    Promise(r"chunked_attention_fwd_fma_kernel<.*>", 255, doubles=_DROPKEY),
    Promise(
        r"chunked_attention_bwd_scores_kernel<TensorProduct<bf16, .*>>",
        224,
        uses=(MMA_BF16, LDMATRIX),
        doubles=_DROPKEY,
    ),
    Promise(
        r"chunked_attention_bwd_scores_kernel<TensorProduct<fp16, .*>>",
        224,
        uses=(MMA_FP16, LDMATRIX),
        doubles=_DROPKEY,
    ),
    Promise(r"chunked_attention_bwd_scores_kernel<PlainProduct<.*>>", 255, doubles=_DROPKEY),
    Promise(
        r"chunked_attention_bwd_products_kernel<TensorProduct<bf16, .*>>",
        168,
        uses=(MMA_BF16, LDMATRIX, COPY_128),
        stack={80: _AGAIN, 90: _AGAIN},
    ),
    Promise(
        r"chunked_attention_bwd_products_kernel<TensorProduct<fp16, .*>>",
        168,
        uses=(MMA_FP16, LDMATRIX, COPY_128),
        stack={80: _AGAIN, 90: _AGAIN},
    ),
    Promise(r"chunked_attention_bwd_products_kernel<PlainProduct<.*>>", 200, nvcc_12={"registers": 216}),
    Promise(r"chunked_attention_bwd_prepare_kernel<.*>", 64),
    Promise(r"chunked_attention_step_kernel<.*>", 128, doubles=_DROPKEY),
    Promise(r"chunked_attention_(merge|state)_kernel<.*>", 80),
    Promise(r"chunked_attention_position_kernel", 24),
)


def promises_of(compiler: str) -> list[Promise]:
    """PROMISES as they are kept by a compiler, "nvcc 13.0.88"."""
    return [replace(p, **p.nvcc_12) if compiler.startswith("nvcc 12.") else p for p in PROMISES]


def breaches(kernels: Iterable[Kernel], promises: Sequence[Promise] = PROMISES) -> list[str]:
    """What the kernels do against the rules and their promises: "kernel (sm_90): what", and promises of no kernel."""
    found, kept = [], set()
    for kernel in kernels:
        own = [promise.kernel for promise in promises if re.fullmatch(promise.kernel, kernel.name)]
        kept.update(own)
        problems = list(_against_rules(kernel))
        if len(own) != 1:
            problems.append(f"has {len(own)} entries in promises.py instead of one")
        for promise in promises:
            if promise.kernel in own:
                problems += _against_promise(kernel, promise)
        found += [f"{kernel.name} (sm_{kernel.architecture}): {problem}" for problem in problems]
    return found + [f"no kernel is called {p.kernel}" for p in promises if p.kernel not in kept]


def _against_rules(kernel: Kernel) -> Iterator[str]:
    for function in kernel.calls:
        yield f"{function} is not inlined; mark it GPU_INLINE"
    for pattern, what in RULES.items():
        yield from _uses(kernel, pattern, what)


def _against_promise(kernel: Kernel, promise: Promise) -> Iterator[str]:
    if kernel.registers > promise.registers:
        yield f"takes {kernel.registers} registers, not the promised {promise.registers}"
    if kernel.architecture not in promise.stack:
        if kernel.stack:
            yield f"{kernel.stack} bytes of stack, for spills or arrays"
        yield from _uses(kernel, LOCAL_ACCESS, "accesses to local memory")
    if not promise.doubles and not re.search(r"\bdouble\b", kernel.name):
        yield from _uses(kernel, DOUBLE_ARITHMETIC, "fp64 operations")
    for pattern in promise.uses:
        if not kernel.uses(pattern):
            yield f"no instruction {pattern}"
    for pattern in promise.avoids:
        yield from _uses(kernel, pattern, "instructions that it promises to avoid")


def _uses(kernel: Kernel, pattern: str, what: str) -> Iterator[str]:
    for opcode, count, place in kernel.uses(pattern):
        yield f"{count} {what} ({opcode})" + (f", the first at {place}" if place else "")
