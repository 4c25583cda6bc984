"""Memory that a process has freed."""

from __future__ import annotations

import ctypes

# mallopt(3)
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Makes the C library keep freed CPU memory of any size for the next tensors. For programs that train.

    By default glibc gives blocks of 32 MiB and more, and free memory at the end of its heap, back to the system, which
    clears every page anew for the next tensor. Where that is slow, a training step takes a tenth longer. The process's
    peak stays about the same, but it holds on to it. Commands of `python -m megalodon_ops` call this; importing the
    package does not.

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
