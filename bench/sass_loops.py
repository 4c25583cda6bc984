"""How often a kernel's instructions run: its loops and the blocks that a call leaves out, from the machine code."""

from __future__ import annotations

import functools
import re
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from . import sass

LINE = r"\s*/\*[0-9a-f]{4,}\*/\s+\{?\s*(@!?U?P\w+\s+)?([A-Z][\w.]*[^;]*)"


@dataclass(eq=False)
class Code:
    """The instructions of a kernel in order, where each may lead, and what the kernel takes of a multiprocessor."""

    kernel: sass.Kernel
    lines: list[str] = field(default_factory=list)  # opcode and operands
    conditional: list[bool] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    def next(self) -> list[list[int]]:
        """Of each instruction, those that may run after it."""
        following = []
        for i, (line, conditional) in enumerate(zip(self.lines, self.conditional, strict=True)):
            after = [i + 1] if i + 1 < len(self.lines) else []
            if target := re.match(r"BRA\b.*`\((\S+?)\)", line):
                following.append([self.labels[target[1]], *(after if conditional else [])])
            else:
                following.append(after if conditional or not line.startswith("EXIT") else [])
        return following

    def loops(self) -> list[set[int]]:
        """The instructions of each loop, with those of the loops inside it."""
        following = self.next()
        before: list[list[int]] = [[] for _ in self.lines]
        for i, targets in enumerate(following):
            for target in targets:
                before[target].append(i)
        loops: dict[int, set[int]] = {}
        for last, targets in enumerate(following):
            for (
                head
            ) in targets:  # what is entered elsewhere than at its head is code that was moved to the end, no loop
                if head <= last and last not in _reached(0, following, head):
                    loops.setdefault(head, {head}).update(_reached(last, before, head))
        return list(loops.values())

    def avoiding(self, pattern: str) -> set[int]:
        """All instructions but those of the basic blocks in which a line matches."""
        blocks: list[list[int]] = [[]]
        labels = set(self.labels.values())
        for i, line in enumerate(self.lines):
            if i in labels:
                blocks.append([])
            blocks[-1].append(i)
            if line.startswith("BRA"):
                blocks.append([])
        return {i for block in blocks for i in block if not any(re.search(pattern, self.lines[j]) for j in block)}

    @functools.cache
    def bodies(self, avoid: str) -> tuple[Counter[str], list[Counter[str]]]:
        """The opcodes outside of all loops, and those of each loop outside of the loops inside it."""
        kept, loops = self.avoiding(avoid), self.loops()

        def opcodes(of: set[int]) -> Counter[str]:
            return Counter(self.lines[i].split()[0] for i in of & kept)

        outside = set(range(len(self.lines))).difference(*loops)
        return opcodes(outside), [opcodes(loop.difference(*(o for o in loops if o < loop))) for loop in loops]


def _reached(start: int, edges: list[list[int]], stop: int) -> set[int]:
    """What can be reached from `start` without passing `stop`."""
    found, ahead = {start} - {stop}, [start] if start != stop else []
    while ahead:
        new = {other for other in edges[ahead.pop()] if other != stop and other not in found}
        found |= new
        ahead += new
    return found


def codes_of(library: Path, names: Iterable[str], most: int) -> dict[str, Code]:
    """The machine code of these kernels of a shared library, by their names as sass.py prints them.

    Of the newest architecture in the library up to `most`, 90 for sm_90, or else of the oldest.
    """
    held = {
        int(a)
        for a in re.findall(r"sm_(\d+)\S*\.cubin", sass._run([sass.tool("cuobjdump"), "-lelf", str(library)]).stdout)
    }
    return _codes_of(library, frozenset(names), max((a for a in held if a <= most), default=min(held)))


@functools.cache
def _codes_of(library: Path, names: frozenset[str], architecture: int) -> dict[str, Code]:
    found: dict[str, Code] = {}
    with tempfile.TemporaryDirectory() as folder:
        sass._run([sass.tool("cuobjdump"), "-xelf", "all", str(library)], folder=folder)
        for cubin in Path(folder).glob(f"*sm_{architecture}*.cubin"):
            wanted = {kernel.name: kernel for kernel in sass.resources_of(cubin) if kernel.name in names}
            if wanted:
                found |= parse(sass._run([sass.tool("nvdisasm"), "-c", str(cubin)]).stdout, wanted)
    return found


def parse(listing: str, wanted: dict[str, sass.Kernel]) -> dict[str, Code]:
    """The kernels of `nvdisasm -c` that are wanted."""
    sections = re.findall(r"\.section\s+\.text\.([\w$]+)", listing)
    short = dict(zip(sections, sass.demangle(sections), strict=True))
    found, code = {}, None
    for line in listing.splitlines():
        if section := re.match(r"\s*\.section\s+\.text\.([\w$]+)", line):
            name = short[section[1]]
            code = found.setdefault(name, Code(wanted[name])) if name in wanted else None
        elif code is None:
            continue
        elif label := re.match(r"(\.L_\w+):", line):
            code.labels[label[1]] = len(code.lines)
        elif found_line := re.match(LINE, line):
            code.lines.append("NOP" if (found_line[1] or "").startswith("@!PT") else found_line[2].strip())
            code.conditional.append(found_line[1] is not None)
    return found
