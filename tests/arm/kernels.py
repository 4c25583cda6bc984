"""A plugin of pytest: the kernels run as compiled for Arm, in qemu, while torch and the tests run on this machine.

tools/test_arm.sh builds what the plugin needs and calls pytest with it. MEGALODON_OPS_ARM holds the command that starts
serve.py. There is no `Decoder`.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import io
import mmap
import os
import pickle
import shlex
import subprocess
import sys
import tempfile
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

BYTES = 1 << 32
"""Of the shared file, which takes memory where it is written"""
PAGE = 4096


class Call(pickle.Pickler):
    """The arguments of a call. Each tensor is copied to the shared memory, to an address that is as aligned as its own."""

    def __init__(self, file: io.BytesIO, memory: mmap.mmap) -> None:
        super().__init__(file)
        self.memory, self.end = memory, PAGE
        self.moved: dict[tuple[int, int], tuple[int, bytes]] = {}

    def persistent_id(self, value: Any) -> tuple | None:
        if not isinstance(value, Tensor):
            return None
        # `_C` refuses a tensor that lies elsewhere, not in one piece or nowhere before it reads the tensor.
        count = value.numel() * value.element_size() if value.is_cpu and value.is_contiguous() else 0
        address = value.data_ptr() if count else 0
        if address >= PAGE and (address, count) not in self.moved:
            offset = self.end + address % PAGE
            contents = ctypes.string_at(address, count)
            self.memory[offset : offset + count] = contents
            self.moved[address, count] = offset, contents
            self.end = offset + count + PAGE - (offset + count) % PAGE
        dtype = str(value.dtype).removeprefix("torch.")
        offset, _ = self.moved.get((address, count), (None, None))
        return offset, tuple(value.shape), dtype, str(value.device), value.is_contiguous()

    def move_back(self) -> None:
        for (address, count), (offset, before) in self.moved.items():
            after = self.memory[offset : offset + count]
            if after != before:
                ctypes.memmove(address, after, count)


class Arm:
    """A process of Python for Arm that calls the functions of its `_C`."""

    def __init__(self, command: str) -> None:
        with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
            file.truncate(BYTES)
            self.memory = mmap.mmap(file.fileno(), BYTES)
            words = [*shlex.split(command), file.name]
            self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            atexit.register(self.process.communicate)  # closes its input, which ends the process
            self.functions = pickle.load(self.process.stdout)

    def call(self, name: str, *arguments: Any, **options: Any) -> Any:
        file = io.BytesIO()
        call = Call(file, self.memory)
        call.dump((name, arguments, options, torch.get_num_threads()))
        self.process.stdin.write(file.getvalue())
        self.process.stdin.flush()
        result = pickle.load(self.process.stdout)
        call.move_back()
        if isinstance(result, Exception):
            raise result
        return result


def install() -> None:
    """Makes Arm's `_C` that of the package, which is imported after it: what it chooses by the instruction set is Arm's."""
    arm, compiled = Arm(os.environ["MEGALODON_OPS_ARM"]), ModuleType("megalodon_ops._C")
    for name in arm.functions:
        setattr(compiled, name, functools.partial(arm.call, name))
    sys.modules[compiled.__name__] = compiled
    import megalodon_ops

    megalodon_ops._C = compiled


install()
