"""The installed package: linked libraries, instruction sets, types, checks of the bindings."""

import ast
import importlib.metadata
import re
from pathlib import Path

import pytest
import torch
from emulator.device import DeviceTensor, bindings
from backends import needs_cuda_kernels
from paths import ROOT
from programs import run_python

import megalodon_ops as mo
from megalodon_ops import _C
from megalodon_ops.ops.common import definition as library

PACKAGE = Path(mo.__file__).parent


def test_extension_links_no_torch_library():
    binary = Path(_C.__file__).read_bytes()
    # Names of functions and libraries are in the file. Beside GCC's OpenMP, a call of LLVM's starts another runtime.
    assert b"GOMP_parallel" in binary and b"__kmpc_fork_call" not in binary
    assert b"libtorch" not in binary and b"libc10" not in binary


@needs_cuda_kernels
def test_cuda_extension_needs_no_cuda_library():
    binary = Path(library.cuda_extension().__file__).read_bytes()
    assert not re.search(rb"lib(torch|c10|cudart)\w*\.so", binary)


@needs_cuda_kernels
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_a_launch_is_an_error():
    arguments = [torch.zeros(1, 4, 6), torch.zeros(2, 6), torch.zeros(2, 6), 1, 4, 1e-5, torch.zeros(4, 3, 2)]
    arguments += [None, None, torch.zeros(1, 4, 1, 6), torch.zeros(1, 4, 1, 6)]
    arguments = [DeviceTensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
    with pytest.raises(RuntimeError, match="^cuda:0: .*(driver|device)"):
        library.cuda_extension().normalized_qk_fwd(0, 0, None, *arguments)


def test_cuda_tensors_without_cuda_kernels_are_refused(monkeypatch):
    monkeypatch.setattr(library, "has_cuda_kernels", lambda: False)
    with pytest.raises(NotImplementedError, match="this build has no CUDA kernels"):
        library.cuda_extension.__wrapped__()


@pytest.mark.skipif(not (ROOT / "cpp").is_dir(), reason="the sources are elsewhere")
def test_sources_include_no_torch_header():
    sources = [*ROOT.glob("cpp/*/*.h"), *ROOT.glob("cpp/*/*.cpp"), *ROOT.glob("cuda/*/*.cu*")]
    assert sources
    for source in sources:
        assert not re.search(r'#include *[<"](torch|ATen|c10)/', source.read_text()), source


def test_nothing_is_unpickled_unchecked():
    for source in PACKAGE.rglob("*.py"):
        text = source.read_text()
        if source == PACKAGE / "storage" / "sharded_tensors.py":  # an unpickler of a few classes
            assert re.findall(r"pickle\.\w+", text).count("pickle.Unpickler") == 1 and "def find_class" in text
            assert "pickle.load" not in text
            continue
        assert not re.search(r"^\s*(import|from) (pickle|dill|joblib|shelve|marshal)\b", text, re.M), source
        for call in re.findall(r"torch\.load\(.*\)", text):
            assert "weights_only=True" in call, source


def test_version():
    assert mo.__version__ == importlib.metadata.version("megalodon_ops")


def test_typed_with_a_complete_stub():
    assert (PACKAGE / "py.typed").exists()
    tree = ast.parse((PACKAGE / "_C.pyi").read_text())
    typed = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    kernels = bindings(_C).keys()
    assert len(kernels) > 20
    assert typed == {name for name in dir(_C) if name[0] != "_"} - kernels | {"__getattr__"}


_LOAD = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("megalodon_ops._C", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.active_isa())
"""


def print_isa(isa: str | None):
    """Load the extension without torch in a new process, which prints the active instruction set."""
    return run_python(_LOAD, _C.__file__, MEGALODON_OPS_ISA=isa)


def test_variable_forces_instruction_set():
    for isa in _C.available_isas():
        assert print_isa(isa).stdout.strip() == isa


def test_best_instruction_set_is_the_default_and_a_wrong_one_raises():
    by_intel = "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    best = [isa for isa in _C.available_isas() if isa != "v4_bf16" or not by_intel]  # slower than v4 there
    assert print_isa(None).stdout.strip() == best[-1]
    result = print_isa("v9")
    assert result.returncode == 1
    assert "ImportError: megalodon_ops: MEGALODON_OPS_ISA: instruction set `v9` is not available here" in result.stderr


def test_threads_follow_torch():
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert _C.num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_bindings_refuse_unsafe_tensors():
    x, p, q, omega = torch.zeros(1, 4, 6), torch.zeros(6, 2), torch.zeros(6, 2, dtype=torch.complex64), torch.zeros(6)
    absent = dict(state=None, spans=None)
    arguments = dict(x=x, p=p, q=q, gamma=q, omega=omega, **absent, y=x.clone(), state_out=None)
    _C.cema_fwd(*arguments.values())
    wrong = dict(x=x.transpose(1, 2), p=p[:5], omega=omega.double(), y=torch.zeros(1, 4, 5), state_out=q[None, :5])
    wrong |= dict(spans=torch.tensor([[0, 5]]))
    for name, bad in wrong.items():
        with pytest.raises((ValueError, TypeError), match=f"cema: `{name}"):
            _C.cema_fwd(*{**arguments, name: bad}.values())


class Subclass(torch.Tensor):
    """Not a plain tensor: the bindings read its Python attributes instead of using DLPack."""


@pytest.mark.parametrize("kind", [torch.Tensor, torch.nn.Parameter, Subclass])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_every_kind_of_tensor_is_read(kind, dtype):
    gen = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(9, 8, generator=gen)[1:].to(dtype) for _ in range(2))
    expected = torch.nn.functional.linear(x, weight)

    def as_kind(tensor):
        return kind(tensor) if kind is torch.nn.Parameter else tensor.as_subclass(kind)

    y = torch.full((8, 8), torch.nan, dtype=dtype)
    nothing = (None, False, None, None)  # bias, silu, value, add
    _C.linear_few_rows(as_kind(x), as_kind(weight), *nothing, as_kind(y) if kind is Subclass else y)
    torch.testing.assert_close(y, expected)
    for bad, error, message in [
        (x.t(), ValueError, "contiguous"),
        (x.to("meta"), ValueError, "on the CPU, got device meta"),
        (x[0], ValueError, r"shape \(T, I\), got \(8,\)"),
        (x.bool(), TypeError, "float32, float64, bfloat16 or float16, got torch.bool"),
    ]:
        with pytest.raises(error, match=message):
            _C.linear_few_rows(as_kind(bad) if bad.is_floating_point() else bad, weight, *nothing, y)
