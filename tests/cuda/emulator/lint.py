"""Rules of kernel files that no compiler checks. `python lint.py [folder]` prints what breaks them.

Everything the two compilers see differently stays in cuda/common; everything that depends on how blocks are scheduled,
or that hides an access from the emulator, is banned.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

CUDA = Path(__file__).parents[3] / "cuda"

# A product of a block's number or the grid's size with another int.
NARROW_PRODUCT = (
    r"\b(?:block|grid)(?:Idx|Dim)\.[xyz]\s*\*\s*(?:k[A-Z]|\d|block|grid|thread|static_cast<int>)"
    r"|(?:\bk[A-Z]\w*|\d|Dim\.[xyz])\s*\*\s*(?:blockIdx|gridDim)\."
)
# What kernel files may not contain; cuda/common may.
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
    r"^\s*(?:(?:static|inline|constexpr|const)\s+)*__(?:device|managed|constant)__\s+[\w:<>, ]+[\s*]\w+\s*(?:\[|=|;)":
        "device globals are one per module; pass a pointer",
    r"\]\s*(?:\([^)]*\)\s*)?(?:mutable\s*)?__(?:host|device)__": "device lambdas need an extension; use a struct",
    r"cooperative_groups|\bcub\b|\bthrust\b": "no cooperative groups, CUB or Thrust in kernels",
    r"\bstatic\b(?!.*\bconstexpr\b)[^;(){}]*(?:=|\{|\([^)]*\)\s*;)":
        "a static initialised at run time does not link in the emulator",
}  # fmt: skip
# Sizes of tensors and their products are 64-bit: a product that is cast to 32 bits loses its upper half. The products
# below stay small: they count the elements of one token, or of one head.
SMALL_PRODUCTS = ("p.heads * width",)
MOST_LINES = 400


def lint(folder: Path = CUDA) -> list[str]:
    """Returns "file:line: reason" for each breach in the .cu and .cuh files of `folder` and the folders in it."""
    return [problem for file in sorted(folder.rglob("*.cu*")) for problem in _lint_file(file, folder)]


def _lint_file(file: Path, folder: Path) -> Iterator[str]:
    common = file.parent.name == "common"
    rules = EVERYWHERE if common else ONLY_IN_COMMON | EVERYWHERE
    lines = _without_comments(file.read_text()).split("\n")
    if len(lines) > MOST_LINES + 1:
        yield f"{file.name}:{len(lines)}: more than {MOST_LINES} lines"
    for number, stream in _streams("\n".join(lines)):
        if not common and stream != "stream":
            yield f"{file.name}:{number}: a launch on {stream or 'no stream'}; it is given `stream`"
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
    """The line of each LAUNCH and its fifth argument."""
    for launch in re.finditer(r"\bLAUNCH\(", text):
        depth, arguments = 1, [""]
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
    """The line and the argument of each cast to int or unsigned, outside of launchers' grids, that multiplies."""
    for cast in re.finditer(r"static_cast<(?:int|unsigned|int32_t)>\(", text):
        depth, end = 1, cast.end()
        while depth:
            depth += (text[end] in "([{") - (text[end] in ")]}")
            end += 1
        inside = " ".join(text[cast.end() : end - 1].split())
        in_launch = re.search(r"\b(LAUNCH\(|dim3\b|blocks? =|threads =)[^;]*$", text[: cast.start()])
        if re.search(r"[\w)\]] \* [\w(]", inside) and inside not in SMALL_PRODUCTS and not in_launch:
            yield text.count("\n", 0, cast.start()) + 1, inside


def _may_include(file: Path, header: str, folder: Path) -> bool:
    """A file includes cuda/common and the headers of its own op: cema_fwd.cu cema.h, cema.cuh and cema_scan.cuh."""
    return (folder / "common" / header).exists() or op_of(Path(header).stem) in (None, op_of(file.stem))


@functools.cache
def ops() -> list[str]:
    """The ops that have CUDA kernels, the longest name first."""
    headers = (CUDA.parent / "cpp").glob("*/*.h")
    return sorted((h.stem for h in headers if "MEGALODON_CUDA_KERNEL(" in h.read_text()), key=len, reverse=True)


def op_of(stem: str) -> str | None:
    """The op whose file has this name without its extension, None if several ops share it."""
    return next((op for op in ops() if stem == op or stem.startswith(op + "_")), None)


def _without_comments(text: str) -> str:
    """The text with comments and the insides of strings removed, line for line. Paths of includes stay."""

    def blank(match: re.Match[str]) -> str:
        token = match[0]
        return token if token.startswith('"') and "/" not in token and token.endswith(('.h"', '.cuh"')) else (
            '""' if token.startswith('"') else "\n" * token.count("\n")
        )  # fmt: skip

    return re.sub(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|/\*.*?\*/', blank, text, flags=re.DOTALL)


if __name__ == "__main__":
    problems = lint(Path(sys.argv[1])) if len(sys.argv) > 1 else lint()
    print(*problems, sep="\n")
    sys.exit(bool(problems))
