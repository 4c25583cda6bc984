"""Memory of tensors on the CPU: where the ops' large outputs lie, and what becomes of what a process has freed."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import resource
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _C

_POOLED = 1 << 20  # bytes from which an output comes from the pool
_FEWEST_POOLED = _POOLED // 16  # elements, if they are complex128
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # mallopt(3)
OWN_TYPES = (Tensor, torch.nn.Parameter)  # torch's; others are left to it
_DLPACK_TYPES = {
    torch.float32: (2, 32), torch.float64: (2, 64), torch.float16: (2, 16), torch.bfloat16: (4, 16),
    torch.complex64: (5, 64), torch.complex128: (5, 128),
}  # fmt: skip


def empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised, contiguous tensor on the device of another and, unless given, of its dtype.

    On the CPU, one of 1 MiB or more lies in memory that an earlier one has left, if there is some (cpp/common/memory_pool.h).
    Its storage cannot be resized.
    """
    kind = like.dtype if dtype is None else dtype
    if _is_pooled(like, shape, kind):
        return torch.from_dlpack(_C.take_memory(shape, *_DLPACK_TYPES[kind]))
    return like.new_empty(shape, dtype=dtype)


def _is_pooled(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> bool:
    if type(like) not in OWN_TYPES or not like.is_cpu or math.prod(shape) * dtype.itemsize < _POOLED:
        return False
    return dtype in _DLPACK_TYPES and not torch.are_deterministic_algorithms_enabled()  # which fill what is empty


def empty_like(x: Tensor) -> Tensor:
    """The same with the shape and dtype of x."""
    if type(x) in OWN_TYPES and x.numel() >= _FEWEST_POOLED:
        return empty(x, x.shape)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def release_memory() -> None:
    """Gives the memory that large outputs of ops have left on the CPU back to the system.

    The package keeps it for the next ones, as fresh memory takes longer to clear than many a kernel to write: up to as
    much as they ever took at once, and up to half of the machine's memory or of the control group's. All but 128 MiB of it
    Linux takes back on its own when memory is short; until then it counts as this process's. Under a limit on addresses
    or data (`ulimit -v`, `ulimit -d`), where tensors of torch's would fail for want of what is kept, that is at most an
    eighth of what the limit left free when a tensor was last freed. Call this once a large model has been cast or moved
    away, or a limit was lowered.

    Example:
        >>> import torch, megalodon_ops as mo
        >>> y = mo.timestep_norm(torch.randn(1, 4096, 256), *torch.zeros(2, 256), num_groups=8)
        >>> del y
        >>> mo.release_memory()
    """
    _C.release_memory()


def machine_memory() -> int:
    """Bytes of memory that this process can ever have: the machine's or, if less, its control group's or its limit's."""
    limits = [os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE, resource.getrlimit(resource.RLIMIT_AS)[0]]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # of version 2 of control groups, and of version 1
        try:
            with open(f"/sys/fs/cgroup/{name}") as file:
                limits.append(int(file.read()))
        except (OSError, ValueError):  # no control groups of this version, or "max"
            pass
    return min(limit for limit in limits if limit != resource.RLIM_INFINITY)


def check_fits(size: int, what: str) -> None:
    """Raises a ValueError where `size` bytes are more than :func:`machine_memory`, before anybody allocates them."""
    if size > (limit := machine_memory()):
        raise ValueError(f"{what} takes {size / 2**30:,.1f} GiB of memory, and there are {limit / 2**30:,.1f} here")


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite; one pass over memory, where `isfinite` writes an array first."""
    return not tensor.numel() or all(bool(bound.isfinite()) for bound in torch.aminmax(tensor.detach()))


def keep_freed_memory() -> bool:
    """Makes the C library keep freed CPU memory of any size for the next tensors. For long programs.

    By default glibc gives blocks of 32 MiB and more, and free memory at the end of its heap, back to the system, which
    clears every page anew for the next tensor; large outputs of the ops never need that (:func:`release_memory`). The
    process's peak stays about the same, but the process holds on to it. No tensor that exists moves, so call this before
    you load a model. Commands of `python -m megalodon_ops` do; importing the package does not.

    Returns:
        False where there is no glibc, whose `mallopt` this is; then nothing has changed.

    Example:
        >>> import megalodon_ops
        >>> kept = megalodon_ops.keep_freed_memory()
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))


_C.cap_kept_memory(machine_memory() // 2)
