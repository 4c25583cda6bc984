"""`record`: a call of a module as a list of kernels, which run again without Python between them."""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from ... import _C
from .checks import check_tensor, describe
from .definition import check_runs_now
from .recorder import COPIED, PRODUCTS, Call, Recorder, address_of, as_kernel, tensors_in

_IN_PLACE = {"timestep_norm_fwd", "cema_fwd", "chunked_attention_state", "copy_memory"}
"""kernels that may write a new state over the old one"""
_TORCH_GRAIN = 32768
"""Elements of a result that torch copies and samples on OpenMP's threads, which then still spin in the next step"""


@contextlib.contextmanager
def _own_threads() -> Iterator[None]:
    """Run kernels on the threads that run the recorded step, so that no others start."""
    before = _C.use_own_threads(True)
    try:
        yield
    finally:
        _C.use_own_threads(before)


class Step:
    """A recorded call, which :func:`record` returns; see there.

    Attributes:
        state: the state after the last call. The next call overwrites it; copy it to keep it.
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
            before = tensors_in(state)
            recorder.keep([*self._inputs, *before])
            with recorder.recording(checks_host_reads), _own_threads():
                results = function(*self._inputs) if state is None else function(*self._inputs, state=state)
                results, after = (results, None) if state is None else self._split(results)
                overwritten = {address_of(tensor) for tensor in before}  # by the new state, before results are copied
                results = tree_map_only(Tensor, lambda t: t.clone() if address_of(t) in overwritten else t, results)
            self._leaves, self._structure = tree_flatten(results)
            changes = [(old, new) for old, new in zip(before, tensors_in(after)) if old is not new]
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
            kinds = [[(t.shape, t.dtype) for t in tensors_in(state)] for state in (self.state, results[1])]
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
        varying = {address_of(tensor) for tensor in (*self._inputs, *tensors_in(self.state))} - {0}
        calls = self._needed(recorder, varying, checks_host_reads)
        for call in calls:
            if not isinstance(call.function, str) and (kernel := as_kernel(call)):
                (call.function, *call.args), call.kwargs, call.results = kernel, {}, []
        places = _places(recorder, calls, changes, tensors_in(self._leaves), varying)

        def placed(tensor: Tensor) -> Tensor:
            storage = places.get(address_of(tensor))
            if storage is None:
                return tensor
            moved = tensor.new_empty(0).set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())
            return moved.conj() if tensor.is_conj() else moved

        self._recording, self._memory, in_python = _C.Recording(), [], []
        self._calls_python = False
        self._own_threads = max((tensor.numel() for tensor in tensors_in(self._leaves)), default=0) < _TORCH_GRAIN
        for call in calls:
            if isinstance(call.function, str):  # its arguments are tensors and scalars
                args = [placed(value) if isinstance(value, Tensor) else value for value in call.args]
            else:
                args, kwargs, results = tree_map_only(Tensor, placed, (tuple(call.args), call.kwargs, call.results))
            self._memory += [tensor.untyped_storage() for tensor in tensors_in(*args) if address_of(tensor)]
            if not isinstance(call.function, str):
                self._calls_python = True
                self._recording.keep_call(_replay_of(self._op, call, args, kwargs, results))
                in_python += [] if call.function in PRODUCTS else [call.name]
            elif call.function != "copy_memory" or args[0].data_ptr() != args[1].data_ptr():
                self._recording.keep(getattr(_C, call.function), *args)
        staged = [(old, new, torch.empty_like(old)) for old, new in changes if address_of(new) not in places]
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

    def _needed(self, recorder: Recorder, varying: set[int], checks_host_reads: bool) -> list[Call]:
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
    recorder: Recorder, calls: list[Call], changes: list[tuple[Tensor, Tensor]], kept: list[Tensor], varying: set[int]
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
    stays = {address_of(tensor) for tensor in (*kept, *(new for _, new in changes))}
    results = {address_of(tensor) for tensor in kept}
    for old, new in changes:
        source, target = address_of(new), address_of(old)
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
    return contiguous and x.dtype == y.dtype and x.shape == y.shape and x.dtype in COPIED


def _replay_of(op: str, call: Call, args: tuple, kwargs: dict, results: list[tuple[int, Tensor]]) -> Callable[[], None]:
    """Return a function that calls the recorded one and copies its new tensors to the recorded ones."""
    function, name = call.function, call.name

    def replay() -> None:
        found = function(*args, **kwargs)
        found = [found] if isinstance(found, Tensor) else tensors_in(found)
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
    of tensors in Python, by `item` or `if`, is refused. Each replay checks lengths, offsets and positions as the ops do.

    Args:
        module: called as `module(*example)`, or `module(*example, state=state)`; `functools.partial` sets other arguments.
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
    if state is not None and not tensors_in(state):
        raise TypeError(f"record: `state` must hold tensors, or be None, got {describe(state)}.")
    for name, tensors in ("example", example), ("state", tensors_in(state)):
        for x in tensors:
            if not x.is_cpu:
                raise ValueError(
                    f"record: `{name}` must be on the CPU, got a tensor on {x.device}; move it there, or capture the call "
                    "with torch.cuda.graph on a GPU."
                )
    before, copied = _attributes(module), tree_map_only(Tensor, _contiguous_copy, state)
    step = Step("record", module, example, copied)
    step.first = None
    for name, value in _attributes(module).items():
        if before.get(name) is not value:
            raise ValueError(f"record: `module` must write its tensors in place, by copy_(), got another `{name}`.")
    with torch.no_grad():
        for own, given in zip(tensors_in(copied), tensors_in(state)):
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
