"""Settings of the command line that must be made before torch is loaded, and so before `megalodon_ops` is."""

from __future__ import annotations

import os
import runpy
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SPIN_COUNT = 3_000
"""Checks that a waiting thread makes before it sleeps"""


def run() -> None:
    """Run the script `megalodon-ops`: as `python -m megalodon_ops`, with the settings made before."""
    prepare()
    runpy.run_module("megalodon_ops", run_name="__main__", alter_sys=True)


def prepare() -> bool:
    """Set how long OpenMP's threads spin, before torch loads OpenMP, which reads it once; let Ctrl-C end the process.

    By default, waiting threads spin for milliseconds and take the processor from other programs. A user's
    OMP_WAIT_POLICY or GOMP_SPINCOUNT stays.

    Under a launcher, torch would print the stack of each failed connection beside the one line in which a command shows
    the error. It prints none, unless the user has set TORCH_CPP_LOG_LEVEL.

    Returns:
        True if an environment variable has changed.
    """
    before = dict(os.environ)
    if "RANK" in os.environ:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # SIGINT may be ignored, under `nohup` or `&`
        signal.signal(signal.SIGINT, _end)
    return before != dict(os.environ)


@contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt inside the block; outside, it ends the command line quietly."""
    ends_quietly = signal.getsignal(signal.SIGINT) is _end
    if ends_quietly:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if ends_quietly:
            signal.signal(signal.SIGINT, _end)


def _end(number: int, frame: FrameType | None) -> None:
    """End the process at once: the importer may take an exception during an import for a fault of the module."""
    os._exit(128 + number)
