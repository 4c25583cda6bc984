"""Build and drive the emulated device: memory as torch tensors, launches, reports, counters."""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pybind11
import torch
from paths import load_module
from torch import Tensor

from emulator import reached
from emulator.known_bugs import with_known_bugs
from emulator.mutants import SWITCH

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[2]
DEVICE_AND_STREAM = 3, 0x57
"""Arbitrary numbers that bindings get, and that each of their launches must use"""


def bindings(module: ModuleType) -> dict[str, tuple[list[str], list[str]]]:
    """Functions of `_C`, `_cuda` or `_cuda_emulated` that launch kernels: names of arguments and of results.

    The caller allocates the results. A tensor may be both argument and result.
    """
    found = {}
    for name in dir(module):
        arguments, arrow, results = (getattr(module, name).__doc__ or "").partition(" -> ")
        if arrow and "(" not in arguments:  # "x weight -> y"; docstrings by pybind11 begin with "name("
            found[name] = arguments.split(), results.split()
    return found


def build(target: str = "_cuda_emulated") -> Path:
    """Compile `_cuda_emulated`, `_cuda_emulated_sanitized` or `_amx_emulated` if a source has changed.

    MEGALODON_OPS_EMULATOR_CACHE, by default ~/.cache/megalodon_ops/emulator, has a build folder for each checkout,
    interpreter and compiler.
    """
    cache = Path(os.environ.get("MEGALODON_OPS_EMULATOR_CACHE", "~/.cache/megalodon_ops/emulator")).expanduser()
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise RuntimeError("the CUDA emulator needs g++; install it, or set CXX.")
    key = hashlib.sha256("\0".join([str(ROOT), sys.executable, compiler]).encode()).hexdigest()[:16]
    folder = cache / key
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:  # two test runs may build at once
        fcntl.flock(lock, fcntl.LOCK_EX)
        _compile(folder, compiler, target)
    (library,) = folder.glob(f"{target}.*")
    return library


def load(library: Path, name: str = "_cuda_emulated") -> ModuleType:
    """Import a module that `build` has compiled; `name` is the one in its source."""
    return load_module(library, name)


def _compile(folder: Path, compiler: str, target: str) -> None:
    _copy_kernels(ROOT / "cuda", folder / "cuda")
    if not any((folder / name).exists() for name in ("build.ninja", "Makefile")):
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        programs = [f"-DCMAKE_CXX_COMPILER={compiler}", f"-DPython_EXECUTABLE={sys.executable}"]
        options = [*generator, *programs, f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
        _run(["cmake", "-S", str(FOLDER), "-B", str(folder), *options])
    _run(["cmake", "--build", str(folder), "--target", target, "--parallel", str(os.cpu_count() or 1)])


def _copy_kernels(source: Path, to: Path) -> None:
    """Copy the kernel files with counters and known bugs, all off. Unchanged files keep their time stamps."""
    paths = {path.relative_to(source): path for path in source.rglob("*.cu*")}
    for stale in {path.relative_to(to) for path in to.rglob("*.cu*")} - paths.keys():
        (to / stale).unlink()
    for name, path in paths.items():
        text = SWITCH + reached.with_counters(path, with_known_bugs(path.name, path.read_text()))
        if not (to / name).exists() or (to / name).read_text() != text:
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            (to / name).write_text(text)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-8000:]}")


class DeviceTensor:
    """The attributes that bindings read, for a tensor in the emulated device's memory."""

    is_cuda = True

    def __init__(self, tensor: Tensor) -> None:
        self.shape, self.dtype = tensor.shape, tensor.dtype
        self.is_contiguous, self.data_ptr = tensor.is_contiguous, tensor.data_ptr


class Emulator:
    """The emulated device. A faulty launch raises `Emulator.Error` with the line and thread of each bug."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module
        self.Error = module.EmulationError
        self.bindings = bindings(module)
        self.reset()

    def reset(self) -> None:
        self.set_order("random", seed=1)
        self.module.reset_counters()

    def set_order(self, order: str, seed: int = 1, shared_limit: int = 99 * 1024) -> None:
        """Set the order of the threads between barriers: "forward", "reverse" or "random"."""
        self.module.set_options(getattr(self.module.Order, order), seed, shared_limit)

    @contextmanager
    def launch_sizes(self, **sizes: int) -> Iterator[None]:
        """Within the context, these sizes replace those of LAUNCH_SIZE in launchers."""
        self.module.set_launch_sizes(sizes)
        try:
            yield
        finally:
            unused = self.module.set_launch_sizes({})
        assert not unused, f"no launcher asked for {unused}"

    @contextmanager
    def only_bounds(self, apart: int = 1 << 22, ends: int = 0, middle: int = 0) -> Iterator[None]:
        """Within the context, ignore races and reads of unwritten memory, to which inconsistent inputs lead.

        Buffers are `apart` bytes from each other, so that an access far out of bounds does not reach another one. For
        tensors too large to be computed, `ends` > 0 skips blocks of the grid: in each of its rows, only the first and
        the last `ends` run, and as many on each side of block `middle`.
        """
        self.module.set_bounds(only=True, red_zone=apart, ends=ends, middle=middle)
        try:
            yield
        finally:
            self.module.set_bounds(only=False)

    def sparse(self, *shape: int, dtype: torch.dtype = torch.float32, name: str = "sparse") -> Tensor:
        """A tensor of zeros that takes memory only where it is written, for offsets beyond 2^31.

        The emulator checks only the bounds of its accesses.
        """
        count = torch.Size(shape).numel()
        item = dtype.itemsize if dtype != torch.uint8 else 4  # a workspace has floats
        buffer = self.module.DeviceBuffer(count * dtype.itemsize, name, misalignment=0, sparse=True, item=item)
        return torch.frombuffer(buffer, dtype=dtype, count=count).reshape(shape)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32, name: str = "output", offset: int = 0) -> Tensor:
        """An unwritten tensor (all NaN) in the device's memory, `offset` elements past an aligned address."""
        return self._allocate(shape, dtype, name, offset)[1]

    def tensor(self, values: Tensor, name: str = "input", offset: int = 0, read_only: bool = True) -> Tensor:
        """A copy in the device's memory, read-only for kernels by default."""
        buffer, tensor = self._allocate(values.shape, values.dtype, name, offset)
        tensor.copy_(values)
        if buffer is not None:
            buffer.mark_written(read_only)
        return tensor

    def _allocate(self, shape: tuple[int, ...], dtype: torch.dtype, name: str, offset: int) -> tuple[Any, Tensor]:
        count = torch.Size(shape).numel()
        if count == 0:
            return None, torch.empty(shape, dtype=dtype)
        buffer = self.module.DeviceBuffer(count * dtype.itemsize, name, offset * dtype.itemsize)
        return buffer, torch.frombuffer(buffer, dtype=dtype, count=count).reshape(shape)

    @contextmanager
    def only_asking(self, sizes: list[int]) -> Iterator[None]:
        """Within the context, launches do not run: they append their workspace's bytes to `sizes` and raise InterruptedError."""
        empty = self.empty

        def ask(*shape: int, name: str = "output", **options: Any) -> Tensor:
            if name != "workspace":
                return empty(*shape, name=name, **options)
            sizes.append(shape[0])
            raise InterruptedError

        self.empty = ask
        try:
            yield
        finally:
            self.empty = empty

    def _in_order(self, name: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, ...]:
        """All arguments and results of a binding. If some are named, the others are None."""
        inputs, results = self.bindings[name]
        rest = (inputs + results)[len(arguments) :] if named else []
        assert named.keys() <= set(rest), f"{name} has no {named.keys() - set(rest)}"
        return *arguments, *map(named.get, rest)

    def launch(self, name: str, *arguments: Any, **named: Any) -> None:
        """Call a binding like those of `_cuda`, with tensors in the device's memory."""
        arguments = self._in_order(name, arguments, named)

        def wrap(argument: Any) -> Any:
            return DeviceTensor(argument) if isinstance(argument, Tensor) else argument

        def allocate(count: int) -> DeviceTensor:
            return DeviceTensor(self.empty(count, dtype=torch.uint8, name="workspace"))

        self.module.take_streams()
        getattr(self.module, name)(*DEVICE_AND_STREAM, allocate, *map(wrap, arguments))
        used = self.module.take_streams()
        assert used <= {DEVICE_AND_STREAM}, f"{name}: launches on devices and streams {used}, not {DEVICE_AND_STREAM}"

    def call(self, name: str, *arguments: Any, offset: int | dict[str, int] = 0, **named: Any) -> None:
        """Call a binding like those of `_C`, with CPU tensors: move them to the device and the results back.

        On the device, each tensor begins `offset` elements past a multiple of 256 bytes; a dict gives offsets by name.
        """
        inputs, results = self.bindings[name]
        arguments = self._in_order(name, arguments, named)
        given = arguments[: len(inputs)]
        wanted = arguments[len(inputs) :]
        in_place = {id(a) for a in given if isinstance(a, Tensor)} & {id(a) for a in wanted}
        moved: dict[int, Tensor] = {}  # by id, as an argument may also be a result

        def move(label: str, argument: Any) -> Any:
            if isinstance(argument, Tensor) and id(argument) not in moved:
                shift = offset if isinstance(offset, int) else offset.get(label, 0)
                if label in results:
                    tensor = self.empty(*argument.shape, dtype=argument.dtype, name=label, offset=shift)
                else:
                    tensor = self.tensor(argument, label, shift, read_only=id(argument) not in in_place)
                moved[id(argument)] = tensor
            return moved.get(id(argument), argument)

        labels = inputs + results
        self.launch(name, *(move(label, argument) for label, argument in zip(labels, arguments, strict=True)))
        for result in wanted:
            if isinstance(result, Tensor):
                result.copy_(moved[id(result)])

    @contextmanager
    def replacing(self, compiled: ModuleType, offset: int | dict[str, int] = 0) -> Iterator[None]:
        """Within the context, bindings of `compiled` (megalodon_ops._C) launch emulated kernels, if there are any."""
        originals = {name: getattr(compiled, name) for name in self.bindings}
        try:
            for name in self.bindings:
                setattr(compiled, name, self._launcher(name, offset))
            yield
        finally:
            for name, original in originals.items():
                setattr(compiled, name, original)

    def _launcher(self, name: str, offset: int | dict[str, int]) -> Callable[..., None]:
        return lambda *arguments: self.call(name, *arguments, offset=offset)

    def launched(self) -> set[str]:
        """Kernels since the last reset."""
        return set(self.module.launched())

    def traffic(self, kernel: str) -> dict[str, dict[str, int]]:
        """Memory traffic of `kernel` since the last reset, by buffer.

        Numbers of bytes, requests of warps and sectors of 32 bytes; the footprint is the bytes of all different sectors.
        """
        return self.module.traffic()[kernel]

    def sectors(self, kernel: str, name: str, access: str) -> int:
        """Bytes of the sectors of all requests for a buffer; `access` is "load" or "store"."""
        return 32 * self.traffic(kernel)[name][f"{access}_sectors"]

    def sites(self, kernel: str) -> list[dict[str, Any]]:
        """Load and store instructions of `kernel`: line, requests, transactions and their ideal number.

        Transactions are sectors or, in shared memory, wavefronts: more than the ideal number are bank conflicts.
        """
        return [site for site in self.module.sites() if site["kernel"] == kernel]

    def reports(self) -> list[dict[str, Any]]:
        """Reports of the last launch that raised."""
        return self.module.reports()
