"""Arrays of other libraries as arguments of the ops, through DLPack: NumPy, CuPy, every type with `__dlpack__`.

If its first argument is an array, an op reads all its arrays in place; an array that is not C-contiguous is copied. The
op returns arrays of the first argument's library, states included, or torch tensors if that library has no
`from_dlpack`.

Arrays carry no gradients: a call on arrays runs without gradients and outside torch.autocast. A call takes either
arrays or tensors, so that no gradient is lost unnoticed. With `inplace_state` the op writes to the caller's arrays.

Streams follow the protocol; the host never waits. Each array's producer makes torch's current stream wait for the work
pending on the array; the results make their consumer's current stream wait for the op. If the results are torch
tensors, no other stream waits: keep the arrays until torch's stream is done with them.

Example:
    >>> import numpy as np, megalodon_ops as mo
    >>> x = np.array([[[1.0, 3.0], [5.0, 7.0]]], dtype=np.float32)
    >>> y, state = mo.timestep_norm(x, *np.zeros((2, 2), np.float32), num_groups=1, return_state=True)
    >>> type(y).__name__, state.mean
    ('ndarray', array([[4.]], dtype=float32))
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy
import torch
from torch import Tensor

from .checks import check_tensor, describe

_ARRAY_WORDS = {  # patterns in errors about tensors, and their replacements
    r"\.to\(torch\.(\w+)\)": r'.astype("\1")',
    r"torch\.(?=(float|bfloat|int|complex)\d)": "",
    "a torch tensor, got": "a torch tensor or an array with __dlpack__, got",
    "torch.from_dlpack does of an array": "numpy.asarray does",
}


def call_with_arrays(op: Callable[..., Any], /, **arguments: Any) -> Any:
    """Call `op` on tensors over the arrays' memory; return its results as arrays of the first array's library."""
    first, array = next(iter(arguments.items()))
    arrays: dict[int, Any] = {}  # keys: ids of the tensors over their memory

    def to_tensor(name: str, value: Any) -> Any:
        label = f"{op.__name__}: `{name}`"
        if isinstance(value, Tensor):
            raise TypeError(
                f"{label} must be an array, as `{first}` is ({describe(array)}), got a torch tensor; "
                f"pass torch.from_dlpack({first}) to work on tensors."
            )
        if not hasattr(type(value), "__dlpack__"):
            return value  # a number, None, or something that the op refuses
        tensor = _tensor_over(value, label, write="." in name and arguments.get("inplace_state", False))
        arrays[id(tensor)] = value
        return tensor

    def to_array(_: str, tensor: Tensor) -> Any:
        return arrays[id(tensor)] if id(tensor) in arrays else _array_over(tensor, kind=array)

    try:
        if not hasattr(type(array), "__dlpack__"):
            check_tensor(op.__name__, first, array)
        tensors = {name: _convert(to_tensor, name, value) for name, value in arguments.items()}
        with torch.no_grad(), torch.autocast(tensors[first].device.type, enabled=False):
            results = op(**tensors)
    except (TypeError, ValueError) as error:
        message = str(error)
        for pattern, words in _ARRAY_WORDS.items():
            message = re.sub(pattern, words, message)
        raise type(error)(message) from error.__cause__
    return _convert(to_array, "result", results)


def _convert(function: Callable[[str, Any], Any], name: str, value: Any) -> Any:
    """Return `function(name, value)`; a state or another tuple is converted field by field, as "state.k"."""
    if not isinstance(value, tuple):
        return function(name, value)
    fields = zip(getattr(value, "_fields", range(len(value))), value)
    parts = [_convert(function, f"{name}.{field}", part) for field, part in fields]
    return getattr(type(value), "_make", tuple)(parts)


def _tensor_over(array: Any, label: str, write: bool) -> Tensor:
    """Tensor over the array's memory; without `write` the array may be read-only."""
    try:
        strides = getattr(array, "strides", None)
        if isinstance(strides, tuple) and min(strides, default=0) < 0:  # torch would crash: pytorch#188023
            raise ValueError(f"its strides {strides} are negative")
        if write:
            array[:0] = array[:0]  # raises if the array cannot be written, and changes nothing
        elif isinstance(array, numpy.ndarray) and not array.flags.writeable:  # older versions of NumPy do not export it
            interface = array.__array_interface__
            interface["data"] = (interface["data"][0], False)
            array = numpy.asarray(SimpleNamespace(array=array, __array_interface__=interface))
        return torch.from_dlpack(array)
    except Exception as error:
        raise (ValueError if isinstance(error, ValueError) else TypeError)(
            f"{label} must be an array that torch can {'write' if write else 'read'} through DLPack, got "
            f"{describe(array)} of {getattr(array, 'dtype', 'some dtype')} ({error}); pass a contiguous copy in native "
            "byte order and in a dtype of the op."
        ) from error


def _array_over(tensor: Tensor, kind: Any) -> Any:
    """Array of `kind`'s library over the tensor's memory; the tensor itself if that library has no `from_dlpack`."""
    if isinstance(kind, numpy.ndarray):
        return tensor.numpy()  # writable; numpy.from_dlpack of older versions gives read-only arrays
    package = sys.modules.get(type(kind).__module__.partition(".")[0])
    namespace = kind.__array_namespace__() if hasattr(kind, "__array_namespace__") else package
    return namespace.from_dlpack(_Result(tensor)) if hasattr(namespace, "from_dlpack") else tensor


class _Result:
    """A result for another library to import. Torch reuses the result's memory only after the library's work on it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.tensor.__dlpack_device__()

    def __dlpack__(self, *, stream: int | None = None, **options: Any) -> Any:
        with torch.cuda.device_of(self.tensor):
            if self.tensor.is_cuda and stream != -1:  # with -1 the consumer orders the work itself
                stream = 1 if stream is None else stream  # the protocol's number of the default stream
                consumer = torch.cuda.default_stream() if stream == 1 else torch.cuda.ExternalStream(stream)
                self.tensor.record_stream(consumer)
            return self.tensor.__dlpack__(stream=stream, **options)
