"""Largest elements that the tests reach at each access to global memory.

    export MEGALODON_OPS_REACHED=FOLDER                      each test process adds a file
    python tests/cuda/emulator/magnitude.py FOLDER           write magnitude.tsv, after the default and the slow tests
    python tests/cuda/emulator/magnitude.py --check FOLDER   fail if the tests reach less

An offset that is computed in 32 bits is right in every small tensor. Each line of a kernel that accesses a tensor must
reach an element beyond 2^31 of one in some test (sparse tensors, test_cuda_large_tensors.py), or have a reason. A row of
magnitude.tsv is such a line: kernel, file, the line's text, names of its buffers, the largest element and, if it is less
than 2^31, the reason. Lines that access only small tensors, by `SMALL`, need none.

Such a test finds a 32-bit offset between 2^31 and 2^32 elements, where it is negative and so out of bounds. Beyond, it may
be small again: only a comparison of values finds it.

Elements count from the start of their buffer. Where a pointer already begins beyond 2^31, a line counts as reached whatever
index it adds. Rules of the source check that index: no part of it is a number that was cut to 32 bits, a product of 32-bit
sizes, or a multiple or loop's sum of one (widened.py); nothing is converted silently (-Werror=conversion).
"""

import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

sys.path[:0] = map(str, (Path(__file__).parents[1], Path(__file__).parents[3]))
from emulator.reached import CUDA, run_command
from bench.sass import demangle

TABLE = Path(__file__).parent / "magnitude.tsv"
HEADER = "kernel\tfile\tline\tbuffers\tmost\twhy it stays below 2^31"
SMALL = {
    "parameters": set("p q gamma omega weight bias beta dp dq dgamma domega dweight dbias dbeta".split()),
    "one or two numbers per sequence": {"spans", "position", "count", "position_out", "count_out"},
    "one number": {"dropkey_seed"},
}
"""Buffers of less than 2^31 elements, by reason. `Magnitude.lacks` excepts q and dq of attention, which hold tokens."""


class Access(NamedTuple):
    kernel: str
    file: str
    line: str  # without spaces at its ends


class Magnitude:
    def __init__(self, buffers: str = "", most: int = 0, why: str = "") -> None:
        self.buffers = set(buffers.split())
        self.most = int(most)
        self.why = why

    def lacks(self, kernel: str) -> bool:
        """Return True if the line accesses a tensor that may have more than 2^31 elements, and none beyond is reached."""
        small = set().union(*SMALL.values())
        if kernel.startswith("chunked_attention") or kernel.startswith("normalized_qk"):
            small -= {"q", "dq"}
        return self.most < 2**31 and not self.buffers <= small


def source_of(frames: str) -> tuple[str, int] | None:
    """File and line of an access: the innermost frame in a kernel's own room, or else in cuda/common."""
    places = [(file, int(number)) for file, number in re.findall(r"([\w.]+):(\d+)", frames)]
    common = [place for place in places if (CUDA / "common" / place[0]).exists()]
    own = [place for place in places if place not in common and list(CUDA.glob(f"*/{place[0]}"))]
    return next(iter(own + common), None)


def merge(folder: Path) -> dict[Access, Magnitude]:
    """Merge the records of all processes."""
    rows = [row for path in sorted(folder.glob("*.accesses")) for row in json.loads(path.read_text())]
    mangled = sorted({kernel for kernel, *_ in rows})
    kernels = dict(zip(mangled, demangle(mangled), strict=True))
    texts = {path.name: path.read_text().splitlines() for path in CUDA.rglob("*.cu*")}
    sources = {frames: source_of(frames) for _, frames, _, _ in rows}
    found: dict[Access, Magnitude] = defaultdict(Magnitude)
    for kernel, frames, buffers, most in rows:
        if "planted" not in kernel and (source := sources[frames]):
            file, number = source
            name, _, _ = kernels[kernel].partition("<")
            magnitude = found[Access(name, file, line=texts[file][number - 1].strip())]
            magnitude.buffers |= set(buffers.split())
            magnitude.most = max(magnitude.most, most)
    return found


def read_table(text: str) -> dict[Access, Magnitude]:
    rows = (line.split("\t") for line in text.partition(HEADER + "\n")[2].splitlines())
    return {Access(*row[:3]): Magnitude(*row[3:]) for row in rows}


def gaps(found: dict[Access, Magnitude], table: dict[Access, Magnitude]) -> Iterator[str]:
    """Describe accesses that reach no element beyond 2^31, for which the table gives no reason."""
    for access, magnitude in sorted(found.items()):
        row = table.get(access, Magnitude())
        if magnitude.lacks(access.kernel) and not row.why:
            buffers = ", ".join(sorted(magnitude.buffers)) or "a workspace"
            yield f"{access.kernel}: {access.file} `{access.line}` ({buffers}): no test passes element {magnitude.most:,}"


def write_table(found: dict[Access, Magnitude]) -> None:
    known = read_table(TABLE.read_text()) if TABLE.exists() else {}
    lacking = [access for access, magnitude in found.items() if magnitude.lacks(access.kernel)]
    far = sum(magnitude.most >= 2**31 for magnitude in found.values())
    lines = [
        f"# {len(found)} lines of kernels that access global memory: {far} pass 2^31 elements, {len(lacking)} have a reason.",
        HEADER,
    ]
    for access, magnitude in sorted(found.items()):
        why = known[access].why if access in lacking and access in known else ""
        lines.append("\t".join((*access, " ".join(sorted(magnitude.buffers)), str(magnitude.most), why)))
    TABLE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    run_command(sys.modules[__name__], "accesses")
