"""Machine code that nvcc made of the kernels: registers, stack and instructions, by architecture.

`python -m bench.sass` prints a table of the installed package's kernels.
"""

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass
class Kernel:
    """One instance of a kernel, compiled for sm_<architecture>."""

    name: str  # without namespaces and parameters: "scan_kernel<bf16, 8>"
    architecture: int
    calls: list[str] = field(default_factory=list)  # device functions not inlined
    registers: int = 0
    shared: int = 0  # bytes, static
    stack: int = 0  # bytes: arrays in memory, and spills
    opcodes: dict[str, tuple[int, str]] = field(default_factory=dict)  # count, and "file:line" of the first

    def uses(self, pattern: str) -> list[tuple[str, int, str]]:
        """Opcodes that match from their beginning: (opcode, count, "file:line" of the first)."""
        return [(opcode, *use) for opcode, use in self.opcodes.items() if re.match(pattern, opcode)]


class MissingTool(RuntimeError):
    """A tool of the CUDA toolkit is missing."""


@functools.cache
def nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = shutil.which("nvcc") or (home and shutil.which("nvcc", path=f"{home}/bin"))
    if not found:
        raise MissingTool("nvcc is neither on PATH nor in CUDA_HOME/bin")
    return found


@functools.cache
def tool(name: str) -> str:
    """Path of nvdisasm or cuobjdump, from the toolkit or from the PyPI package nvidia-cuda-<name>."""
    folders = [folder for entry in sys.path for folder in Path(entry).glob("nvidia/*/bin")]
    found = shutil.which(name) or shutil.which(name, path=os.pathsep.join(map(str, folders)))
    if not found:
        raise MissingTool(f"{name} is missing: pip install nvidia-cuda-{name}")
    return found


def installed() -> Path:
    """File of the installed CUDA kernels."""
    spec = importlib.util.find_spec("megalodon_ops._cuda")
    if spec is None:
        raise MissingTool("this build of megalodon_ops has no CUDA kernels")
    return Path(spec.origin)


def kernels_of(library: Path) -> list[Kernel]:
    """All kernels of a shared library, once for each architecture with machine code."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        _run([tool("cuobjdump"), "-xelf", "all", str(library)], folder=folder)
        found = pool.map(_kernels_of_cubin, sorted(Path(folder).glob("*.cubin")))
        return [kernel for kernels in found for kernel in kernels]


def mangled_names(library: Path) -> list[str]:
    """Mangled names of a shared library's kernels."""
    listed = _run([tool("cuobjdump"), "--dump-resource-usage", str(library)]).stdout
    return sorted(set(re.findall(r"Function (\w+):", listed)))


def ptx_of(library: Path) -> set[int]:
    """Architectures with PTX in a shared library."""
    return {int(a) for a in re.findall(r"sm_(\d+)\.ptx", _run([tool("cuobjdump"), "-lptx", str(library)]).stdout)}


def compiled(source: Path, architecture: int = 90) -> list[Kernel]:
    """Kernels of a source file, compiled by nvcc."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / f"{source.stem}.sm_{architecture}.cubin"
        _run([*_compiler(), "-lineinfo", f"-arch=sm_{architecture}", "-cubin", str(source), "-o", str(cubin)])
        return _kernels_of_cubin(cubin)


def assembly(source: Path) -> dict[str, str]:
    """Inline PTX of each kernel of a source file, or its `prmt`; x, y and z are the kernel's parameters.

    "x" is a pointer; "x0" is word 0 of its target (read before the PTX or written after it) or of a parameter. An array
    in shared memory has its own name.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "kernels.ptx"
        _run([*_compiler(), "-arch=compute_80", "-ptx", str(source), "-o", str(output)])
        bodies = dict(re.findall(r"\.entry (\w+)\(.*?^\{(.*?)^\}", output.read_text(), re.DOTALL | re.MULTILINE))
    return dict(zip(demangle(list(bodies)), map(_assembly_of, bodies.values()), strict=True))


def _assembly_of(body: str) -> str:
    """Inline PTX of a kernel's body, with its registers named after the parameters that they hold (see `assembly`)."""
    inline = r"// begin inline asm\s+(.*?);?\s+// end inline asm"
    registers = r"(\{.*?\}|%\w+)"
    address = r"\[?(%?\w+)(?:\+(\d+))?\]?"
    code = re.sub(inline, "", body)
    operands: dict[str, str] = {}  # register -> name

    def name(found: str, source: str, first: int | None) -> None:
        for i, register in enumerate(re.findall(r"%\w+", found)):
            operands.setdefault(register, source if first is None else f"{source}{first + i}")

    for instruction, to, source, offset in re.findall(rf"(ld|cvta|mov)(?:\.\w+)*\s+{registers}, {address};", code):
        parameter = re.search(r"_param_(\d)$", source)
        whole = instruction != "ld" or parameter and to.startswith("%rd")
        source = "xyz"[int(parameter[1])] if parameter else operands.get(source, source)
        name(to, source, None if whole else int(offset or 0) // 4)
    for to, offset, stored in re.findall(rf"st\.global(?:\.\w+)*\s+{address}, {registers};", code):
        name(stored, operands[to], int(offset or 0) // 4)
    written = re.findall(inline, body) or [" ".join(found.split()) for found in re.findall(r"\bprmt\.[^;]*", code)]
    return re.sub(r"%\w+", lambda register: operands[register[0]], "; ".join(written))


def _compiler() -> list[str]:
    return [nvcc(), "-std=c++17", "-O3", f"-I{ROOT / 'cuda' / 'common'}", f"-I{ROOT / 'cpp' / 'common'}"]


def resources_of(cubin: Path) -> list[Kernel]:
    """Kernels of a cubin with their registers and memory, without instructions."""
    kernels = _resources(cubin)
    for kernel, name in zip(kernels.values(), demangle(list(kernels)), strict=True):
        kernel.name = name
    return list(kernels.values())


def _resources(cubin: Path) -> dict[str, Kernel]:
    architecture = int(re.search(r"sm_(\d+)", cubin.name)[1])
    usage = _run([tool("cuobjdump"), "--dump-resource-usage", str(cubin)]).stdout
    return {
        name: Kernel(name, architecture, [], int(registers), int(shared), int(stack))
        for name, registers, stack, shared in re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage)
    }


def _kernels_of_cubin(cubin: Path) -> list[Kernel]:
    kernels = _resources(cubin)
    _parse_listing(_run([tool("nvdisasm"), "-c", "-g", str(cubin)]).stdout, kernels)
    for kernel, name in zip(kernels.values(), demangle(list(kernels)), strict=True):
        kernel.name = name
        kernel.calls = demangle(kernel.calls)
    return list(kernels.values())


def _parse_listing(listing: str, kernels: dict[str, Kernel]) -> None:
    """Count the opcodes of `nvdisasm -c -g`, section by section."""
    for line in listing.splitlines():
        if found := re.match(r"\s*\.section\s+\.text\.([\w$]+)", line):
            kernel = kernels[found[1]]
            location = ""
        elif found := re.match(r'\s*//## File "([^"]+)", line (\d+)', line):
            location = f"{Path(found[1]).name}:{found[2]}"
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+\{?\s*(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line):
            count, first = kernel.opcodes.get(found[1], (0, location))
            kernel.opcodes[found[1]] = (count + 1, first)
            # nvcc's own routines, such as division, have other names.
            called = re.search(r"CALL\S*\s.*\$(_Z\w+)", line)
            if called and called[1] not in kernel.calls:
                kernel.calls.append(called[1])


def demangle(names: list[str]) -> list[str]:
    """Names of kernels as in the source, without return type, namespaces and parameters."""
    filt = shutil.which("cu++filt") or shutil.which("c++filt")
    if not filt:
        raise MissingTool("c++filt is missing; it comes with binutils")
    return [_short(line) for line in _run([filt], "\n".join(names)).stdout.splitlines()] if names else []


def _short(name: str) -> str:
    name = name.removeprefix("void ").replace("(anonymous namespace)::", "").replace("<unnamed>::", "")
    depth = 0
    for i, character in enumerate(name):
        depth += {"<": 1, ">": -1}.get(character, 0)
        if character == "(" and depth == 0:
            name = name[:i]
            break
    return re.sub(r"(?:\w+::)+(?=\w)", "", name).replace("> >", ">>")


def _run(command: list[str], text: str | None = None, folder: str | None = None) -> subprocess.CompletedProcess[str]:
    process = subprocess.run(command, input=text, capture_output=True, text=True, check=False, cwd=folder)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{process.stdout}{process.stderr}"[:8000])
    return process


def table(kernels: Iterable[Kernel]) -> str:
    """Markdown table of each kernel's registers and stack by architecture, and of its static shared memory."""
    rows: dict[str, dict[int, Kernel]] = {}
    for kernel in kernels:
        rows.setdefault(kernel.name, {})[kernel.architecture] = kernel
    architectures = sorted({a for row in rows.values() for a in row})
    lines = [
        "| kernel | " + " | ".join(f"sm_{a}" for a in architectures) + " | static shared bytes |",
        "|---|" + "---:|" * (len(architectures) + 1),
    ]
    for name in sorted(rows):
        row = [rows[name][a] for a in architectures]
        cells = [f"{k.registers}" + (f", {k.stack} bytes of stack" if k.stack else "") for k in row]
        lines.append(f"| `{name}` | {' | '.join(cells)} | {max(k.shared for k in row)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(kernels_of(installed())))
