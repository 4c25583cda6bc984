"""How often each loop of the kernels turned in the tests, and over how many blocks each kernel was launched.

    export MEGALODON_OPS_REACHED=FOLDER       tests add to it what they reach: the default ones and the slow ones
    python tests/cuda/emulator/reached.py FOLDER           writes reached.tsv
    python tests/cuda/emulator/reached.py --check FOLDER   fails where the tests reached less

What a constant bounds is right for one unit and wrong for three, or the reverse: each loop whose bound is not a constant
is to turn at most once, twice, and three times or more, in kernels of 16-bit types and in those of wider types, and each
grid is to have one, two, and three blocks or more. A row of reached.tsv is a loop in a kernel, or a dimension of its
launches ("warps": of a block): for each type ("16", "wide", or none) the numbers of turns that there were, 3 for more as
well, and the most of all. A row that lacks some is a hole, and says at its end why it may stay. Launches whose results
nobody looks at (`only_bounds`) do not count.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

sys.path[:0] = map(str, (Path(__file__).parents[1], Path(__file__).parents[3]))
from emulator.source import loop_heads, without_comments
from bench.sass import demangle

CUDA = Path(__file__).parents[3] / "cuda"
TABLE = Path(__file__).parent / "reached.tsv"
HEADER = "kernel\tfile\tloop\tnumber\tturns\tmost\twhy it may lack some"
LAUNCHER = "(launcher)"
KINDS = {"16": r"\b(bf16|fp16)\b", "wide": r"\b(float|double)\b"}  # of types, by a kernel's template arguments
# Names in a loop's start and condition, besides its file's own constants, whose values are known to nvcc or say which
# of the block's threads turns it.
CONSTANTS = r"int|int64_t|k[A-Z]\w*|gpu|Tiling|Product|thread|threadIdx"


class Loop(NamedTuple):
    """A `for` or `while` that nvcc does not unroll: text[start:end] is its head."""

    start: int
    end: int
    head: str  # with single spaces
    is_constant: bool  # whether all of it is known when it is compiled


def loops_of(text: str) -> list[Loop]:
    code, found = without_comments(text), []
    parameters = " ".join(re.findall(r"template <([^;{]*?)>\s", code))
    constants = {*re.findall(r"\bconstexpr \w+ (\w+)", code), *re.findall(r"\bint (\w+)", parameters)}
    for start, end in loop_heads(code):
        first, *rest = code[start : end - 1].split(";")
        names = set(re.findall(r"(?<![.\w])[A-Za-z_]\w*", "".join([first, *rest[:1]]).partition("(")[2]))
        names -= {*re.findall(r"(\w+) = ", first), *constants}
        is_constant = all(re.fullmatch(CONSTANTS, name) for name in names) or " : " in first
        found.append(Loop(start, end, " ".join(text[start:end].split()), is_constant))
    return found


def counted(path: Path, text: str) -> str:
    """A kernel file's text, counting the turns of its loops, line for line."""
    pieces, at = [f'#line 1 "{path}"\n'], 0
    for nth, loop in enumerate(loops_of(text)):
        pieces += [text[at : loop.start], f'EMU_LOOP("{path.name}", {nth}) {text[loop.start : loop.end]} EMU_TURN']
        at = loop.end
    return "".join([*pieces, text[at:]])


def write_record(module: ModuleType) -> None:
    """Adds what the process has reached to the folder that MEGALODON_OPS_REACHED names."""
    folder = os.environ.get("MEGALODON_OPS_REACHED")
    if folder:
        symbols = subprocess.run(["nm", module.__file__], capture_output=True, text=True, check=True).stdout
        names = {int(at, 16): name for at, name in re.findall(r"^([0-9a-f]+) \w (\w+)$", symbols, re.MULTILINE)}
        rows = [(names[kernel] if kernel else "", *rest) for kernel, *rest in module.reached()]
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / f"{os.getpid()}-{time.time_ns()}.json").write_text(json.dumps(rows))


class Place(NamedTuple):
    """A loop in a kernel: of those of a file that read alike, the `nth`. Or a dimension: of no file."""

    kernel: str
    file: str
    loop: str
    nth: int


class Reached:
    """The numbers of turns in a place, by type of the kernel; 3 stands for more."""

    def __init__(self, turns: str = "", most: int = 0, why: str = "") -> None:
        cells = (cell.split(":") for cell in turns.split())
        self.turns = defaultdict(set, {kind: set(map(int, numbers)) for kind, numbers in cells})
        self.most, self.why = most, why

    def __str__(self) -> str:
        return " ".join(f"{kind}:{''.join(map(str, sorted(numbers)))}" for kind, numbers in sorted(self.turns.items()))

    def lacks(self, kinds: Iterable[str] = ()) -> set[tuple[str, int]]:
        """What is missing of one (or none), two and three turns, by type: each that is here, and `kinds`."""
        wanted = ((kind, unit) for kind in {*self.turns, *kinds} or {""} for unit in (1, 2, 3))
        return {(kind, unit) for kind, unit in wanted if not {unit, unit - (unit == 1)} & self.turns.get(kind, set())}


def places() -> dict[str, tuple[str, str, int]]:
    """Each loop that is no constant, by what the emulator calls it: file, head, and which of those that read alike."""
    found = {}
    for path in sorted(CUDA.rglob("*.cu*")):
        loops = loops_of(path.read_text())
        for i, loop in enumerate(loops):
            if not loop.is_constant:
                alike = sum(other.head == loop.head for other in loops[: i + 1])
                found[f"{path.name} {i}"] = path.name, loop.head, alike
    return found


def merge(folder: Path) -> dict[Place, Reached]:
    """What all processes have reached."""
    rows = [row for path in sorted(folder.glob("*.json")) for row in json.loads(path.read_text())]
    mangled = sorted({kernel for kernel, *_ in rows if kernel})
    kernels, loops = dict(zip(mangled, demangle(mangled), strict=True)), places()
    found: dict[Place, Reached] = defaultdict(Reached)
    varies = {kernel for kernel, what, turns, _ in rows if what == "warps" and turns & 16}
    for mangled_name, what, turns, most in rows:
        kernel, _, arguments = kernels.get(mangled_name, LAUNCHER).partition("<")
        is_loop = " " in what
        if "planted" in mangled_name or is_loop and what not in loops:
            continue
        if what in ("grid.y", "grid.z") and most == 1 or what == "warps" and mangled_name not in varies:
            continue
        kind = next((kind for kind, types in KINDS.items() if re.search(types, arguments)), "") if is_loop else ""
        place = Place(kernel, *(loops[what] if is_loop else ("", what, 1)))
        reached = found[place]
        reached.turns[kind] |= {unit for unit in range(4) if turns >> unit & 1}
        reached.most = max(reached.most, most)
    return found


def read_table(text: str) -> dict[Place, Reached]:
    rows = (line.split("\t") for line in text.partition(HEADER + "\n")[2].splitlines())
    return {Place(kernel, file, loop, int(nth)): Reached(*rest) for kernel, file, loop, nth, *rest in rows}


def holes(found: dict[Place, Reached], table: dict[Place, Reached]) -> Iterator[str]:
    """Where the tests reached less than they are to, and less than a row of the table with a reason says."""
    for place in sorted(found.keys() | table.keys()):
        row, reached = table.get(place, Reached()), found.get(place, Reached())
        missing = reached.lacks(row.turns) - (row.lacks() if row.why else set())
        if missing:
            wanted = ", ".join(f"{unit} of {kind}" if kind else str(unit) for kind, unit in sorted(missing))
            where = f"{place.kernel}: {place.file} `{place.loop}` ({place.nth})"
            yield f"{where}: turns {str(reached) or 'none'}; no test reaches {wanted}"


def write_table(found: dict[Place, Reached]) -> None:
    known = read_table(TABLE.read_text()) if TABLE.exists() else {}
    for place, reached in found.items():
        reached.why = known[place].why if place in known and reached.lacks() else ""
    lacking = [reached for reached in found.values() if reached.lacks()]
    lines = [
        f"# {len(found)} loops and dimensions of kernels: {len(found) - len(lacking)} complete, {len(lacking)} lack some.",
        HEADER,
        *("\t".join(map(str, (*place, row, row.most, row.why))) for place, row in sorted(found.items())),
    ]
    TABLE.write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    found = merge(arguments.folder)
    if not arguments.check:
        write_table(found)
    problems = list(holes(found, read_table(TABLE.read_text())))
    print(*problems, f"{TABLE.name}: {len(found)} places, {len(problems)} holes without a reason", sep="\n")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
