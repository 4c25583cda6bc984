"""A command in one process, or in several started by torchrun.

If a process fails, its connections close, and torchrun stops the others and, with --max-restarts, restarts all. The
first process to fail prints the error.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from megalodon_ops.cli.errors import CommandError
from megalodon_ops.ops.common.checks import short_text
from megalodon_ops.torchrun import first_line, is_distributed

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from megalodon_ops.cli.flags import Mesh

Value = TypeVar("Value")


@dataclass
class Processes:
    """Rank, world size and mesh of this process, and its collectives. A single process needs no process group."""

    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None

    @property
    def is_rank0(self) -> bool:
        """True for the process that prints and writes metrics."""
        return self.rank == 0

    def place(self, dimension: str) -> tuple[int, int]:
        """Return this process's rank in a mesh dimension, and its size; (0, 1) if there is none."""
        if self.mesh is None:
            return 0, 1
        from megalodon_ops.distributed.split import rank_and_size

        return rank_and_size(self.mesh, dimension)

    def gather(self, value: Value) -> list[Value]:
        """Gather the values of all processes, in rank order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Value) -> Value:
        """Return the value of rank 0 in every process."""
        return self.gather(value if self.is_rank0 else None)[0]  # type: ignore[return-value]

    def check_same(self, facts: Mapping[str, Any]) -> None:
        for rank, others in enumerate(self.gather(dict(facts))):
            for name, value in facts.items():
                if others[name] != value:
                    got = f"{short_text(value)} and in rank {rank} {short_text(others[name])}"
                    raise CommandError(f"{name} must be the same in all processes, got {got}")


@contextmanager
def process_group(mesh: Mesh | None, timeout: float) -> Iterator[Processes]:
    """Yield the command's :class:`Processes`. Inside the block, only rank 0 prints."""
    size = math.prod((mesh or {}).values())
    world = int(os.environ["WORLD_SIZE"]) if is_distributed() else 1
    if mesh is not None and size != world:
        start_them = f"start them by torchrun --nproc-per-node {size} -m megalodon_ops ..."
        raise CommandError(f"--mesh {mesh}: needs {size} processes, got {world}; {start_them}")
    if world == 1:
        yield Processes()
        return
    owns_group = not dist.is_initialized()
    if owns_group:
        set_thread_share()
        from megalodon_ops.distributed.start import start

        try:
            start("cuda" if torch.cuda.is_available() else "cpu", timedelta(seconds=timeout))
        except (RuntimeError, ValueError) as error:
            lost = f"the processes did not find each other within --timeout {timeout:g} s"
            raise CommandError(f"{lost}: {first_line(error)}") from error
    processes = Processes(dist.get_rank(), dist.get_world_size())
    with ExitStack() as stack:
        if not processes.is_rank0:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(redirect_stdout(nowhere))
            stack.enter_context(redirect_stderr(nowhere))
        yield processes
    if owns_group:
        processes.gather(None)  # wait for rank 0: after a signal, torchrun kills all when one has ended
        dist.destroy_process_group()


def set_thread_share() -> None:
    """Divide a machine's cores among its processes, unless the user has set OMP_NUM_THREADS."""
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":  # torchrun sets an unset one to 1
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        num_local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))  # processes on this machine
        torch.set_num_threads(max(1, cores // num_local))
