"""`Attributes`: what a module or function holds before a call, to see afterwards what the call has changed."""

import functools
from collections import deque
from collections.abc import Iterable
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .recorder import address_of

_SEQUENCES = (list, tuple, set, frozenset, deque)
_VALUES = (bool, int, float, complex, str, bytes, type(None))
_NOT_ENTERED = (*_VALUES, Tensor, type, ModuleType, torch.dtype, torch.device, torch.Size)


class Attributes:
    """Objects that a module or function holds: attributes, their parts, closures, globals that its code names.

    Attributes:
        tensors: the tensors among them, by name; parameters included.
    """

    def __init__(self, root: Any) -> None:
        self._root, self._held = root, _held_by(root)
        self.tensors = {name: value for name, value in self._held.items() if isinstance(value, Tensor)}
        self._memory = {name: _memory(tensor) for name, tensor in self.tensors.items()}
        self._versions = {name: _version(tensor) for name, tensor in self.tensors.items()}
        parameters = {name for name, tensor in self.tensors.items() if isinstance(tensor, nn.Parameter)}
        self._copies = {n: t.clone() for n, t in self.tensors.items() if n not in parameters and is_plain(t)}

    def rebound(self) -> str | None:
        """Return the name of an attribute that is another object now; None if there is none."""
        now = _held_by(self._root)
        for name in (*self._held, *now):
            if name not in now or name not in self._held or not _is_same(self._held[name], now[name]):
                return name
        moved = (name for name, tensor in self.tensors.items() if _memory(tensor) != self._memory[name])
        return next(moved, None)

    def written(self) -> dict[str, Tensor]:
        """Return the tensors that were written in place."""
        written = {}
        for name, tensor in self.tensors.items():
            if name in self._copies:  # compared by value: BatchNorm's kernel writes buffers without another version
                is_same = is_same_bits(tensor, self._copies[name])
            else:
                is_same = _version(tensor) == self._versions[name]
            if not is_same:
                written[name] = tensor
        return written

    def restore(self) -> None:
        """Copy their earlier values to the tensors that were written; parameters have no copy."""
        for name, tensor in self.written().items():
            if name in self._copies:
                tensor.copy_(self._copies[name])


def is_same_bits(a: Any, b: Any) -> bool:
    """Return True if two tensors, or values in Python, are the same, to the bit."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return type(a) is type(b) and a == b
    if (a.dtype, a.shape, a.layout) != (b.dtype, b.shape, b.layout):
        return False
    if not is_plain(a):
        return a is b
    a, b = (t.detach().resolve_conj().resolve_neg() for t in (a, b))
    a, b = (t.where(t == t, torch.nan) if t.is_floating_point() else t for t in (a, b))  # every NaN is the same
    a, b = (t.contiguous().flatten().view(torch.uint8) for t in (a, b))
    return torch.equal(a, b)


def is_plain(tensor: Tensor) -> bool:
    """Return True if the tensor's values lie in a storage that can be read."""
    return not (is_lazy(tensor) or tensor.is_meta) and (tensor.numel() == 0 or address_of(tensor) != 0)


def _held_by(root: Any) -> dict[str, Any]:
    """Return what `root` holds, by name: every object that is entered, and every value and tensor."""
    found, entered, stack = {}, set(), [("", root)]
    while stack:
        name, value = stack.pop()
        found[name] = value
        if isinstance(value, _NOT_ENTERED) or id(value) in entered or _is_torchs_own(value):
            continue
        entered.add(id(value))
        stack += [(f"{name}.{key}".removeprefix("."), part) for key, part in _parts(value)]
    return found


def _is_torchs_own(value: Any) -> bool:
    """Return True for an operator or a compiled program of torch, which torch itself may change."""
    is_operator = type(value).__module__.startswith(("torch._", "torch.amp")) and not isinstance(value, nn.Module)
    return is_operator or isinstance(value, torch.jit.ScriptModule)


def _parts(value: Any) -> Iterable[tuple[Any, Any]]:
    """Yield the parts of an object, with their names."""
    if isinstance(value, _SEQUENCES):
        yield from enumerate(value)
    elif isinstance(value, dict):
        yield from value.items()
    elif isinstance(value, functools.partial):
        yield from (("func", value.func), ("args", value.args), ("keywords", value.keywords))
    elif isinstance(value, MethodType):
        yield from (("self", value.__self__), ("func", value.__func__))
    elif isinstance(value, FunctionType):
        code = value.__code__
        for name, cell in zip(code.co_freevars, value.__closure__ or ()):
            try:
                yield name, cell.cell_contents
            except ValueError:  # not assigned yet
                pass
        yield from (("defaults", value.__defaults__), ("keyword defaults", value.__kwdefaults__))
        is_torchs = value.__globals__.get("__name__", "").startswith("torch.")
        names = () if is_torchs else code.co_names
        held = {name: value.__globals__[name] for name in names if name in value.__globals__}
        yield from ((name, part) for name, part in held.items() if not isinstance(part, FunctionType))
    for cls in type(value).__mro__:
        slots = vars(cls).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(value, name) and name != "__dict__":
                yield name, getattr(value, name)
    for key, part in getattr(value, "__dict__", {}).items():
        if isinstance(value, nn.Module) and key in ("_parameters", "_buffers", "_modules"):
            yield from part.items()
        else:
            yield key, part


def _is_same(old: Any, new: Any) -> bool:
    return old is new or (isinstance(old, _VALUES) and type(old) is type(new) and repr(old) == repr(new))


def _memory(tensor: Tensor) -> tuple:
    return (tensor.data_ptr(), tensor.shape, tensor.dtype) if is_plain(tensor) else ()


def _version(tensor: Tensor) -> int:
    return 0 if is_lazy(tensor) or tensor.is_inference() else tensor._version
