"""Rules of kernel files that no compiler checks. `python lint.py [folder]` prints breaches.

Code that differs between compilers belongs in cuda/common. Code that depends on the scheduling of blocks, or hides an
access from the emulator, is banned.
"""

import functools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from emulator.source import closing

CUDA = Path(__file__).parents[3] / "cuda"

# A product of blockIdx, gridDim or, as the first factor, blockDim with another int.
NARROW_PRODUCT = (
    r"\b(?:block|grid)(?:Idx|Dim)\.[xyz]\s*\*\s*(?:k[A-Z]|\d|block|grid|thread|static_cast<int>)"
    r"|(?:\bk[A-Z]\w*|\d|Dim\.[xyz])\s*\*\s*(?:blockIdx|gridDim)\."
)
DEVICE_GLOBAL = (
    r"^\s*(?:(?:static|inline|constexpr|const)\s+)*__(?:device|managed|constant)__\s+[\w:<>, ]+[\s*]\w+\s*(?:\[|=|;)"
)
# A `static` without constexpr on its line that has `=`, `{`, or a call's parentheses before the semicolon.
STATIC_AT_RUN_TIME = r"\bstatic\b(?!.*\bconstexpr\b)[^;(){}]*(?:=|\{|\([^)]*\)\s*;)"
# Patterns allowed only in cuda/common.
ONLY_IN_COMMON = {
    r"\basm\b": "inline PTX belongs in cuda/common",
    r"__shared__": "declare shared memory with SMEM_ARRAY or SMEM_DYN",
    r"<<<": "launch with LAUNCH",
    r"__CUDACC__|__CUDA_ARCH__|GPU_EMULATED": "a kernel is the same for every compiler and architecture",
    r"\bmem(cpy|set|move)\b": "an access by memcpy is unchecked and may compile to single bytes; use gpu::ld, gpu::st",
    NARROW_PRODUCT: "a product of 32 bits overflows where there are many blocks; write int64_t{blockIdx.x}",
    r"#\s*include\s*<(?!c(?:stdint|stddef|math|float)>)": "kernels include cuda/common, their own op's headers and C headers only",
}
EVERYWHERE = {
    r"__activemask": "the set of active lanes depends on the compiler; name the mask",
    r"\batomic\w+\s*\(": "sums by atomics differ from run to run; reduce in a fixed order",
    r"__threadfence|__nanosleep|\bvolatile\b(?!\s*\()": "blocks must not wait for each other; launch another kernel",
    r"\bwhile\s*\([^;]*\)\s*;": "spin wait; launch another kernel",
    DEVICE_GLOBAL: "device globals are one per module; pass a pointer",
    r"\]\s*(?:\([^)]*\)\s*)?(?:mutable\s*)?__(?:host|device)__": "device lambdas need an extension; use a struct",
    r"cooperative_groups|\bcub\b|\bthrust\b": "no cooperative groups, CUB or Thrust in kernels",
    STATIC_AT_RUN_TIME: "a static initialised at run time does not link in the emulator",
}
# A cast of a 64-bit product of tensor sizes loses its upper half. Exceptions: elements of one token or head.
SMALL_PRODUCTS = ("p.heads * width",)
MAX_LINES = 400


def lint(folder: Path = CUDA) -> list[str]:
    """Return "file:line: reason" for each breach in the .cu and .cuh files under `folder`."""
    return [problem for file in sorted(folder.rglob("*.cu*")) for problem in _lint_file(file, folder)]


def _lint_file(file: Path, folder: Path) -> Iterator[str]:
    common = file.parent.name == "common"
    rules = EVERYWHERE if common else ONLY_IN_COMMON | EVERYWHERE
    lines = _without_comments(file.read_text()).split("\n")
    if len(lines) > MAX_LINES + 1:  # the last one is empty
        yield f"{file.name}:{len(lines)}: more than {MAX_LINES} lines"
    for number, stream in _streams("\n".join(lines)):
        if not common and stream != "stream":
            yield f"{file.name}:{number}: a launch on {stream or 'no stream'}; launch on the argument `stream`"
    for number, product in _narrowed_products("\n".join(lines)):
        yield f"{file.name}:{number}: a cast to 32 bits of a product, {product}; keep it in 64"
    for number, line in enumerate(lines, start=1):
        for pattern, reason in rules.items():
            if re.search(pattern, line):
                yield f"{file.name}:{number}: {reason}"
        included = re.search(r'#\s*include\s*"([^"]+)"', line)
        if included and not common and not _may_include(file, included[1], folder):
            yield f"{file.name}:{number}: {included[1]} belongs to another op"


def _streams(text: str) -> Iterator[tuple[int, str]]:
    """The line of each LAUNCH and its stream, the fifth argument."""
    for launch in re.finditer(r"\bLAUNCH\(", text):
        depth = 1
        arguments = [""]
        for character in text[launch.end() :]:
            depth += (character in "([{") - (character in ")]}")
            if depth == 0:
                break
            if character == "," and depth == 1:
                arguments.append("")
            else:
                arguments[-1] += character
        yield text.count("\n", 0, launch.start()) + 1, arguments[4].strip() if len(arguments) > 4 else ""


def _narrowed_products(text: str) -> Iterator[tuple[int, str]]:
    """Line and argument of each cast of a product to int or unsigned, except in grid sizes of launchers."""
    for cast in re.finditer(r"static_cast<(?:int|unsigned|int32_t)>\(", text):
        inside = " ".join(text[cast.end() : closing(text, cast.end() - 1)].split())
        in_launch = re.search(r"\b(LAUNCH\(|dim3\b|blocks? =|threads =)[^;]*$", text[: cast.start()])
        if re.search(r"[\w)\]] \* [\w(]", inside) and inside not in SMALL_PRODUCTS and not in_launch:
            yield text.count("\n", 0, cast.start()) + 1, inside


def _may_include(file: Path, header: str, folder: Path) -> bool:
    """Return True for headers of cuda/common and of the file's own op: cema_fwd.cu may include cema_scan.cuh."""
    return (folder / "common" / header).exists() or op_of(Path(header).stem) in (None, op_of(file.stem))


@functools.cache
def ops() -> list[str]:
    """Ops with CUDA kernels, longest names first."""
    headers = (CUDA.parent / "cpp").glob("*/*.h")
    return sorted((h.stem for h in headers if "MEGALODON_CUDA_KERNEL(" in h.read_text()), key=len, reverse=True)


def op_of(stem: str) -> str | None:
    """The op of a kernel file with this stem, or None if several ops share it."""
    return next((op for op in ops() if stem == op or stem.startswith(op + "_")), None)


def _without_comments(text: str) -> str:
    """The text without comments and contents of strings, line for line. Paths of includes stay."""

    def blank(match: re.Match[str]) -> str:
        token = match[0]
        if not token.startswith('"'):
            return "\n" * token.count("\n")
        return token if "/" not in token and token.endswith(('.h"', '.cuh"')) else '""'

    return re.sub(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|/\*.*?\*/', blank, text, flags=re.DOTALL)


if __name__ == "__main__":
    problems = lint(Path(sys.argv[1])) if len(sys.argv) > 1 else lint()
    print(*problems, sep="\n")
    sys.exit(bool(problems))
