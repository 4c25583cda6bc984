"""`Recorder`: sees what a call computes, the launches of kernels and the functions of torch, and keeps its tensors."""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves, tree_map_only

from ... import _C
from .definition import observer

aten = torch.ops.aten
_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_EMPTY = {aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default}
_EMPTY |= {aten.empty_strided.default, aten.new_empty_strided.default}
_HOST_READS = (Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__, Tensor.data_ptr)
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default}
"""called in Python without a warning: the call is short beside the product"""
_OPERATIONS = {
    getattr(aten, name + suffix).Tensor: sign
    for name, sign in {"add": "+", "sub": "-", "mul": "*", "div": "/"}.items()
    for suffix in ("", "_")
}
_COPIES = {aten.clone.default, aten._to_copy.default}
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
COPIED = (*_FLOATS, torch.float64, torch.int64, torch.complex64, torch.complex128)
_MINUS_ZERO = -0.0  # neutral in sums; +0.0 would change -0.0


_LEAVES = (Tensor, type(None), bool, int, float, torch.dtype, torch.device, torch.layout)


def tensors_in(*values: Any) -> list[Tensor]:
    leaves = []
    for value in values:
        leaves += [value] if isinstance(value, _LEAVES) else tree_leaves(value)  # slow: 10 us
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


@functools.cache
def _num_results(kernel: str) -> int:
    return len(getattr(_C, kernel).__doc__.partition("->")[2].split())


@functools.cache
def _written_arguments(function: Any) -> list[tuple[int, str]]:
    """Places and names of the arguments that a function of torch writes."""
    arguments = enumerate(function._schema.arguments)
    return [(i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write]


def address_of(tensor: Tensor) -> int:
    """Address of the tensor's storage; 0 if it has none, as an empty tensor or one that is made of others."""
    return 0 if is_traceable_wrapper_subclass(tensor) else tensor.untyped_storage().data_ptr()


def _has_no_memory(value: Any) -> bool:
    """Return True for a value in Python, and for a tensor whose memory is in others."""
    return (address_of(value) == 0 and value.numel() > 0) if isinstance(value, Tensor) else value is not None


class Call:
    """A call of a kernel, by name, or of a function, in the recorded step."""

    def __init__(self, function: str | Callable, args: tuple, kwargs: dict, results: list[tuple[int, Tensor]]) -> None:
        self.function, self.args, self.kwargs = function, args, kwargs
        self.results = results
        """new tensors that a function returns, with their places among its results; a kernel's are among its arguments"""
        self.written: set[int] = set()
        self.touched: set[int] = set()
        """addresses of the storages that the call writes, and of all that it reads or writes"""
        self.is_needed = self.leaves_tensors = False
        """leaves_tensors: results are values in Python, or tensors that are made of others"""

    @property
    def is_random(self) -> bool:
        return torch.Tag.nondeterministic_seeded in getattr(self.function, "tags", ())

    @property
    def name(self) -> str:
        schema = getattr(self.function, "_schema", None)
        return getattr(self.function, "__name__", "a module") if schema is None else schema.name.removeprefix("aten::")


class Recorder(TorchDispatchMode):
    """Keeps every launch of a kernel and every call of torch inside a step, and all of their tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.storages: dict[int, torch.UntypedStorage] = {}
        self.new: set[int] = set()
        """addresses of the storages that the step allocated"""
        self._is_paused = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler, 2 s

    @contextlib.contextmanager
    def recording(self, notes_host_reads: bool) -> Iterator[None]:
        has_compiled = "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance")  # new in torch 2.6
        eager = torch.compiler.set_stance("force_eager") if has_compiled else contextlib.nullcontext()
        reads = _HostReads(self) if notes_host_reads else contextlib.nullcontext()
        with eager, reads, self:  # compiled programs would not be seen
            observer.note = self._note_launch
            try:
                yield
            finally:
                observer.note = None

    def call(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        """Call a Python function that each replay calls again; the step sees copies of its new tensors."""
        if observer.note != self._note_launch:  # another thread, or no step
            return function(*args, **kwargs)
        self._is_paused, observer.note = True, None
        try:
            results = function(*args, **kwargs)
        finally:
            self._is_paused, observer.note = False, self._note_launch
        given = self.keep(tensors_in(*args, *kwargs.values()))
        results = tree_map_only(Tensor, lambda t: t if address_of(t) in given else t.clone(), results)
        self._add(function, args, kwargs, results, given)
        return results

    def _note_launch(self, name: str, args: tuple) -> None:
        call = Call(name, args, {}, [])
        call.written = self.keep(tensors_in(*args[-_num_results(name) :]))
        call.touched = self.keep(tensors_in(*args))
        self.calls.append(call)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if self._is_paused:
            return func(*args, **kwargs)
        if func.namespace == "megalodon_ops":
            with self:  # records what the op's Python calls
                return func.redispatch(_CPU, *args, **kwargs)
        results = func(*args, **kwargs)
        if func in _EMPTY:
            self.new |= self.keep([results])
        elif not func.is_view:
            changed = [args[i] if i < len(args) else kwargs.get(name) for i, name in _written_arguments(func)]
            self._add(func, args, kwargs, results, self.keep(tensors_in(*changed)))
        return results

    def note_host_read(self, function: Callable, args: tuple) -> None:
        if not self._is_paused:
            self._add(function, args, {}, 0, set())

    def _add(self, function: Callable, args: tuple, kwargs: dict, results: Any, written: set[int]) -> None:
        inputs, returned = self.keep(tensors_in(*args, *kwargs.values())), tensors_in(results)
        self.new |= {address_of(t) for t in returned} - self.storages.keys()
        outputs = self.keep(returned)
        fresh = outputs - inputs
        call = Call(function, args, kwargs, [(i, t) for i, t in enumerate(returned) if address_of(t) in fresh])
        call.written, call.touched = written | fresh, inputs | outputs
        call.leaves_tensors = any(map(_has_no_memory, tree_leaves(results)))
        if call.written or call.leaves_tensors:  # else results are views
            self.calls.append(call)

    def keep(self, tensors: list[Tensor]) -> set[int]:
        """Keep the tensors' memory; return the addresses of their storages."""
        storages = {a: tensor.untyped_storage() for tensor in tensors if (a := address_of(tensor))}
        self.storages |= storages
        return set(storages)


class _HostReads(TorchFunctionMode):
    """Notes the functions by which Python reads values and which :class:`Recorder` does not see."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in _HOST_READS:
            self._recorder.note_host_read(func, args[:1])
        return func(*args, **(kwargs or {}))


def as_kernel(call: Call) -> tuple | None:
    """Return the kernel, and its arguments, that computes what a call of torch does; None if there is none."""
    function, args = call.function, call.args
    if function is aten.copy_.default:
        (y, x), others = args[:2], args[2:]
    elif len(call.results) == 1:
        x, y, others = args[0], call.results[0][1], args[1:]
    elif function in _OPERATIONS:  # in place
        x, y, others = args[0], args[0], args[1:]
    else:
        return None
    operands = [x, y, *tensors_in(others)]
    if not all(isinstance(t, Tensor) and t.is_contiguous() and not t.is_neg() and not t.is_conj() for t in operands):
        return None
    if function is aten.embedding.default:
        has_kernel = x.dim() == 2 and x.dtype in COPIED and args[1].dtype == torch.int64
        return ("embedding_rows", x, args[1], y) if has_kernel else None
    if (function is aten.copy_.default or function in _COPIES) and x.shape == y.shape:
        if x.dtype == y.dtype:
            return ("copy_memory", x, y) if x.dtype in COPIED else None
        return ("elementwise", x, None, "=", 1.0, _MINUS_ZERO, y) if {x.dtype, y.dtype} <= {*_FLOATS} else None
    if function not in _OPERATIONS or call.kwargs or len(others) != 1:
        return None
    operation, (b,), dtypes = _OPERATIONS[function], others, {t.dtype for t in operands}
    if not (dtypes <= {*_FLOATS} or dtypes == {torch.float64}):
        return None
    if not isinstance(b, Tensor):
        if type(b) not in (int, float) or operation == "/":
            return None
        scale, shift = (b, _MINUS_ZERO) if operation == "*" else (1.0, b if operation == "+" else -b)
        return "elementwise", x, None, "=", float(scale), float(shift), y
    if not all(_is_suffix(t.shape, y.shape) for t in (x, b)) or not any(t.shape == y.shape for t in (x, b)):
        return None
    if any(t.dim() == 0 and t.dtype != y.dtype for t in (x, b)):  # such a tensor does not promote the other
        return None
    return "elementwise", x, b, operation, 1.0, _MINUS_ZERO, y


def _is_suffix(shape: torch.Size, whole: torch.Size) -> bool:
    """Return True if a tensor of this shape, ones in front apart, repeats over the leading axes of `whole`."""
    while len(shape) and shape[0] == 1 and math.prod(shape) != 1:
        shape = shape[1:]
    return whole[len(whole) - len(shape) :] == shape
