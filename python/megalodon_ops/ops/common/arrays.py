"""Arrays of other libraries as arguments of the ops, through DLPack: NumPy's, CuPy's, any that has `__dlpack__`.

An op whose first argument is an array reads all its arrays where they lie; one that is not C-contiguous is copied. The op
returns arrays of the first argument's kind, states included. A kind is known by the `from_dlpack` of its namespace; a call
on arrays of a kind without it returns torch tensors.

Arrays carry no gradient: a call on arrays runs without gradients and outside torch.autocast. A call takes either arrays
or tensors, so that no gradient is lost unnoticed. With `inplace_state` the op writes to the caller's arrays.

Streams follow the protocol, and the host never waits. Each array's producer makes torch's current stream wait for what
is pending on the array; then the results make their consumer's current stream wait for the op. Where the results are
torch tensors, no other stream is made to wait: keep the arrays until torch's stream is done with them.

Example:
    >>> import numpy as np, megalodon_ops as mo
    >>> x = np.array([[[1.0, 3.0], [5.0, 7.0]]], dtype=np.float32)
    >>> y, state = mo.timestep_norm(x, *np.zeros((2, 2), np.float32), num_groups=1, return_state=True)
    >>> type(y).__name__, state.mean
    ('ndarray', array([[4.]], dtype=float32))
"""

from __future__ import annotations

import functools
import re
import sys
import typing
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .checks import check_optional_tensor, check_tensor, described


def call_with_arrays(op: Callable[..., Any], /, **arguments: Any) -> Any:
    """Calls `op` with arrays, which are lent to it as tensors, and gives its results back as arrays.

    Raises:
        TypeError: arrays and tensors are mixed, or DLPack cannot pass an array on. ValueError: an array has negative
        strides, or is to be written to and cannot.
    """
    first, array = next(iter(arguments.items()))
    tensors_only = isinstance(array, Tensor)
    lenders: dict[int, Any] = {}

    def lend(name: str, value: Any, *, write: bool = False) -> Tensor:
        where = f"{op.__name__}: `{name}`"
        if tensors_only and not isinstance(value, Tensor):
            check_tensor(op.__name__, name, value)
        if not tensors_only and isinstance(value, Tensor):
            raise TypeError(
                f"{where} must be an array, as `{first}` is ({described(array)}), got a torch tensor; "
                f"pass torch.from_dlpack({first}) to work on tensors."
            )
        tensor = value if tensors_only else _as_tensor(where, value, write)
        lenders[id(tensor)] = value
        return tensor

    tensors = dict(arguments)
    for name, types in _tensor_arguments(op).items():
        value = arguments[name]
        if value is None and type(None) in types:
            continue
        if isinstance(value, tuple) and any(issubclass(kind, tuple) for kind in types):
            write = arguments.get("inplace_state", False)
            fields = zip(getattr(value, "_fields", range(len(value))), value)
            tensors[name] = _rebuilt(
                value, [None if part is None else lend(f"{name}.{field}", part, write=write) for field, part in fields]
            )
        else:
            tensors[name] = lend(name, value)

    array_from = _maker(array)

    def give_back(result: Any) -> Any:
        if isinstance(result, tuple):
            return _rebuilt(result, [give_back(part) for part in result])
        return lenders[id(result)] if id(result) in lenders else array_from(result)

    device = tensors[first].device.type
    lowered = device != "meta" and torch.is_autocast_enabled(device)
    with torch.no_grad(), torch.autocast(device, enabled=False) if lowered else nullcontext():
        try:
            return give_back(op(**tensors))
        except (TypeError, ValueError) as error:
            raise type(error)(_in_words_of_arrays(str(error))) from None


@functools.cache
def _tensor_arguments(op: Callable[..., Any]) -> dict[str, tuple[type, ...]]:
    """The arguments of a public function that take tensors or states of tensors, with the types that each may have."""
    hints = typing.get_type_hints(op)
    types = {name: typing.get_args(hint) or (hint,) for name, hint in hints.items() if name != "return"}
    return {name: kinds for name, kinds in types.items() if any(issubclass(kind, (Tensor, tuple)) for kind in kinds)}


def refuse_arguments(op: Any, args: tuple[Any, ...]) -> None:
    """Raises a TypeError if an argument of the registered `op` is no tensor, though the op takes one there."""
    public = op._schema.name.split("::")[1].removesuffix("_fwd")
    for argument, value in zip(op._schema.arguments, args):
        if str(argument.type) == "Optional[Tensor]":
            check_optional_tensor(public, argument.name, value)
        elif str(argument.type) == "Tensor":
            check_tensor(public, argument.name, value)


def _in_words_of_arrays(message: str) -> str:
    """The message of an op with NumPy's names of dtypes and of conversions in place of torch's."""
    message = re.sub(r"\.to\(torch\.(\w+)\)", r'.astype("\1")', message)
    return re.sub(r"torch\.(?=(float|bfloat|int|complex)\d)", "", message)


def _as_tensor(where: str, array: Any, write: bool) -> Tensor:
    """A tensor over the array's memory."""
    if isinstance(array, type) or not hasattr(array, "__dlpack__"):
        raise TypeError(
            f"{where} must be a torch tensor or an array with __dlpack__, got {described(array)}; "
            "make it an array, as with numpy.asarray."
        )
    if write:
        try:
            array[:0, ...] = array[:0, ...]  # raises if the array cannot be written, and changes nothing
        except Exception as error:
            raise ValueError(
                f"{where} must be writable for `inplace_state`, got a {described(array)} that is not ({error}); "
                "pass a copy."
            ) from error
    strides = getattr(array, "strides", None)
    if isinstance(strides, tuple) and min(strides, default=0) < 0:  # torch would end the process: pytorch#188023
        raise ValueError(f"{where} must not have negative strides, got {strides}; pass a contiguous copy.")
    try:
        if _is_numpy(array) and not array.flags.writeable:
            array = _unlocked(array)  # the op only reads the array
        return torch.from_dlpack(array)
    except Exception as error:
        got = f"{described(array)} of {getattr(array, 'dtype', 'some dtype')}"
        raise TypeError(
            f"{where} must be an array that DLPack can pass on to torch, got {got} ({error}); "
            "pass a contiguous copy in native byte order and in a dtype of the op."
        ) from error


def _maker(array: Any) -> Callable[[Tensor], Any]:
    """The function that makes an array of the kind of `array` over a tensor's memory."""
    if _is_numpy(array):
        return Tensor.numpy  # writable, where older versions of numpy.from_dlpack give read-only arrays
    if hasattr(array, "__array_namespace__"):
        namespace = array.__array_namespace__()
    else:
        namespace = sys.modules.get(type(array).__module__.partition(".")[0])
    from_dlpack = getattr(namespace, "from_dlpack", None)
    return (lambda tensor: tensor) if from_dlpack is None else (lambda tensor: from_dlpack(_Result(tensor)))


class _Result:
    """A result for another library to import. Torch reuses the result's memory only after the library's work on it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.tensor.__dlpack_device__()

    def __dlpack__(self, *, stream: int | None = None, **options: Any) -> Any:
        if not self.tensor.is_cuda:
            return self.tensor.__dlpack__(**options)
        stream = 1 if stream is None else stream  # 1 is the protocol's number of the default stream
        with torch.cuda.device(self.tensor.device):
            capsule = self.tensor.__dlpack__(stream=stream, **options)
            if stream != -1:  # with -1 the consumer orders the work itself
                consumer = torch.cuda.default_stream() if stream == 1 else torch.cuda.ExternalStream(stream)
                self.tensor.record_stream(consumer)
        return capsule


def _unlocked(array: Any) -> Any:
    """A writable view of a read-only NumPy array, which older versions of NumPy or torch would not exchange."""
    interface = array.__array_interface__
    address, _ = interface["data"]
    holder = SimpleNamespace(array=array, __array_interface__=interface | {"data": (address, False)})
    return sys.modules["numpy"].asarray(holder)


def _is_numpy(array: Any) -> bool:
    numpy = sys.modules.get("numpy")  # NumPy is not imported here: the package works without it
    return numpy is not None and isinstance(array, numpy.ndarray)


def _rebuilt(value: tuple, parts: list[Any]) -> Any:
    """A tuple of the parts, of the class of `value` if that is a named tuple's."""
    return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
