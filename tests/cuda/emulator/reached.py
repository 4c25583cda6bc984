"""Iterations of each kernel loop, and blocks of each kernel, that the tests reach.

    export MEGALODON_OPS_REACHED=FOLDER                    each test process adds a file
    python tests/cuda/emulator/reached.py FOLDER           write reached.tsv, after the default and the slow tests
    python tests/cuda/emulator/reached.py --check FOLDER   fail if the tests reach less

A loop that is right for one unit may be wrong for three. Tests must run each loop with a variable bound for at most
one, two, and three or more iterations, in kernels of 16-bit types and of wider types, and each grid with one, two, and
three or more blocks. A row of reached.tsv is a loop of a kernel, or a dimension of its launches ("warps": of a block).
It has the numbers of iterations by type ("16", "wide" or none), where 3 stands for more, the largest number and, if
there is a gap, a reason. Launches with unchecked results (`only_bounds`) do not count.
"""

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
FEWER_WARPS = 16  # the bit of `turns` that turns.cpp calls kNotAll
ENOUGH = {1: {0, 1}, 2: {2}, 3: {3}}  # numbers of iterations that stand for one, two, three or more
KINDS = {"16": r"\b(bf16|fp16)\b", "wide": r"\b(float|double)\b"}  # of types, by a kernel's template arguments
# Names in the start and condition of a loop that nvcc knows, or of a thread's index, besides the file's constants.
CONSTANTS = r"int|int64_t|k[A-Z]\w*|gpu|Tiling|Product|thread|threadIdx"


class Loop(NamedTuple):
    """A `for` or `while` that nvcc does not unroll: text[start:end] is its head."""

    start: int
    end: int
    head: str  # with single spaces
    is_constant: bool  # known at compile time


def loops_of(text: str) -> list[Loop]:
    code = without_comments(text)
    found = []
    parameters = " ".join(re.findall(r"template <([^;{]*?)>\s", code))
    constants = {*re.findall(r"\bconstexpr \w+ (\w+)", code), *re.findall(r"\bint (\w+)", parameters)}
    for start, end in loop_heads(code):
        first, *rest = code[start : end - 1].split(";")
        _, _, start_and_condition = "".join([first, *rest[:1]]).partition("(")
        names = set(re.findall(r"(?<![.\w])[A-Za-z_]\w*", start_and_condition))
        names -= {*re.findall(r"(\w+) = ", first), *constants}
        is_constant = all(re.fullmatch(CONSTANTS, name) for name in names) or " : " in first
        found.append(Loop(start, end, " ".join(text[start:end].split()), is_constant))
    return found


def with_counters(path: Path, text: str) -> str:
    """Add counters of loop iterations to the text of a kernel file, line for line."""
    pieces, at = [f'#line 1 "{path}"\n'], 0
    for nth, loop in enumerate(loops_of(text)):
        pieces += [text[at : loop.start], f'EMU_LOOP("{path.name}", {nth}) {text[loop.start : loop.end]} EMU_TURN']
        at = loop.end
    return "".join([*pieces, text[at:]])


def write_record(module: ModuleType) -> None:
    """Write the counts of this process, and its accesses (magnitude.py), to the folder MEGALODON_OPS_REACHED, if set."""
    folder = os.environ.get("MEGALODON_OPS_REACHED")
    if folder:
        symbols = subprocess.run(["nm", module.__file__], capture_output=True, text=True, check=True).stdout
        names = {int(at, 16): name for at, name in re.findall(r"^([0-9a-f]+) \w (\w+)$", symbols, re.MULTILINE)}
        Path(folder).mkdir(parents=True, exist_ok=True)
        record = Path(folder) / f"{os.getpid()}-{time.time_ns()}"
        for suffix, rows in (".json", module.reached()), (".accesses", module.magnitudes()):
            named = [(names[kernel] if kernel else "", *rest) for kernel, *rest in rows]
            record.with_suffix(suffix).write_text(json.dumps(named))


class Place(NamedTuple):
    """A loop in a kernel, the `nth` of those of the file with the same text; or a dimension, without a file."""

    kernel: str
    file: str
    loop: str
    nth: int


class Reached:
    """Numbers of iterations at a place, by type of the kernel; 3 stands for more."""

    def __init__(self, turns: str = "", most: int = 0, why: str = "") -> None:
        cells = (cell.split(":") for cell in turns.split())
        self.turns = defaultdict(set, {kind: set(map(int, numbers)) for kind, numbers in cells})
        self.most = most
        self.why = why

    def __str__(self) -> str:
        return " ".join(f"{kind}:{''.join(map(str, sorted(numbers)))}" for kind, numbers in sorted(self.turns.items()))

    def lacks(self, kinds: Iterable[str] = ()) -> set[tuple[str, int]]:
        """Missing numbers among one (or none), two and three, for the types that occur and `kinds`."""
        wanted = ((kind, unit) for kind in {*self.turns, *kinds} or {""} for unit in ENOUGH)
        return {(kind, unit) for kind, unit in wanted if not ENOUGH[unit] & self.turns.get(kind, set())}


def places() -> dict[str, tuple[str, str, int]]:
    """File, head and number of each loop with a variable bound, by its name in the emulator."""
    found = {}
    for path in sorted(CUDA.rglob("*.cu*")):
        loops = loops_of(path.read_text())
        for i, loop in enumerate(loops):
            if not loop.is_constant:
                nth = sum(other.head == loop.head for other in loops[: i + 1])
                found[f"{path.name} {i}"] = path.name, loop.head, nth
    return found


def merge(folder: Path) -> dict[Place, Reached]:
    """Merge the counts of all processes."""
    rows = [row for path in sorted(folder.glob("*.json")) for row in json.loads(path.read_text())]
    mangled = sorted({kernel for kernel, *_ in rows if kernel})
    kernels = dict(zip(mangled, demangle(mangled), strict=True))
    loops = places()
    found: dict[Place, Reached] = defaultdict(Reached)
    varies = {kernel for kernel, what, turns, _ in rows if what == "warps" and turns & FEWER_WARPS}
    for mangled_name, what, turns, most in rows:
        kernel, _, arguments = kernels.get(mangled_name, LAUNCHER).partition("<")
        is_loop = " " in what
        if "planted" in mangled_name or is_loop and what not in loops:
            continue
        unused_dimension = what in ("grid.y", "grid.z") and most == 1
        if unused_dimension or what == "warps" and mangled_name not in varies:
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


def gaps(found: dict[Place, Reached], table: dict[Place, Reached]) -> Iterator[str]:
    """Describe places with gaps for which the table gives no reason."""
    for place in sorted(found.keys() | table.keys()):
        row, reached = table.get(place, Reached()), found.get(place, Reached())
        missing = reached.lacks(row.turns) - (row.lacks() if row.why else set())
        if missing:
            wanted = ", ".join(f"{unit} of {kind}" if kind else str(unit) for kind, unit in sorted(missing))
            where = f"{place.kernel}: {place.file} `{place.loop}` ({place.nth})"
            yield f"{where}: iterations {str(reached) or 'none'}; no test reaches {wanted}"


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


def run_command(register: ModuleType, noun: str) -> None:
    """Write a register's table from the folder that the command line names or, with --check, compare them."""
    parser = argparse.ArgumentParser(description=register.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    found = register.merge(arguments.folder)
    if not arguments.check:
        register.write_table(found)
    problems = list(register.gaps(found, register.read_table(register.TABLE.read_text())))
    print(*problems, f"{register.TABLE.name}: {len(found)} {noun}, {len(problems)} gaps without a reason", sep="\n")
    sys.exit(bool(problems))


if __name__ == "__main__":
    run_command(sys.modules[__name__], "places")
