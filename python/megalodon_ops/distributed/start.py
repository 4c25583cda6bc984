"""How processes find each other, and how they end."""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_WORKER = "pt_gloo_runloop"


def start(device_type: str, timeout: timedelta | None = None) -> None:
    """Starts the default process group from the environment that `torchrun` sets, or of this process alone without it.

    Tensors on the CPU are exchanged by gloo, those on GPUs by NCCL; a process takes the GPU of its `LOCAL_RANK`.

    A torchrun that starts its processes again may keep the store in which they find each other, and with it the addresses
    of processes that are gone; so each start has names of its own in the store.

    Raises what `torch.distributed.init_process_group` raises.
    """
    atexit.register(await_workers)
    backend = "gloo" if device_type == "cpu" else "cpu:gloo,cuda:nccl"
    options: dict[str, Any] = {} if timeout is None else {"timeout": timeout}
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, **options)
        return
    if device_type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    store, rank, world_size = next(dist.rendezvous("env://", **options))
    if timeout is not None:
        store.set_timeout(timeout)
    count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(
        backend, store=dist.PrefixStore(f"start-{count}", store), rank=rank, world_size=world_size, **options
    )


def await_workers(timeout: float = 10.0) -> None:
    """Waits until gloo's threads have nothing to do, before the interpreter ends.

    A thread that has answered a call may not have let go of its tensors yet, where the machine is busy. Once the
    interpreter ends, letting go of a tensor that Python has seen aborts the process (torch 2.13), and `torchrun` takes a
    run that has ended well for one that has failed. Destroying the process group does not help, as torch's caches keep it.
    """
    end, idle = time.monotonic() + timeout, 0
    while idle < 3 and time.monotonic() < end:
        time.sleep(0.002)  # lets go of the interpreter's lock, which the threads need
        idle = 0 if any(_are_busy()) else idle + 1


def _are_busy() -> Iterator[bool]:
    """Of each of gloo's threads, whether it runs or waits for a processor; of none outside Linux."""
    for file in Path("/proc/self/task").glob("*/stat"):
        try:
            name, state = file.read_text().rsplit(")", 1)
        except OSError:  # the thread has ended
            continue
        if _WORKER in name:
            yield state.split()[0] == "R"
