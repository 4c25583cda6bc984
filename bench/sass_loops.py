"""Loops of a kernel, and blocks that a call skips, from its machine code."""

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
    """Instructions of a kernel in order, with its branch targets and resources."""

    kernel: sass.Kernel
    lines: list[str] = field(default_factory=list)  # opcode and operands
    conditional: list[bool] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    def next(self) -> list[list[int]]:
        """For each instruction, those that may run after it."""
        following = []
        for i, (line, conditional) in enumerate(zip(self.lines, self.conditional, strict=True)):
            after = [i + 1] if i + 1 < len(self.lines) else []
            if target := re.match(r"BRA\b.*`\((\S+?)\)", line):
                following.append([self.labels[target[1]], *(after if conditional else [])])
            else:
                following.append(after if conditional or not line.startswith("EXIT") else [])
        return following

    def loops(self) -> list[set[int]]:
        """Instructions of each loop, including its inner loops."""
        following = self.next()
        before: list[list[int]] = [[] for _ in self.lines]
        for i, targets in enumerate(following):
            for target in targets:
                before[target].append(i)
        loops: dict[int, set[int]] = {}
        for last, targets in enumerate(following):
            for head in targets:
                # A backward branch from code that is reached without passing `head` is no loop: nvcc moved that code.
                if head <= last and last not in _reachable(0, following, head):
                    loops.setdefault(head, {head}).update(_reachable(last, before, head))
        return list(loops.values())

    def instructions_without(self, pattern: str) -> set[int]:
        """Instructions of the basic blocks in which no line matches."""
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
        """Opcodes outside of all loops, and those of each loop without its inner loops."""
        counted = self.instructions_without(avoid)
        loops = self.loops()

        def opcodes(instructions: set[int]) -> Counter[str]:
            return Counter(self.lines[i].split()[0] for i in instructions & counted)

        outside = set(range(len(self.lines))).difference(*loops)
        bodies = []
        for loop in loops:
            inner = [other for other in loops if other < loop]
            bodies.append(opcodes(loop.difference(*inner)))
        return opcodes(outside), bodies


def _reachable(start: int, edges: list[list[int]], stop: int) -> set[int]:
    """Instructions reachable from `start` without passing `stop`."""
    found = {start} - {stop}
    ahead = list(found)
    while ahead:
        new = {other for other in edges[ahead.pop()] if other != stop and other not in found}
        found |= new
        ahead += new
    return found


def codes_of(library: Path, names: Iterable[str], newest: int) -> dict[str, Code]:
    """Machine code of these kernels of a shared library, by their names as sass.py prints them.

    The code is that of the newest architecture up to `newest` (90 for sm_90) in the library, or else of the oldest.
    """
    listed = sass._run([sass.tool("cuobjdump"), "-lelf", str(library)]).stdout
    available = {int(a) for a in re.findall(r"sm_(\d+)\S*\.cubin", listed)}
    architecture = max((a for a in available if a <= newest), default=min(available))
    return _codes_of(library, frozenset(names), architecture)


@functools.cache
def _codes_of(library: Path, names: frozenset[str], architecture: int) -> dict[str, Code]:
    found: dict[str, Code] = {}
    with tempfile.TemporaryDirectory() as folder:
        sass._run([sass.tool("cuobjdump"), "-xelf", "all", str(library)], folder=folder)
        for cubin in Path(folder).glob(f"*sm_{architecture}*.cubin"):
            kernels = {kernel.name: kernel for kernel in sass.resources_of(cubin) if kernel.name in names}
            if kernels:
                found |= parse(sass._run([sass.tool("nvdisasm"), "-c", str(cubin)]).stdout, kernels)
    return found


def parse(listing: str, kernels: dict[str, sass.Kernel]) -> dict[str, Code]:
    """Parse these kernels, by name, from the output of `nvdisasm -c`."""
    sections = re.findall(r"\.section\s+\.text\.([\w$]+)", listing)
    short = dict(zip(sections, sass.demangle(sections), strict=True))
    found: dict[str, Code] = {}
    code = None  # of the section, if it is one of `kernels`
    for line in listing.splitlines():
        if section := re.match(r"\s*\.section\s+\.text\.([\w$]+)", line):
            name = short[section[1]]
            code = found.setdefault(name, Code(kernels[name])) if name in kernels else None
        elif code is None:
            continue
        elif label := re.match(r"(\.L_\w+):", line):
            code.labels[label[1]] = len(code.lines)
        elif found_line := re.match(LINE, line):
            code.lines.append("NOP" if (found_line[1] or "").startswith("@!PT") else found_line[2].strip())
            code.conditional.append(found_line[1] is not None)
    return found
