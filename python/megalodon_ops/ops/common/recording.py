"""`record`: a call of a module as a list of kernels, which run again without Python between them."""

from __future__ import annotations

import contextlib
import functools
import math
import sys
import threading
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from ... import _C
from .checks import check_tensor, describe
from .definition import check_runs_now, observer

aten = torch.ops.aten
_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_EMPTY = {aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default, aten.empty_strided.default,
          aten.new_empty_strided.default}  # fmt: skip
_HOST_READS = (Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__, Tensor.data_ptr)
_IN_PLACE = {"timestep_norm_fwd", "cema_fwd", "chunked_attention_state", "copy_memory"}
"""kernels that may write a new state over the old one"""
_PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default}
"""called in Python without a warning: the call is short beside the product"""
_OPERATIONS = {
    getattr(aten, name + suffix).Tensor: sign
    for name, sign in {"add": "+", "sub": "-", "mul": "*", "div": "/"}.items()
    for suffix in ("", "_")
}
_COPIES = {aten.clone.default, aten._to_copy.default}
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_COPIED = (*_FLOATS, torch.float64, torch.int64, torch.complex64, torch.complex128)
_TORCH_GRAIN = 32768
"""elements of a result from which on torch copies and samples it on OpenMP's threads, which then still spin in the next step"""
_MINUS_ZERO = -0.0  # neutral in sums; +0.0 would change -0.0


def _tensors(*values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _address(tensor: Tensor) -> int:
    """Address of the tensor's storage; 0 if it has none, as an empty tensor or one that is made of others."""
    return 0 if is_traceable_wrapper_subclass(tensor) else tensor.untyped_storage().data_ptr()


def _has_no_memory(value: Any) -> bool:
    """Return True for a value in Python, and for a tensor whose memory is in others."""
    return (_address(value) == 0 and value.numel() > 0) if isinstance(value, Tensor) else value is not None


class _Call:
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
        self.calls: list[_Call] = []
        self.storages: dict[int, torch.UntypedStorage] = {}
        self.new: set[int] = set()
        """addresses of the storages that the step allocated"""
        self._is_paused = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler, 2 s

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        has_compiled = "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance")  # new in torch 2.6
        eager = torch.compiler.set_stance("force_eager") if has_compiled else contextlib.nullcontext()
        with eager, _HostReads(self), self:  # compiled programs would not be seen
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
        given = self.keep(_tensors(args, kwargs))
        results = tree_map_only(Tensor, lambda t: t if _address(t) in given else t.clone(), results)
        self._add(function, args, kwargs, results, given)
        return results

    def _note_launch(self, name: str, args: tuple) -> None:
        num_results = len(getattr(_C, name).__doc__.partition("->")[2].split())
        call = _Call(name, args, {}, [])
        call.written = self.keep(_tensors(args[-num_results:]))
        call.touched = self.keep(_tensors(args))
        self.calls.append(call)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if self._is_paused:
            return func(*args, **kwargs)
        if func.namespace == "megalodon_ops":
            with self:  # records what the op's Python calls
                return func.redispatch(_CPU, *args, **kwargs)
        results = func(*args, **kwargs)
        values = dict(zip((argument.name for argument in func._schema.arguments), args)) | kwargs
        is_written = {a.name: a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments}
        changed = [value for name, value in values.items() if is_written[name]]
        self._add(func, args, kwargs, results, self.keep(_tensors(changed)))
        return results

    def note_host_read(self, function: Callable, args: tuple) -> None:
        if not self._is_paused:
            self._add(function, args, {}, 0, set())

    def _add(self, function: Callable, args: tuple, kwargs: dict, results: Any, written: set[int]) -> None:
        inputs, known = self.keep(_tensors(args, kwargs)), set(self.storages)
        outputs = self.keep(_tensors(results))
        self.new |= outputs - known
        if function in _EMPTY:
            return
        fresh = outputs - inputs
        call = _Call(function, args, kwargs, [(i, t) for i, t in enumerate(_tensors(results)) if _address(t) in fresh])
        call.written, call.touched = written | fresh, inputs | outputs
        call.leaves_tensors = any(map(_has_no_memory, tree_leaves(results)))
        if call.written or call.leaves_tensors:  # else results are views
            self.calls.append(call)

    def keep(self, tensors: list[Tensor]) -> set[int]:
        """Keep the tensors' memory; return the addresses of their storages."""
        storages = {a: tensor.untyped_storage() for tensor in tensors if (a := _address(tensor))}
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


def _as_kernel(call: _Call) -> tuple | None:
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
    operands = [x, y, *_tensors(others)]
    if not all(isinstance(t, Tensor) and t.is_contiguous() and not t.is_neg() and not t.is_conj() for t in operands):
        return None
    if function is aten.embedding.default:
        has_kernel = x.dim() == 2 and x.dtype in _COPIED and args[1].dtype == torch.int64
        return ("embedding_rows", x, args[1], y) if has_kernel else None
    if (function is aten.copy_.default or function in _COPIES) and x.shape == y.shape:
        if x.dtype == y.dtype:
            return ("copy_memory", x, y) if x.dtype in _COPIED else None
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


class Step:
    """A recorded call, which :func:`record` returns; see there.

    Attributes:
        state: the state after the last call, in place; a copy of it is the caller's.
    """

    def __init__(
        self, op: str, function: Callable, inputs: tuple[Tensor, ...], state: Any = None, *,
        recorder: Recorder | None = None, checks_host_reads: bool = True, warns: bool = True,
    ) -> None:  # fmt: skip
        """Call function(*inputs[, state=state]) once; `first` is its result, and `state` is updated in place.

        recorder: the one whose :meth:`Recorder.call` the function uses. checks_host_reads: False: the caller replays the
        step only where values that the recorded call read in Python lead to the same calls.
        """
        self._op, self._lock, self._is_whole, self.state = op, threading.RLock(), True, state
        recorder = recorder or Recorder()
        with torch.inference_mode(False), torch.no_grad():
            self._inputs = [x.clone(memory_format=torch.contiguous_format) for x in inputs]
            before = _tensors(state)
            recorder.keep([*self._inputs, *before])
            with recorder.recording():
                results = function(*self._inputs) if state is None else function(*self._inputs, state=state)
            results, after = (results, None) if state is None else self._split(results)
            self._leaves, self._structure = tree_flatten(results)
            changes = [(old, new) for old, new in zip(before, _tensors(after)) if old is not new]
            self._build(recorder, changes, checks_host_reads, warns)
            self.first = tree_map_only(Tensor, torch.clone, results)
            for old, new in [(old, new.clone()) for old, new in changes]:
                old.copy_(new)

    def __call__(self, *inputs: Tensor) -> Any:
        """Results of the module for these inputs, which have the shapes and dtypes of the recorded ones."""
        same = len(inputs) == len(self._inputs)
        for buffer, x in zip(self._inputs, inputs):
            same = same and isinstance(x, Tensor) and x.dtype == buffer.dtype and x.shape == buffer.shape
        if not same:
            raise ValueError(
                f"{self._op}: `inputs` must have the recorded shapes and dtypes {_kinds_text(self._inputs)}, got "
                f"{_kinds_text(inputs)}; record another step for them."
            )
        with self._lock, torch.no_grad():
            if not self._is_whole:
                raise RuntimeError(
                    f"{self._op}: the state must be whole, but a call ended in an error; record another step."
                )
            for buffer, x in zip(self._inputs, inputs):
                buffer.copy_(x)
            self._is_whole = False
            if self._calls_python and torch.is_autocast_enabled("cpu"):
                with torch.autocast("cpu", enabled=False):
                    self._recording.run(self._own_threads)
            else:
                self._recording.run(self._own_threads)
            self._is_whole = True
            leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
            return tree_unflatten(leaves, self._structure)

    def __reduce_ex__(self, protocol: int) -> NoReturn:
        raise TypeError(
            f"{self._op}: expected no copy and no pickling of a step, as it holds the memory of its kernels; record another "
            "one; its `state` can be copied and saved."
        )

    def _split(self, results: Any) -> tuple[Any, Any]:
        """Split the function's results into those of the step and the new state."""
        if isinstance(results, tuple) and len(results) == 2:
            kinds = [[(t.shape, t.dtype) for t in _tensors(state)] for state in (self.state, results[1])]
            if kinds[0] == kinds[1]:
                return results
        raise ValueError(
            f"{self._op}: `module` must return a tuple of its results and a state of the shapes and dtypes of `state`, got "
            f"{describe(results)}."
        )

    def _build(
        self, recorder: Recorder, changes: list[tuple[Tensor, Tensor]], checks_host_reads: bool, warns: bool
    ) -> None:
        """Make the recording of the calls that depend on inputs, on the state or on other memory that a call writes."""
        varying = {_address(tensor) for tensor in (*self._inputs, *_tensors(self.state))} - {0}
        calls = self._needed(recorder, varying, checks_host_reads)
        for call in calls:
            if not isinstance(call.function, str) and (kernel := _as_kernel(call)):
                (call.function, *call.args), call.kwargs, call.results = kernel, {}, []
        places = _places(recorder, calls, changes, _tensors(self._leaves), varying)

        def placed(tensor: Tensor) -> Tensor:
            storage = places.get(_address(tensor))
            if storage is None:
                return tensor
            moved = tensor.new_empty(0).set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())
            return moved.conj() if tensor.is_conj() else moved

        self._recording, self._memory, in_python = _C.Recording(), [], []
        self._calls_python = False
        self._own_threads = sum(tensor.numel() for tensor in _tensors(self._leaves)) < _TORCH_GRAIN
        for call in calls:
            args, kwargs, results = tree_map_only(Tensor, placed, (tuple(call.args), call.kwargs, call.results))
            self._memory += [tensor.untyped_storage() for tensor in _tensors(args) if _address(tensor)]
            if not isinstance(call.function, str):
                self._calls_python = True
                self._recording.keep_call(_replay_of(self._op, call, args, kwargs, results))
                in_python += [] if call.function in _PRODUCTS else [call.name]
            elif call.function != "copy_memory" or args[0].data_ptr() != args[1].data_ptr():
                self._recording.keep(getattr(_C, call.function), *args)
        staged = [(old, new, torch.empty_like(old)) for old, new in changes if _address(new) not in places]
        for x, y in [(new, stage) for _, new, stage in staged] + [(stage, old) for old, _, stage in staged]:
            if _is_copied(x, y):
                self._recording.keep(_C.copy_memory, x, y)
            else:
                self._recording.keep_call(functools.partial(y.copy_, x))
        self._memory += [tensor.untyped_storage() for tensors in staged for tensor in tensors]
        if in_python and warns:
            names = ", ".join(f"`{name}`" for name in dict.fromkeys(in_python))
            warnings.warn(
                f"{self._op}: {len(in_python)} of {len(calls)} calls run in Python between the kernels, which takes "
                f"longer: {names}.",
                stacklevel=4,
            )

    def _needed(self, recorder: Recorder, varying: set[int], checks_host_reads: bool) -> list[_Call]:
        """Return the calls whose results are not constants; add all memory that they write to `varying`."""
        varying |= set().union(*(call.written for call in recorder.calls)) - recorder.new
        changed = True
        while changed:
            changed = False
            for call in recorder.calls:
                if not call.is_needed and (call.is_random or not varying.isdisjoint(call.touched)):
                    call.is_needed = changed = True
                    varying |= call.written
        needed = [call for call in recorder.calls if call.is_needed]
        reads = [call.name for call in needed if call.leaves_tensors]
        if reads and checks_host_reads:
            raise NotImplementedError(
                f"{self._op}: a step must compute with plain tensors alone, got `{reads[0]}`, which reads values in Python or "
                "returns a tensor that is made of others; torch.where chooses between values of tensors."
            )
        return [call for call in needed if not call.leaves_tensors]


def _places(
    recorder: Recorder, calls: list[_Call], changes: list[tuple[Tensor, Tensor]], kept: list[Tensor], varying: set[int]
) -> dict[int, torch.UntypedStorage]:
    """Return the storages that replace those of the recorded call, by address.

    A new state replaces the old one if no later call reads that. Temporary tensors share memory, which then stays in
    the cache.
    """
    first, last, places = {}, {}, {}
    for i, call in enumerate(calls):
        for address in call.touched:
            first.setdefault(address, i)
            last[address] = i
    stays = {_address(tensor) for tensor in (*kept, *(new for _, new in changes))}
    results = {_address(tensor) for tensor in kept}
    for old, new in changes:
        source, target = _address(new), _address(old)
        if source not in recorder.new or source not in first or {source} & (results | places.keys()) or target in stays:
            continue
        writer, end = calls[first[source]], last.get(target, -1)
        in_place = end < first[source] or (end == first[source] and writer.function in _IN_PLACE)
        if in_place and source in writer.written and _is_whole(new) and _is_whole(old):
            places[source] = recorder.storages[target]
    free = defaultdict(list)
    for i, call in enumerate(calls):
        temporary = [a for a in sorted(call.touched) if a in recorder.new and a in varying and a not in stays]
        sizes = {address: recorder.storages[address].nbytes() for address in temporary}
        for address, size in sizes.items():
            if first[address] == i and free[size]:
                places[address] = free[size].pop()
        for address, size in sizes.items():
            if last[address] == i:
                free[size].append(places.get(address, recorder.storages[address]))
    return places


def _is_whole(tensor: Tensor) -> bool:
    """Return True if the tensor is contiguous and has its storage for itself."""
    return tensor.is_contiguous() and tensor.nbytes == tensor.untyped_storage().nbytes()


def _is_copied(x: Tensor, y: Tensor) -> bool:
    """Return True if y.copy_(x) copies memory."""
    contiguous = all(t.is_contiguous() and not t.is_conj() and not t.is_neg() for t in (x, y))
    return contiguous and x.dtype == y.dtype and x.shape == y.shape and x.dtype in _COPIED


def _replay_of(
    op: str, call: _Call, args: tuple, kwargs: dict, results: list[tuple[int, Tensor]]
) -> Callable[[], None]:
    """Return a function that calls the recorded one and copies its new tensors to the recorded ones."""
    function, name = call.function, call.name

    def replay() -> None:
        found = function(*args, **kwargs)
        found = [found] if isinstance(found, Tensor) else _tensors(found)
        for place, old in results:
            new = found[place]
            if new.shape != old.shape:
                raise RuntimeError(
                    f"{op}: `{name}` must return a tensor of the recorded shape {tuple(old.shape)}, got {tuple(new.shape)}."
                )
            old.copy_(new)

    return replay


def _kinds_text(tensors: Any) -> str:
    return ", ".join(f"{t.dtype} {tuple(t.shape)}" if isinstance(t, Tensor) else describe(t) for t in tensors) or "none"


def record(module: Callable, *example: Tensor, state: Any = None) -> Step:
    """Record a call of a module on the CPU, as a CUDA graph does on a GPU; the step replays it without Python.

    A call of a small network is mostly Python: two blocks of width 64 take twenty times as long by their layers as by a
    step. A replay runs the recorded kernels, in order, with the same bits. It computes without gradients.

    The kernels of this package, and of torch sums, differences, products and quotients of tensors, copies and
    embeddings, run without Python. Other functions of torch are called in Python between two kernels; a warning names
    them, except for matrix products, such as those of `torch.nn.Linear`. Nothing is left out: a module that reads values
    of tensors in Python, by `item` or `if`, is refused.

    Args:
        module: called as module(*example), or module(*example, state=state); `functools.partial` sets other arguments.
        example: tensors on the CPU. Calls of the step take others of the same shapes and dtypes.
        state: tensors, in tuples or lists, that the module reads. It returns a tuple of its results and the state after
            them, which has the same tensors. The step copies the state, and each call continues where the last one
            ended. Buffers that the module writes in place continue, too; the recorded call is one step for them.

    Returns:
        A step: `step(*inputs)` returns the module's results as new tensors, `step.state` holds the state. Calls from
        several threads wait for each other. It cannot be copied or pickled.

    Raises:
        NotImplementedError: the module reads values in Python. ValueError: it returns another state, sets attributes
        instead of writing their tensors, or a tensor is not on the CPU. TypeError: an argument has a wrong type.

    The step keeps the addresses of parameters, so it sees values that are written there later, except where the module
    computes something from parameters alone, such as CEMA's coefficients: that is computed once. Record another step
    after parameters move, or modules or hooks change: hooks run once, in the recording.

    Example:
        >>> import torch, megalodon_ops as mo
        >>> class Smooth(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.cema, self.norm = mo.ComplexEMA(8, ndim=2), mo.TimestepNorm(8, num_groups=1)
        ...     def forward(self, x, state=(None, None)):
        ...         y, ema = self.cema(x, state=state[0], return_state=True)
        ...         y, norm = self.norm(x + y, state=state[1], return_state=True)
        ...         return y, (ema, norm)
        >>> module, x = Smooth(), torch.randn(1, 20, 8)
        >>> y, state = module(x[:, :10])
        >>> step = mo.record(module, x[:, 10:11], state=state)
        >>> last = [step(x[:, i : i + 1]) for i in range(10, 20)][-1]
        >>> torch.allclose(last, module(x)[0][:, -1:], atol=1e-6)
        True
    """
    check_runs_now("record", "call the module there")
    if not callable(module):
        raise TypeError(f"record: `module` must be a module or a function, got {describe(module)}.")
    for x in example:
        check_tensor("record", "example", x)
    if state is not None and not _tensors(state):
        raise TypeError(f"record: `state` must hold tensors, or be None, got {describe(state)}.")
    for name, tensors in ("example", example), ("state", _tensors(state)):
        for x in tensors:
            if not x.is_cpu:
                raise ValueError(f"record: `{name}` must be on the CPU, got a tensor on {x.device}; move it there.")
    before, copied = _attributes(module), tree_map_only(Tensor, _contiguous_copy, state)
    step = Step("record", module, example, copied)
    step.first = None
    for name, value in _attributes(module).items():
        if before.get(name) is not value:
            raise ValueError(f"record: `module` must write its tensors in place, by copy_(), got another `{name}`.")
    with torch.no_grad():
        for own, given in zip(_tensors(copied), _tensors(state)):
            own.copy_(given)
    return step


def _contiguous_copy(tensor: Tensor) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return tensor.detach().clone(memory_format=torch.contiguous_format)


def _attributes(module: Any) -> dict[str, Any]:
    """Return the tensors and numbers that are attributes of the module and its submodules, by name."""
    modules = module.named_modules() if isinstance(module, nn.Module) else ()
    return {
        f"{name}.{key}".removeprefix("."): value
        for name, part in modules
        for key, value in (*part._buffers.items(), *vars(part).items())
        if isinstance(value, (Tensor, bool, int, float))
    }
