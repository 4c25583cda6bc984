"""Backends of a test: CPU kernels for each instruction set, CUDA kernels on the emulator or on a GPU.

Tests always pass CPU tensors. On the CUDA backends the bindings of `_C` are replaced by functions that move the tensors
to the device, launch there and move the results back.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType

import pytest
import torch
from emulator.device import bindings, build, load
from torch import Tensor

import megalodon_ops as mo
from megalodon_ops import _C
from megalodon_ops.ops.common import definition as library

DEFAULT_ISA = _C.active_isa()
# Only products of integers have kernels for these; tests of other ops skip them, unless one is this processor's best.
_ENDINGS = "_vnni", "_dot", "_i8mm"
INTEGER_ISAS = [name for name in _C.available_isas() if name.endswith(_ENDINGS) and name != DEFAULT_ISA]
ISAS = [name for name in _C.available_isas() if name not in INTEGER_ISAS]
HAS_GPU = library.has_cuda_kernels() and torch.cuda.is_available()
GPU = ["cuda"] if HAS_GPU else []
FAST = ["cpu", *GPU]
DEVICES = ["cpu", "cuda-emulated", *GPU]

# Instruction sets as parameters: the default one runs always, the others only among the slow tests.
ISA_PARAMS = [name if name == DEFAULT_ISA else pytest.param(name, marks=pytest.mark.slow) for name in ISAS]
each_isa = pytest.mark.parametrize("name", ISA_PARAMS)
# The fixture `backend` takes DEVICES; tests of numerical results take each instruction set instead of "cpu".
EVERY_BACKEND = [*ISA_PARAMS, "cuda-emulated", *GPU]
# For tests that take seconds on the emulator: there they are slow tests.
SLOW_EMULATED = [pytest.param("cuda-emulated", marks=pytest.mark.slow), *GPU]
WIDE_DEVICES = ["cpu", *SLOW_EMULATED]
every_backend = pytest.mark.parametrize("backend", EVERY_BACKEND, indirect=True)
wide_every_device = pytest.mark.parametrize("backend", WIDE_DEVICES, indirect=True)
wide_every_backend = pytest.mark.parametrize("backend", [*ISA_PARAMS, *SLOW_EMULATED], indirect=True)
# For tests of data that every implementation must reproduce.
each_implementation = pytest.mark.parametrize(
    ("implementation", "backend"),
    [(mo.reference, "cpu"), *((mo, device) for device in DEVICES)],
    ids=["reference", *DEVICES],
    indirect=["backend"],
)
# AMX on a processor without it: slow tests of the kernels for AMX run on emulated tile registers.
EMULATES_AMX = "v4_bf16" in ISAS and "v4_amx" not in ISAS
EMULATED_AMX = [pytest.param("v4_amx", marks=pytest.mark.slow)] if EMULATES_AMX else []
each_isa_with_amx = pytest.mark.parametrize("name", [*ISA_PARAMS, *EMULATED_AMX])
every_backend_with_amx = pytest.mark.parametrize("backend", [*EVERY_BACKEND, *EMULATED_AMX], indirect=True)
wide_every_backend_with_amx = pytest.mark.parametrize(
    "backend", [*ISA_PARAMS, *EMULATED_AMX, *SLOW_EMULATED], indirect=True
)
needs_amx = (
    pytest.mark.slow
    if EMULATES_AMX
    else pytest.mark.skipif("v4_amx" not in ISAS, reason="AMX is neither there nor emulated: no AVX512-BF16")
)
needs_cuda_kernels = pytest.mark.skipif(not library.has_cuda_kernels(), reason="this build has no CUDA kernels")
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a GPU and a build with CUDA kernels")


@contextmanager
def isa(name: str) -> Iterator[None]:
    """Within the context, CPU kernels use this instruction set."""
    emulated = name == "v4_amx" and EMULATES_AMX
    with _emulated_amx() if emulated else nullcontext():
        _C.set_isa("v4_bf16" if emulated else name)
        yield
        _C.set_isa(DEFAULT_ISA)


@functools.cache
def _amx_emulated() -> ModuleType:
    return load(build("_amx_emulated"), "_amx_emulated")


@contextmanager
def _emulated_amx() -> Iterator[None]:
    """Within the context, bindings of `_C` call kernels for AMX, on emulated tiles, for the tensors that these take."""
    module = _amx_emulated()
    takes = {
        "linear_many_rows": lambda x, *_: x.dtype == torch.float32 and x.dim() == 2,
        "quantized_many_rows": lambda x, weight, *_: weight.dtype != torch.uint8,
        "chunked_attention_fwd": lambda q, *_: q.dtype == torch.bfloat16 and q.dim() == 4,
        "chunked_attention_bwd": lambda do, *_: do.dtype == torch.bfloat16 and do.dim() == 4,
    }

    def choice(name: str) -> Callable:
        kernel, emulated = getattr(_C, name), getattr(module, name)
        return lambda *args: (emulated if takes[name](*args) else kernel)(*args)

    with pytest.MonkeyPatch.context() as patch:
        for name in takes:
            patch.setattr(_C, name, choice(name))
        yield


@contextmanager
def gpu() -> Iterator[None]:
    """Within the context, the bindings of `_C` launch the CUDA kernels on the current GPU."""

    def launcher(name: str, inputs: list[str]):
        def launch(*arguments):
            moved = {id(a): a.cuda() for a in arguments if isinstance(a, Tensor)}  # in and out may be one tensor
            library.launch(name, *(moved.get(id(a), a) for a in arguments))
            for result in arguments[len(inputs) :]:
                if isinstance(result, Tensor):
                    result.copy_(moved[id(result)])

        return launch

    with pytest.MonkeyPatch.context() as patch:
        for name, (inputs, _) in bindings(library.cuda_extension()).items():
            patch.setattr(_C, name, launcher(name, inputs))
        yield
