"""`Step`: a call as a list of kernels, which are replayed without Python between them."""

import contextlib
import threading
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from ... import _C
from .checks import describe
from .recorder import PRODUCTS, Call, Recorder, address_of, tensors_in

_TORCH_GRAIN = 32768
"""Fewest elements of a result that torch copies on OpenMP's threads, which would still spin during the next replay"""


class Step:
    """A recorded call: its kernels run again, without Python between them.

    Attributes:
        state: the state after the last call. The next call overwrites it; copy it to keep it.
    """

    def __init__(self, op: str, function: Callable, inputs: tuple[Tensor, ...], state: Any = None) -> None:
        """Call function(*inputs) once, which updates the tensors of `state` in place, and record the call.

        Sets two lists of names: `left_out`, functions that return values in Python, or tensors without a storage, which
        a replay does not call; and `in_python`, functions that a replay calls in Python.
        """
        self._op, self._lock, self.state = op, threading.RLock(), state
        self._is_whole = True  # False after a call that ended in an error, with a part of the new state
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
        self.left_out = [call.name for call in calls if call.leaves_tensors]
        calls = [call for call in calls if not call.leaves_tensors]
        places = recorder.places(calls, varying, {address_of(tensor) for tensor in results})

        def placed(tensor: Tensor) -> Tensor:
            """Return the tensor in the memory that the recording uses for it."""
            storage = places.get(address_of(tensor))
            if storage is None:
                return tensor
            moved = tensor.new_empty(0).set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())
            moved = torch._neg_view(moved) if tensor.is_neg() else moved
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


def contiguous_copy(state: Any) -> Any:
    """Return contiguous copies of the tensors of a state, which may be written in place."""
    with torch.inference_mode(False), torch.no_grad():
        return tree_map_only(Tensor, lambda t: t.detach().clone(memory_format=torch.contiguous_format), state)
