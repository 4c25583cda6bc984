"""What the command line sets before torch is loaded, outside of `megalodon_ops`, whose import loads torch."""

from __future__ import annotations

import os
import runpy
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SPIN_COUNT = 3_000
"""How often a thread that waits for another one checks before it sleeps"""


def run() -> None:
    """Run `python -m megalodon_ops`, as the script `megalodon-ops` does."""
    prepare()
    runpy.run_module("megalodon_ops", run_name="__main__", alter_sys=True)


def prepare() -> None:
    """Set how OpenMP's threads wait, before torch loads OpenMP, which reads it once; let Ctrl-C end the process.

    By default, threads that wait spin for milliseconds and take the processor from other programs. Where the user has
    set OMP_WAIT_POLICY or GOMP_SPINCOUNT, the user's value stays.

    Where a launcher has started several processes, torch would print the stack of each connection that fails, beside
    the one line in which a command shows the error. It prints none, unless the user has set TORCH_CPP_LOG_LEVEL.
    """
    if "RANK" in os.environ:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # `nohup` and `&` may have SIGINT ignored
        signal.signal(signal.SIGINT, _end)


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside the block, Ctrl-C raises KeyboardInterrupt; before and after, Ctrl-C ends the command line quietly."""
    quiet = signal.getsignal(signal.SIGINT) is _end
    if quiet:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if quiet:
            signal.signal(signal.SIGINT, _end)


def _end(number: int, frame: FrameType | None) -> None:
    """Ends the process at once: an exception in the middle of an import may be taken for a fault of the module."""
    os._exit(128 + number)
