"""Runs in Python for Arm, without torch: calls the functions of `_C` that come through stdin, on tensors in a shared file.

A request names a function and its arguments; an argument that is a Memory lies in the file. The answer is what the
function has returned, or the exception that it has raised.
"""

import ctypes
import importlib.util
import mmap
import pickle
import sys
import types

DTYPES = ("float32", "float64", "bfloat16", "float16", "complex64", "complex128", "int64")


class Dtype:
    """What `_C` compares a tensor's dtype with, by identity."""

    def __init__(self, name):
        self.name = name

    def __repr__(self):
        return f"torch.{self.name}"


class Memory:
    """What `_C` reads of a tensor."""

    base = 0
    dtypes = {name: Dtype(name) for name in DTYPES}

    def __init__(self, offset, shape, dtype, device, is_contiguous):
        self.offset, self.shape, self.device, self.is_cpu = offset, shape, device, device == "cpu"
        self.dtype = self.dtypes.get(dtype) or Dtype(dtype)
        self.contiguous = is_contiguous

    def is_contiguous(self):
        return self.contiguous

    def data_ptr(self):
        return 0 if self.offset is None else self.base + self.offset


class Requests(pickle.Unpickler):
    def persistent_load(self, description):
        return Memory(*description)


def main():
    library, shared = sys.argv[1:]
    torch = types.ModuleType("torch")
    torch.Tensor, torch.nn = type("Tensor", (), {}), types.SimpleNamespace(Parameter=type("Parameter", (), {}))
    for name, dtype in Memory.dtypes.items():
        setattr(torch, name, dtype)
    sys.modules["torch"] = torch
    with open(shared, "r+b") as file:
        memory = mmap.mmap(file.fileno(), 0)
    Memory.base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    set_num_threads = ctypes.CDLL("libgomp.so.1").omp_set_num_threads

    spec = importlib.util.spec_from_file_location("_C", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    answer([name for name in dir(module) if callable(getattr(module, name)) and not name.startswith("_")])
    while True:
        try:
            function, arguments, options, threads = Requests(sys.stdin.buffer).load()
        except EOFError:
            return
        set_num_threads(threads)
        try:
            answer(getattr(module, function)(*arguments, **options))
        except Exception as error:
            answer(type(error)(str(error)))


def answer(value):
    pickle.dump(value, sys.stdout.buffer)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
