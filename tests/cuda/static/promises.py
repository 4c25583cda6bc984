"""Promises of each kernel about its machine code, and rules for all kernels.

Each kernel of cuda/ matches exactly one entry of PROMISES.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from bench.sass import Kernel

# Accesses of 16, 8 and fewer bytes; products on tensor cores and their loads.
LOAD_128 = r"LDG\.(\w+\.)*128\b"
STORE_128 = r"STG\.(\w+\.)*128\b"
COPY_128 = r"LDGSTS\.(\w+\.)*128\b"
LOAD_64 = r"LDG\.(\w+\.)*64\b"
STORE_64 = r"STG\.(\w+\.)*64\b"
NOT_STORE_128 = r"STG\.(?!(\w+\.)*128\b)"
MMA_BF16 = r"HMMA\.16816\.F32\.BF16"
MMA_FP16 = r"HMMA\.16816\.F32$"
MMA_TF32 = r"HMMA\.1688\.F32\.TF32"
LDMATRIX = r"LDSM\."

DOUBLE_ARITHMETIC = r"D(ADD|MUL|FMA|SETP|MNMX|MMA)\b|MUFU\.R(CP|SQ)64H"  # conversions are allowed, as `eps` is a double
LOCAL_ACCESS = r"(LD|ST)L\b"
RULES = {
    r"(LD|ST)G?\.(\w+\.)*[US]8\b": "global accesses of single bytes",
    r"(ATOM|ATOMG|ATOMS|RED|REDG)\b": "atomic operations",
}


@dataclass(frozen=True)
class Promise:
    kernel: str  # regular expression for the whole name, as `sass.py` prints it
    registers: int  # at most, on every architecture
    uses: tuple[str, ...] = ()  # regular expressions for beginnings of opcodes, each of which occurs
    avoids: tuple[str, ...] = ()  # regular expressions for opcodes that do not occur
    doubles: str = ""  # reason for fp64 arithmetic in a kernel of narrower types
    stack: dict[int, str] = field(default_factory=dict)  # reason for spills or local arrays, by architecture
    nvcc_12: dict[str, Any] = field(default_factory=dict)  # fields that differ with CUDA 12


_SCAN = "the scan over time: two values for each group of channels and warp of rows"
_DROPKEY = "the threshold of DropKey, one product per thread"
_LAST_COLUMN = "four registers spill with 64 columns and 48 keys, because of the last visible column of a row"
_FLOAT_SPILLS = "2 to 4 registers spill with float, on 120 also with fp16; read outside of loops over groups of tokens"
_UNUSED_ON_120 = "four registers spill; sm_120 has too little shared memory to use this kernel"
_ONE_SPILL = "one value for the end spills, once per thread: two blocks per multiprocessor leave 128 registers"
_SPILLS_OF_FACTORS = "seven or eight registers spill between the loops, once per thread, for the factors of tiles"

PROMISES = (
    Promise(
        r"normalized_qk_fwd_(warp|block)_kernel<\w+, \d, true>", 80, uses=(LOAD_128, STORE_128), avoids=(NOT_STORE_128,)
    ),
    Promise(r"normalized_qk_fwd_(warp|block)_kernel<(bf16|fp16|float), \d, false>", 64),
    Promise(r"normalized_qk_fwd_(warp|block)_kernel<double, \d, false>", 72),
    Promise(r"normalized_qk_bwd_(warp|block)_kernel<(bf16|fp16|float), .*, true>", 128, uses=(LOAD_128, STORE_128)),
    Promise(r"normalized_qk_bwd_(warp|block)_kernel<double, .*, true>", 160, uses=(LOAD_128, STORE_128)),
    Promise(r"normalized_qk_bwd_(warp|block)_kernel<.*, false>", 160),
    Promise(
        r"layer_norm_fwd_kernel<(bf16|fp16|float), \d, true>", 64, uses=(LOAD_128, STORE_128), avoids=(NOT_STORE_128,)
    ),
    Promise(r"layer_norm_fwd_kernel<double, \d, true>", 80, uses=(LOAD_128, STORE_128), avoids=(NOT_STORE_128,)),
    Promise(r"layer_norm_fwd_kernel<(bf16|fp16|float), 1, false>", 64),
    Promise(r"layer_norm_fwd_kernel<double, 1, false>", 80),
    Promise(r"layer_norm_bwd_kernel<(bf16|fp16|float), \d, true>", 96, uses=(LOAD_128, STORE_128)),
    Promise(r"layer_norm_bwd_kernel<double, \d, true>", 128, uses=(LOAD_128, STORE_128)),
    Promise(r"layer_norm_bwd_kernel<.*, false>", 96),
    Promise(r"linear_few_rows_kernel<\w+, [248], 1>", 104, uses=(LOAD_128,)),
    Promise(r"linear_few_rows_kernel<\w+, [248], 8>", 128, uses=(LOAD_128,)),
    Promise(r"linear_few_rows_kernel<\w+, 1, \d>", 128),
    Promise(r"sum_shares_kernel<\w+>", 40, doubles="few sums of many terms"),
    Promise(
        r"timestep_norm_fwd_kernel<(?!fp16, 8, true)\w+, [248], \w+>", 128, uses=(LOAD_128, STORE_128), doubles=_SCAN
    ),
    Promise(
        r"timestep_norm_fwd_kernel<fp16, 8, true>",
        128,
        uses=(LOAD_128, STORE_128),
        doubles=_SCAN,
        stack={80: "3 registers spill, once per thread; a second block per multiprocessor is worth more"},
    ),
    Promise(r"timestep_norm_(fwd_moments|end_state)_kernel<\w+, [248], \w+>", 128, uses=(LOAD_128,), doubles=_SCAN),
    Promise(r"timestep_norm_(fwd|fwd_moments|end_state)_kernel<\w+, 1, false>", 128, doubles=_SCAN),
    Promise(r"timestep_norm_end_state_bwd_kernel<\w+, [248]>", 128, uses=(LOAD_128, STORE_128)),
    Promise(r"timestep_norm_end_state_bwd_kernel<\w+, 1>", 72),
    Promise(
        r"timestep_norm_bwd_kernel<\w+, [248]>",
        128,
        uses=(LOAD_128, STORE_128),
        nvcc_12={"stack": {100: "two registers of <fp16, 8> spill, read once per tile"}},
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
        nvcc_12={"stack": {100: _FLOAT_SPILLS, 120: _FLOAT_SPILLS}},
    ),
    Promise(r"cema_(local|output|sums)_kernel<double\b.*>", 255, uses=(LOAD_128,)),
    Promise(r"cema_ends_kernel<(bf16|fp16|float)\b.*>", 168, uses=(LOAD_64, STORE_64)),
    Promise(r"cema_ends_kernel<double\b.*>", 255, uses=(LOAD_128,)),
    Promise(
        r"cema_tiles_kernel<[12]>",
        128,
        uses=(MMA_BF16, LOAD_128, STORE_64),
        stack={120: _UNUSED_ON_120},
        nvcc_12={"stack": {100: "two registers spill, read once per tile", 120: _UNUSED_ON_120}},
    ),
    Promise(r"cema_mma_local_kernel<[24]>", 128, uses=(MMA_BF16, LOAD_128, STORE_64)),
    Promise(r"cema_mma_output_kernel<[24]>", 128, uses=(MMA_BF16, LOAD_128, STORE_128)),
    Promise(r"cema_finish_kernel<\w+, false>", 64, doubles="sums of parameter gradients"),
    Promise(r"cema_finish_kernel<float, true>", 80, doubles="sums of parameter gradients and polynomials in q"),
    Promise(r"cema_table_kernel<\w+>", 128, doubles="coefficients and their powers, once per mode and channel"),
    Promise(r"cema_(carry|cross|empty|step)_kernel<\w+>", 128),
    Promise(
        r"chunked_attention_fwd_mma_kernel<bf16, .*>",
        255,
        uses=(MMA_BF16, LDMATRIX, COPY_128),
        doubles=_DROPKEY,
        stack={100: _LAST_COLUMN},
    ),
    Promise(
        r"chunked_attention_fwd_mma_kernel<fp16, .*>",
        255,
        uses=(MMA_FP16, LDMATRIX, COPY_128),
        doubles=_DROPKEY,
        stack={100: _LAST_COLUMN},
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
        stack={80: _ONE_SPILL, 90: _ONE_SPILL},
    ),
    Promise(
        r"chunked_attention_bwd_products_kernel<TensorProduct<fp16, .*>>",
        176,
        uses=(MMA_FP16, LDMATRIX, COPY_128),
        stack={80: _SPILLS_OF_FACTORS, 90: _SPILLS_OF_FACTORS},
    ),
    Promise(r"chunked_attention_bwd_products_kernel<PlainProduct<.*>>", 200, nvcc_12={"registers": 216}),
    Promise(r"chunked_attention_bwd_prepare_kernel<.*>", 64),
    Promise(r"chunked_attention_step_kernel<.*>", 128, doubles=_DROPKEY),
    Promise(r"chunked_attention_(merge|state)_kernel<.*>", 80),
    Promise(r"chunked_attention_position_kernel", 26),
)


def promises_of(compiler: str) -> list[Promise]:
    """PROMISES for a compiler such as "nvcc 13.0.88"."""
    return [replace(p, **p.nvcc_12) if compiler.startswith("nvcc 12.") else p for p in PROMISES]


def breaches(kernels: Iterable[Kernel], promises: Sequence[Promise] = PROMISES) -> list[str]:
    """Breaches of rules and promises, "kernel (sm_90): problem", and promises that match no kernel."""
    found, kept = [], set()
    for kernel in kernels:
        own = [promise for promise in promises if re.fullmatch(promise.kernel, kernel.name)]
        kept.update(promise.kernel for promise in own)
        problems = list(_against_rules(kernel))
        if len(own) != 1:
            problems.append(f"has {len(own)} entries in promises.py instead of one")
        for promise in own:
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
