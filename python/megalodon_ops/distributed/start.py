"""Start and end of the processes of a group."""

import atexit
import functools
import os
import re
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .. import torchrun


def start(device_type: str, timeout: timedelta | None = None) -> None:
    """Start the default process group from the environment that `torchrun` sets, or else with this process only.

    gloo exchanges tensors on the CPU, NCCL tensors on GPUs; a process takes the GPU of its `LOCAL_RANK`.

    After a restart by torchrun, the store may hold addresses of ended processes, so each start has its own prefix.
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
    store = dist.PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, **options)
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        sys.excepthook = functools.partial(_fail, sys.excepthook)  # the hook of init_process_group names the rank


def _fail(show: Callable[..., Any], kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Show an uncaught exception, in one line if another process has ended, and report it to torchrun."""
    is_peer_failure = torchrun.is_peer_failure(error)
    line = f"{torchrun.PEER_FAILURE}: {torchrun.first_line(error)}" if is_peer_failure else f"{kind.__name__}: {error}"
    if is_peer_failure and re.search("(?i)connection (closed|reset)|broken pipe", line):
        print(f"[rank{os.environ['RANK']}]: {line}", file=sys.stderr, flush=True)
    else:
        show(kind, error, trace)
    torchrun.report_failure(line, is_root_cause=not is_peer_failure)


def await_workers(timeout: float = 10.0) -> None:
    """Wait, on Linux, until gloo's threads are idle, before the interpreter ends.

    A gloo thread that releases a tensor while the interpreter ends aborts the process (torch 2.13, even after
    `destroy_process_group`), so on a busy machine a successful run could look like a failed one.
    """
    end, idle = time.monotonic() + timeout, 0
    while idle < 3 and time.monotonic() < end:
        time.sleep(0.002)  # releases the GIL, which the threads need
        states = [_state(file) for file in Path("/proc/self/task").glob("*/stat")]
        idle = 0 if "pt_gloo_runloop R" in states else idle + 1


def _state(file: Path) -> str:
    """Name and state of a thread; R if it runs or waits for a processor."""
    try:
        name, state = file.read_text().split("(", 1)[1].rsplit(")", 1)
    except OSError:  # the thread has ended
        return ""
    return f"{name} {state.split()[0]}"
