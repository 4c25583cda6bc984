"""Arrays of other libraries as arguments of the ops, through DLPack: NumPy, CuPy, every type with `__dlpack__`.

If the first argument of an op is an array, the op reads all arrays in place, or a copy of those that are not
C-contiguous. The results are arrays of the first argument's library, or torch tensors if that library has no
`from_dlpack`. With `inplace_state`, the op writes to the arrays of the state.

A call on arrays runs without gradients and torch.autocast. It refuses tensors, whose gradients would be lost.

Streams follow DLPack's protocol; the host never waits. The library of an array makes torch's current stream wait for
the work pending on the array. The library that imports a result makes its own current stream wait for the op. If
results are torch tensors, no other stream waits: keep the arrays until torch's stream has finished with them.

Example:
    >>> import numpy as np, megalodon_ops as mo
    >>> x = np.array([[[1.0, 3.0], [5.0, 7.0]]], dtype=np.float32)
    >>> mo.timestep_norm_end_state(x, num_groups=1).mean
    array([[4.]], dtype=float32)
"""

import sys
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_map, tree_map_with_path

from .checks import check_tensor, describe


def call_with_arrays(op: Callable[..., Any], /, **arguments: Any) -> Any:
    """Call `op` on tensors that share the arrays' memory; return its results as arrays of the first array's library."""
    first, array = next(iter(arguments.items()))
    if not hasattr(type(array), "__dlpack__"):
        check_tensor(op.__name__, first, array)
    arrays: dict[int, Any] = {}  # keys: ids of the tensors that share their memory

    def to_tensor(name: str, path: tuple, value: Any) -> Any:
        if not hasattr(type(value), "__dlpack__"):
            return value  # a number, None, or something that the op refuses
        write = name == "state" and arguments.get("inplace_state", False)
        try:
            if isinstance(value, Tensor):
                raise TypeError(f"a call takes either arrays or tensors, and `{first}` is an array")
            tensor = _tensor_sharing_memory(value, write)
        except Exception as error:
            kind = ValueError if isinstance(error, ValueError) else TypeError
            raise kind(
                f"{op.__name__}: `{name}{keystr(path)}` must be an array that torch can {'write' if write else 'read'} "
                f"through DLPack, got {describe(value)} of {getattr(value, 'dtype', 'some dtype')} ({error}); pass a "
                "contiguous array in a dtype of the op."
            ) from error
        arrays[id(tensor)] = value
        return tensor

    def to_array(tensor: Tensor) -> Any:
        if id(tensor) in arrays:
            return arrays[id(tensor)]
        if isinstance(array, numpy.ndarray):
            return tensor.numpy()  # writable; numpy.from_dlpack of older versions gives read-only arrays
        package = sys.modules.get(type(array).__module__.partition(".")[0])
        namespace = array.__array_namespace__() if hasattr(array, "__array_namespace__") else package
        return namespace.from_dlpack(tensor.as_subclass(_Result)) if hasattr(namespace, "from_dlpack") else tensor

    tensors = {
        name: tree_map_with_path(partial(to_tensor, name), value) if name == "state" else to_tensor(name, (), value)
        for name, value in arguments.items()
    }
    with torch.no_grad(), torch.autocast(tensors[first].device.type, enabled=False):
        return tree_map(to_array, op(**tensors))


def _tensor_sharing_memory(array: Any, write: bool) -> Tensor:
    """Return a tensor that shares the array's memory; without `write`, the array may be read-only."""
    if min(getattr(array, "strides", None) or (0,)) < 0:  # torch would crash: pytorch#188023
        raise ValueError("a stride is negative")
    if write:
        array[:0] = array[:0]  # raises if the array cannot be written, and changes nothing
    elif isinstance(array, numpy.ndarray) and not array.flags.writeable:  # older versions of NumPy do not export it
        interface = array.__array_interface__ | {"data": (array.ctypes.data, False)}
        array = numpy.asarray(SimpleNamespace(array=array, __array_interface__=interface))
    return torch.from_dlpack(array)


class _Result(Tensor):
    """Result that another library imports. Torch reuses its memory only after that library's work on it."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __dlpack__(self, *, stream: int | None = None, **options: Any) -> Any:
        with torch.cuda.device_of(self):
            if self.is_cuda and stream != -1:  # with -1 the consumer orders the work itself
                stream = stream or 1  # the protocol's number of the default stream
                self.record_stream(torch.cuda.default_stream() if stream == 1 else torch.cuda.ExternalStream(stream))
            return super().__dlpack__(stream=stream, **options)
