"""`Recorder`: notes the launches of kernels and the functions of torch in a call, and keeps their tensors."""

import contextlib
import functools
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves, tree_map_only

from ... import _C
from .definition import binding_names, observer

aten = torch.ops.aten
_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_EMPTY = {aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default}
_EMPTY |= {aten.empty_strided.default, aten.new_empty_strided.default}
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default}
"""Matrix products; called in Python without a warning, as the call takes much less time than the product"""
_OPERATIONS = {
    getattr(aten, name + suffix).Tensor: sign
    for name, sign in {"add": "+", "sub": "-", "mul": "*", "div": "/"}.items()
    for suffix in ("", "_")
}
_COPIES = {aten.clone.default, aten._to_copy.default, aten.copy_.default}
_WITH_KERNEL = {aten.embedding.default, *_COPIES, *_OPERATIONS}
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_COPIED = (*_FLOATS, torch.float64, torch.int64, torch.complex64, torch.complex128)
_MINUS_ZERO = -0.0  # leaves every number unchanged in a sum; +0.0 would change -0.0
_IN_PLACE = {"timestep_norm_fwd", "cema_fwd", "chunked_attention_state", "copy_memory"}
"""Kernels that may write a new state over the old one"""
_LEAVES = (Tensor, type(None), bool, int, float, torch.dtype, torch.device, torch.layout)


def tensors_in(*values: Any) -> list[Tensor]:
    """Return the tensors in values, which may be nested."""
    leaves = []
    for value in values:
        leaves += [value] if isinstance(value, _LEAVES) else tree_leaves(value)  # slow: 10 us
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


@functools.cache
def _written_arguments(function: Any) -> list[tuple[int, str]]:
    """Return the indices and names of the arguments that a function of torch writes."""
    arguments = enumerate(function._schema.arguments)
    return [(i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write]


def address_of(tensor: Tensor) -> int:
    """Return the address of the tensor's storage; 0 if it has none, as an empty, sparse or wrapping tensor."""
    has_storage = tensor.layout is torch.strided and not is_traceable_wrapper_subclass(tensor)
    return tensor.untyped_storage().data_ptr() if has_storage else 0


def without_compiler() -> contextlib.AbstractContextManager:
    """Return a context in which modules that torch.compile has wrapped run as they are."""
    has_compiled = "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance")  # new in torch 2.6
    return torch.compiler.set_stance("force_eager") if has_compiled else contextlib.nullcontext()


def _has_no_memory(value: Any) -> bool:
    """Return True for a value in Python, and for a tensor without a storage."""
    return (address_of(value) == 0 and value.numel() > 0) if isinstance(value, Tensor) else value is not None


@dataclass(eq=False)
class Call:
    """A call in the recorded step: of a kernel, by its name, or of a function."""

    name: str
    function: str | Callable
    args: tuple
    kwargs: dict
    written: Set[int]
    """addresses of the storages that the call writes"""
    touched: Set[int]
    """addresses of the storages that the call reads or writes"""
    results: list[tuple[int, Tensor]] = field(default_factory=list)
    """new tensors that a function returns, with their indices among its results; a kernel writes to its arguments"""
    leaves_tensors: bool = False
    """True if results are values in Python, or tensors that wrap others"""


class Recorder(TorchDispatchMode):
    """List of the launches of kernels and the calls of torch inside a step, with all of their tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.storages: dict[int, torch.UntypedStorage] = {}
        self.new: set[int] = set()
        """addresses of the storages that the step allocated"""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler, 2 s

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        with without_compiler(), self:  # compiled programs would not be noted
            # On the threads of replays, so that no other threads start.
            observer.recorder, own_threads = self, _C.use_own_threads(True)
            try:
                yield
            finally:
                observer.recorder = None
                _C.use_own_threads(own_threads)

    def call(self, name: str, function: Callable, *args: Any, **kwargs: Any) -> Any:
        """Call a Python function that each replay calls again; return copies of its new tensors."""
        given, observer.recorder = self.keep(tensors_in(*args, *kwargs.values())), None
        try:
            results = function(*args, **kwargs)
            results = tree_map_only(Tensor, lambda t: t if address_of(t) in given else t.clone(), results)
        finally:
            observer.recorder = self
        self.note(name, function, args, kwargs, results, given)
        return results

    def note_launch(self, kernel: str, args: tuple) -> None:
        """Add a launch of a kernel, whose last arguments are its results."""
        _, results = binding_names(kernel)
        written = self.keep(tensors_in(*args[-len(results) :]))
        self.calls.append(Call(kernel, kernel, args, {}, written, self.keep(tensors_in(*args))))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if observer.recorder is None:  # in `call`
            return func(*args, **kwargs)
        if func.namespace == "megalodon_ops":
            with self:  # records what the op's Python calls
                return func.redispatch(_CPU, *args, **kwargs)
        if func is aten._foreach_copy_.default:
            with self:
                for y, x in zip(*args):
                    y.copy_(x)
            return None
        results = func(*args, **kwargs)
        if func in _EMPTY:
            self.new |= self.keep([results])
        else:
            written = [args[i] if i < len(args) else kwargs.get(name) for i, name in _written_arguments(func)]
            self.note(func._schema.name, func, args, kwargs, results, self.keep(tensors_in(*written)))
        return results

    def note(
        self, name: str, function: Callable, args: tuple, kwargs: dict, results: Any, written: Set[int] = frozenset()
    ) -> None:
        """Add a call of a function, as a call of the kernel that computes the same if there is one."""
        inputs, returned = self.keep(tensors_in(*args, *kwargs.values())), tensors_in(results)
        self.new |= {address_of(t) for t in returned} - self.storages.keys()
        outputs = self.keep(returned)
        fresh = outputs - inputs
        call = Call(name.removeprefix("aten::"), function, args, kwargs, written | fresh, inputs | outputs)
        call.results = [(i, t) for i, t in enumerate(returned) if address_of(t) in fresh]
        call.leaves_tensors = any(map(_has_no_memory, tree_leaves(results)))
        if kernel := as_kernel(call):
            call.function, *call.args = kernel
        if call.written or call.leaves_tensors:  # otherwise, the results are views or none
            self.calls.append(call)

    def keep(self, tensors: list[Tensor]) -> set[int]:
        """Keep the tensors' memory; return the addresses of their storages."""
        storages = {a: tensor.untyped_storage() for tensor in tensors if (a := address_of(tensor))}
        self.storages |= storages
        return set(storages)

    def needed_calls(self, varying: set[int]) -> list[Call]:
        """Return the calls that depend on `varying` memory or draw random numbers; other results are constants.

        Adds to `varying` the storages that these calls write, that are written more than once, or that were written but
        not allocated by the step.
        """
        times = Counter(address for call in self.calls for address in call.written)
        varying |= {address for address, count in times.items() if count > 1 or address not in self.new}
        needed = []
        for call in self.calls:
            is_random = torch.Tag.nondeterministic_seeded in getattr(call.function, "tags", ())
            if is_random or not varying.isdisjoint(call.touched):
                needed.append(call)
                varying |= call.written
        return needed

    def places(self, calls: list[Call], varying: set[int], kept: set[int]) -> dict[int, torch.UntypedStorage]:
        """Return other storages for the recorded call's storages, by their addresses; those of `kept` stay.

        A new tensor whose values are copied to older memory, such as a state's, is placed in that memory if no call in
        between reads the old values. Temporary tensors share memory, which then stays in the processor's cache.
        """
        uses, places, free = defaultdict(list), {}, defaultdict(list)
        for i, call in enumerate(calls):
            for address in call.touched:
                uses[address].append(i)
        for i, call in enumerate(calls):
            if call.function != "copy_memory" or not all(map(_is_whole, call.args)):
                continue
            source, target = map(address_of, call.args)
            if source not in varying:  # a constant, written in the recorded call alone
                continue
            writer, last = uses[source][0], uses[source][-1]
            target_uses = [j for j in uses[target] if writer <= j < i]
            in_place = not target_uses or (target_uses == [writer] and calls[writer].function in _IN_PLACE)
            if source in self.new - kept and writer < last == i and in_place:
                places[source] = self.storages[target]
        stay = kept | places.keys()
        for i, call in enumerate(calls):
            temporary = [a for a in sorted(call.touched) if a in self.new and a in varying and a not in stay]
            sizes = {address: self.storages[address].nbytes() for address in temporary}
            for address, size in sizes.items():
                if uses[address][0] == i and free[size]:
                    places[address] = free[size].pop()
            for address, size in sizes.items():
                if uses[address][-1] == i:
                    free[size].append(places.get(address, self.storages[address]))
        return places


def _is_whole(tensor: Tensor) -> bool:
    """Return True if the tensor is contiguous and fills its storage."""
    return tensor.is_contiguous() and tensor.nbytes == tensor.untyped_storage().nbytes()


def as_kernel(call: Call) -> tuple | None:
    """Return name and arguments of a kernel that computes the same as a call of torch; None if there is none.

    The kernel "elementwise" computes x <operation> b or, for the operation "=", scale x + shift.
    """
    function, args = call.function, call.args
    if function not in _WITH_KERNEL:
        return None
    y = call.results[0][1] if call.results else args[0]  # in place
    x, *others = args[1:2] if function is aten.copy_.default else args
    tensors = [x, *tensors_in(others)]
    if not all(address_of(t) and t.is_contiguous() and not t.is_neg() and not t.is_conj() for t in (*tensors, y)):
        return None
    if function is aten.embedding.default:
        has_kernel = x.dim() == 2 and x.dtype in _COPIED and others[0].dtype == torch.int64
        return ("embedding_rows", x, others[0], y) if has_kernel else None
    b, operation, scale, shift = None, "=", 1.0, _MINUS_ZERO
    if function in _OPERATIONS:
        operation, b = _OPERATIONS[function], others[0]
        if call.kwargs or len(others) != 1:
            return None
        if not isinstance(b, Tensor):
            if type(b) not in (int, float) or operation == "/":
                return None
            if operation == "*":
                scale = b
            else:  # torch rounds a summand, but no factor
                shift = torch.tensor(float(b) if operation == "+" else -float(b), dtype=y.dtype).item()
            b, operation = None, "="
    elif x.dtype == y.dtype:
        return ("copy_memory", x, y) if x.dtype in _COPIED and x.shape == y.shape else None
    dtypes = {t.dtype for t in (*tensors, y)}
    if not (dtypes <= {*_FLOATS} or dtypes == {torch.float64}):
        return None
    if not all(_is_suffix(t.shape, y.shape) for t in tensors) or not any(t.shape == y.shape for t in tensors):
        return None
    if any(t.dim() == 0 and t.dtype != y.dtype for t in tensors):  # a 0-D tensor does not promote the other
        return None
    return "elementwise", x, b, operation, float(scale), float(shift), y


def _is_suffix(shape: torch.Size, whole: torch.Size) -> bool:
    """Return True if a tensor of this shape, without leading ones, repeats over the leading dimensions of `whole`."""
    while len(shape) and shape[0] == 1 and math.prod(shape) != 1:
        shape = shape[1:]
    return whole[len(whole) - len(shape) :] == shape
