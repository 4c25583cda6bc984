"""Memory of tensors on the CPU: how much there is, and what becomes of memory that a process has freed."""

from __future__ import annotations

import ctypes
import mmap
import os
import resource

import torch
from torch import Tensor, nn

from .checks import described

_HUGE_PAGE = 2 << 20
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # mallopt(3)


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
    """Whether no element is NaN or infinite; one pass over memory, while `isfinite` would write an array first."""
    return not tensor.numel() or all(bool(bound.isfinite()) for bound in torch.aminmax(tensor.detach()))


def use_huge_pages(model: nn.Module) -> bool:
    """Moves the model's large parameters on the CPU to memory that Linux may give huge pages (2 MiB).

    A decoded token reads every weight once, and looking up the addresses of small pages takes a share of that time: on 2
    cores of an Intel Xeon a token of 200M parameters takes 26 ms, and 32 to 35 in small pages. Call this function after the weights are loaded
    and before a :class:`Decoder` is made. Parameters stay the objects that they are; their memory is new and cannot be
    resized, as FSDP wants. `python -m megalodon_ops generate` calls this function; importing the package does not.

    Returns:
        False where the system has no huge pages to ask for; then nothing has changed.

    Example:
        >>> import megalodon_ops as mo
        >>> config = mo.MegalodonConfig(num_layers=1, model_dim=512, z_dim=64, ffn_hidden_dim=512, vocab_size=256)
        >>> model = mo.Megalodon(config)
        >>> moved = mo.use_huge_pages(model)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"use_huge_pages: `model` must be a torch.nn.Module, got {described(model)}.")
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return False
    for parameter in model.parameters():
        if parameter.is_cpu and type(parameter) is nn.Parameter and parameter.nbytes >= _HUGE_PAGE:
            try:
                memory = _huge_pages(parameter.nbytes)
            except OSError:  # a kernel without huge pages
                return False
            parameter.data = memory.view(parameter.dtype).view(parameter.shape).copy_(parameter.detach())
    return True


def _huge_pages(size: int) -> Tensor:
    """(size,) uint8 that begins at a huge page; Linux is asked for huge pages as far as they are whole."""
    mapping = mmap.mmap(-1, size + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory = torch.frombuffer(mapping, dtype=torch.uint8)
    begin = -memory.data_ptr() % _HUGE_PAGE
    mapping.madvise(mmap.MADV_HUGEPAGE, begin, size // _HUGE_PAGE * _HUGE_PAGE)
    return memory[begin : begin + size]


def keep_freed_memory() -> bool:
    """Makes the C library of a long-running program keep freed CPU memory of any size for the next tensors.

    By default glibc gives blocks of 32 MiB and more, and free memory at the end of its heap, back to the system, which
    clears every page anew for the next tensor: a training step of 25M parameters and 8,192 tokens takes a tenth less
    time if no page is cleared. The process's peak memory stays about the same, but the process holds on to that memory.
    No tensor that exists moves, so call this function before you load a model. Commands of `python -m megalodon_ops`
    call this function; importing the package does not.

    Returns:
        False where there is no glibc, and so no `mallopt`; then nothing has changed.

    Example:
        >>> import megalodon_ops
        >>> kept = megalodon_ops.keep_freed_memory()
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    # One arena: the others, of further threads and of a thread that an allocation has failed in, hold no 64 MiB.
    return all([mallopt(_M_MMAP_MAX, 0), mallopt(_M_TRIM_THRESHOLD, -1), mallopt(_M_ARENA_MAX, 1)])
