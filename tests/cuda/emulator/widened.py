"""Products of two 32-bit sizes that become 64-bit numbers or addresses: they overflow in tensors that no test can hold.

The rule needs types, so it reads the compiler's own form of the emulator's kernels: the build writes it (-fdump-tree-ssa)
beside each object. There, `static_cast<int>(a * b)` and `a * b` of two ints are the same, a constant factor is a number,
and `pointer + product` converts the product.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

SHARED = "an index of shared memory"
EXCEPTIONS = {
    "return data_ + row * pitch_ + u / 8 * kBlock + (u % 8 ^ r % 8) * kUnit;": SHARED,
    "return data[i / kPart * plane(vectors) + vector * kPart + i % kPart];": SHARED,
    "scores[at] = drop && drop.dropped(row, origin + at) ? -kInfinity<R> : sum[i] * scale;": SHARED,
    "const R weight = key + i * turns < keys ? scores[key + i * turns] : 0;": SHARED,
    "const int64_t channel = int64_t{thread / split} * 2;": "a tile has fewer than 2^32 threads",
}
NARROW = {"int", "unsigned int", "int32_t", "uint32_t"}
DECLARED = re.compile(r"(?:const )?(\w[\w ]*?) (?:const )?([\w.]+)$")
ASSIGNED = re.compile(r"^  (?:\[(\S+):(\d+):\d+\] )?([\w.]+(?:\(D\))?) = ([^;]*);", re.MULTILINE)
PRODUCT = re.compile(r"[a-zA-Z_][\w.]*(?:\(D\))? (?:\*|<<) [a-zA-Z_]")
SUM = re.compile(r"[\w.()]+(?: [+/-] [\w.()]+)?$|\((?:unsigned )?int\) [\w.()]+$")
CUT = re.compile(r"\((?:unsigned )?int\) (\S+)$")
WIDENED = re.compile(r"\((?:long int|long unsigned int|u?int64_t|size_t|s?sizetype)\) (\S+)$")


def widened_products(build: Path, kernels: Path) -> dict[tuple[str, int], str]:
    """Lines of the kernel files, of those that the build of the emulator has compiled: {(file, number): text}."""
    texts = {path.name: path.read_text().splitlines() for path in kernels.rglob("*.cu*")}
    forms = [path for path in build.rglob("emulated_kernels/*.ssa") if path.name.partition(".")[0] + ".cu" in texts]
    places = {place for form in forms for place in _places(form.read_text())}
    return {(file, line): texts[file][line - 1].strip() for file, line in sorted(places) if file in texts}


def base(name: str) -> str:
    """A variable's name without the number of its version; a temporary has no other name."""
    return re.sub(r"(?<=.)_\d+(?:\(D\))?$", "", name)


def _places(text: str) -> Iterator[tuple[str, int]]:
    """File and line of each conversion to 64 bits of a product, or of a sum of products, by function."""
    for function in text.split("\n;; Function ")[1:]:
        head, _, body = function.partition("\n{\n")
        declarations = [
            *head.rpartition("\n")[2].strip(")").split(", "),
            *re.findall(r"^  (\w.*);$", body, re.MULTILINE),
        ]
        matches = (DECLARED.search(declaration) for declaration in declarations)
        narrow = {match[2] for match in matches if match and match[1] in NARROW}
        cut, products = set(), set()  # 64-bit values cut to 32 bits, products of 32 bits
        for file, line, to, source in ASSIGNED.findall(body):
            source = re.sub(r"\[\S+:\d+:\d+\] ", "", source)
            if base(to) in narrow:
                operands = set(re.findall(r"[a-zA-Z_][\w.]*(?:\(D\))?", source))
                if (match := CUT.match(source)) and base(match[1]) not in narrow:
                    cut.add(to)
                elif (
                    PRODUCT.match(source)
                    or (" * " in source and operands & (cut | products))
                    or (SUM.match(source) and operands & products)
                ):
                    products.add(to)
            elif (match := WIDENED.match(source)) and match[1] in products:
                yield Path(file).name, int(line)
