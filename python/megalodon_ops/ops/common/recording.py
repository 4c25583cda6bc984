"""`record`: a call of a module as a list of kernels, which are replayed without Python between them."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from ... import _C
from .checks import check_tensor, describe
from .definition import check_runs_now
from .recorder import PRODUCTS, Call, Recorder, address_of, tensors_in

_TORCH_GRAIN = 32768
"""Fewest elements of a result that torch copies on OpenMP's threads, which would still spin during the next replay"""


class Step:
    """A recorded call, which :func:`record` returns; see there.

    Attributes:
        state: the state after the last call. The next call overwrites it; copy it to keep it.
    """

    def __init__(self, op: str, function: Callable, inputs: tuple[Tensor, ...], state: Any = None) -> None:
        """Call function(*inputs) once, which updates the tensors of `state` in place, and record the call.

        Sets two lists of names: `host_reads`, functions by which Python read values, which a replay does not call (it
        runs the calls that followed from the recorded values); and `in_python`, functions that a replay calls in
        Python.
        """
        self._op, self._lock, self._is_whole, self.state = op, threading.RLock(), True, state
        recorder = Recorder()
        with torch.inference_mode(False), torch.no_grad():
            self._inputs = contiguous_copy(inputs)
            varying = recorder.keep([*self._inputs, *tensors_in(state)])
            with recorder.recording():
                results = function(*self._inputs)
            self._leaves, self._structure = tree_flatten(results)
            self._build(recorder, varying)

    def __call__(self, *inputs: Tensor) -> Any:
        """Return the module's results for these inputs, which must have the recorded shapes and dtypes."""
        same = len(inputs) == len(self._inputs)
        for buffer, x in zip(self._inputs, inputs):
            same = same and isinstance(x, Tensor) and x.dtype == buffer.dtype and x.shape == buffer.shape
        if not same:
            raise ValueError(
                f"{self._op}: `inputs` must have the recorded shapes and dtypes {_kinds_text(self._inputs)}, got "
                f"{_kinds_text(inputs)}; record another step for them."
            )
        autocast = torch.is_autocast_enabled("cpu")
        with self._lock, torch.no_grad():
            if not self._is_whole:
                raise RuntimeError(
                    f"{self._op}: the state must be whole, but a call ended in an error; record another step."
                )
            for buffer, x in zip(self._inputs, inputs):
                buffer.copy_(x)
            self._is_whole = False
            with torch.autocast("cpu", enabled=False) if autocast else contextlib.nullcontext():
                self._recording.run(self._own_threads)
            self._is_whole = True
            return self.results()

    def results(self) -> Any:
        """Return a copy of the last call's results, which the next call overwrites."""
        leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        return tree_unflatten(leaves, self._structure)

    def __reduce_ex__(self, protocol: int) -> NoReturn:
        raise TypeError(
            f"{self._op}: expected no copy and no pickling of a step, as it holds the memory of its kernels; record another "
            "one; its `state` can be copied and saved."
        )

    def _build(self, recorder: Recorder, varying: set[int]) -> None:
        """Build the recording of the calls that depend on `varying` memory, at first the inputs and the state."""
        calls, results = recorder.needed_calls(varying), tensors_in(self._leaves)
        self.host_reads = [call.name for call in calls if call.leaves_tensors]
        calls = [call for call in calls if not call.leaves_tensors]
        places = recorder.places(calls, varying, {address_of(tensor) for tensor in results})

        def placed(tensor: Tensor) -> Tensor:
            """Return the tensor in the memory that the recording uses for it."""
            storage = places.get(address_of(tensor))
            if storage is None:
                return tensor
            moved = tensor.new_empty(0).set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())
            return moved.conj() if tensor.is_conj() else moved

        self._recording, self._memory = _C.Recording(), []
        self._own_threads = max((tensor.numel() for tensor in results), default=0) < _TORCH_GRAIN
        self.in_python = [call.name for call in calls if callable(call.function) and call.function not in PRODUCTS]
        for call in calls:
            if callable(call.function):
                self._recording.keep_call(_replay_of(self._op, call, placed))
                continue
            args = [placed(value) if isinstance(value, Tensor) else value for value in call.args]
            if call.function != "copy_memory" or args[0].data_ptr() != args[1].data_ptr():
                self._recording.keep(getattr(_C, call.function), *args)
                self._memory.append(args)


def _replay_of(op: str, call: Call, placed: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    """Return a function that repeats a recorded call in Python and copies its new tensors to the recorded ones."""
    function, name = call.function, call.name
    args, kwargs, results = tree_map_only(Tensor, placed, (call.args, call.kwargs, call.results))

    def replay() -> None:
        new_results = function(*args, **kwargs)
        new_results = [new_results] if isinstance(new_results, Tensor) else tensors_in(new_results)
        for index, old in results:
            new = new_results[index]
            if (new.shape, new.dtype) != (old.shape, old.dtype):
                raise RuntimeError(
                    f"{op}: `{name}` must return a tensor of the recorded shape and dtype {_kinds_text([old])}, got "
                    f"{_kinds_text([new])}."
                )
            old.copy_(new)

    return replay


def _kinds_text(tensors: Any) -> str:
    return ", ".join(f"{t.dtype} {tuple(t.shape)}" if isinstance(t, Tensor) else describe(t) for t in tensors) or "none"


def record(module: Callable, *example: Tensor, state: Any = None) -> Step:
    """Record a call of a module on the CPU, as a CUDA graph does on a GPU; the step replays it without Python.

    A call of a small network spends most of its time in Python: a call of two blocks of width 64 takes twenty times as
    long as a replay. A replay runs the recorded kernels, in order, with bitwise equal results. It computes without
    gradients.

    This package's kernels, and torch's sums, differences, products, quotients, copies and embeddings of tensors, run
    without Python. Other functions of torch are called in Python between two kernels; a warning names them, except for
    matrix products, such as those of `torch.nn.Linear`. A module that reads values of tensors in Python, by `item` or
    `if`, is refused. Each replay checks lengths, offsets and positions as the ops do.

    Args:
        module: called as `module(*example)`, or `module(*example, state=state)`; `functools.partial` sets other arguments.
        example: tensors on the CPU. Calls of the step take tensors of the same shapes and dtypes.
        state: tensors, in tuples or lists, that the module reads. The module must return a tuple of its results and the
            new state, whose tensors have the same shapes and dtypes. The step copies `state`, and each call continues
            from the state after the last one. Buffers that the module writes in place keep their values between calls;
            the recorded call has updated them once.

    Returns:
        A step: `step(*inputs)` returns the module's results as new tensors; `step.state` is the state. Calls from
        several threads wait for each other. A step cannot be copied or pickled.

    Raises:
        NotImplementedError: the module reads values in Python. ValueError: the module returns a state of other shapes
        or dtypes, or sets attributes instead of writing their tensors in place; or a tensor is not on the CPU.
        TypeError: an argument has a wrong type.

    The step keeps the addresses of parameters, so it sees values that are written there later. Results that depend on
    parameters alone, such as CEMA's coefficients, are computed once, in the recording. Hooks, too, run only then.
    Record another step after parameters move to other memory, or after modules or hooks change.

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
    before, own_state = _attributes(module), contiguous_copy(state)
    step = Step("record", module if state is None else _with_state(module, own_state), example, own_state)
    if step.host_reads:
        raise NotImplementedError(
            f"record: a step must compute with plain tensors alone, got `{step.host_reads[0]}`, which reads values in Python "
            "or returns a tensor that wraps others; torch.where chooses between values of tensors."
        )
    for name, value in _attributes(module).items():
        if before.get(name) is not value:
            raise ValueError(f"record: `module` must write its tensors in place, by copy_(), got another `{name}`.")
    if step.in_python:
        names = ", ".join(f"`{name}`" for name in dict.fromkeys(step.in_python))
        warnings.warn(
            f"record: functions run in Python between the kernels, which takes longer: {names} (calls: "
            f"{len(step.in_python)}).",
            stacklevel=2,
        )
    with torch.no_grad():
        for own, given in zip(tensors_in(own_state), tensors_in(state)):
            own.copy_(given)
    return step


def _with_state(module: Callable, state: Any) -> Callable:
    """Return a function of the inputs that calls the module with `state` and writes the new state to its tensors."""
    old, memory = tensors_in(state), {address_of(tensor) for tensor in tensors_in(state)}

    def call(*inputs: Tensor) -> Any:
        results = module(*inputs, state=state)
        new = tensors_in(results[1]) if isinstance(results, tuple) and len(results) == 2 else []
        if [(t.shape, t.dtype) for t in new] != [(t.shape, t.dtype) for t in old]:
            raise ValueError(
                "record: `module` must return a tuple of its results and a state of the shapes and dtypes of `state`, got "
                f"{describe(results)}."
            )
        new = [t.clone() if address_of(t) in memory and t is not own else t for own, t in zip(old, new)]
        result = tree_map_only(Tensor, lambda t: t.clone() if address_of(t) in memory else t, results[0])
        for own, t in zip(old, new):
            own.copy_(t)
        return result

    return call


def contiguous_copy(state: Any) -> Any:
    """Return contiguous copies of the tensors of a state, which may be written in place."""
    with torch.inference_mode(False), torch.no_grad():
        return tree_map_only(Tensor, lambda t: t.detach().clone(memory_format=torch.contiguous_format), state)


def _attributes(module: Any) -> dict[str, Any]:
    """Return the tensors and numbers that are attributes of the module and its submodules, by name."""
    modules = module.named_modules() if isinstance(module, nn.Module) else ()
    return {
        f"{name}.{key}".removeprefix("."): value
        for name, part in modules
        for key, value in (*part._buffers.items(), *vars(part).items())
        if isinstance(value, (Tensor, bool, int, float))
    }
