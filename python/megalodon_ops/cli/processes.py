"""A command in one process or in several, which torchrun has started.

torchrun is the engine: a process that fails ends, its connections with it, and what waits for it; torchrun ends the others
and, with --max-restarts, starts all again. The first process that fails says why.
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
from megalodon_ops.ops.common.checks import shown
from megalodon_ops.torchrun import first_line

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from megalodon_ops.cli.flags import Mesh

Value = TypeVar("Value")


@dataclass
class Processes:
    """This process of a command, and how it tells the others something. One process alone has nobody to tell."""

    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None

    @property
    def first(self) -> bool:
        """Whether this process prints, and writes what one process writes."""
        return self.rank == 0

    def extent(self, dimension: str) -> int:
        """How many processes share a dimension of the mesh."""
        return self.mesh[dimension].size() if self._has(dimension) else 1

    def place(self, dimension: str) -> int:
        """Which of them this process is."""
        return self.mesh.get_local_rank(dimension) if self._has(dimension) else 0

    def _has(self, dimension: str) -> bool:
        return self.mesh is not None and dimension in (self.mesh.mesh_dim_names or ())

    def gather(self, value: Value) -> list[Value]:
        """The values of all processes, in order of their ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Value) -> Value:
        """The value of the first process, in all."""
        return self.gather(value if self.first else None)[0]  # type: ignore[return-value]

    def check_same(self, facts: Mapping[str, Any]) -> None:
        """Raises where a fact is not the same in all processes."""
        for rank, others in enumerate(self.gather(dict(facts))):
            for name, value in facts.items():
                if others[name] != value:
                    raise CommandError(
                        f"{name} must be the same in all processes, got {shown(value)} and in rank {rank} {shown(others[name])}"
                    )


def is_one_of_several() -> bool:
    """Whether a launcher has started this process as one of several."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def joined(mesh: Mesh | None, timeout: float) -> Iterator[Processes]:
    """The processes of the command, or this one alone. Inside the block, only the first one is heard."""
    size, world = math.prod((mesh or {}).values()), int(os.environ["WORLD_SIZE"]) if is_one_of_several() else 1
    if mesh is not None and size != world:
        start_them = f"start them by torchrun --nproc-per-node {size} -m megalodon_ops ..."
        raise CommandError(f"--mesh {mesh}: is of {size} processes, and there are {world}; {start_them}")
    if world == 1:
        yield Processes()
        return
    started = not dist.is_initialized()
    if started:
        take_a_share_of_the_threads()
        _start(timeout)
    processes = Processes(dist.get_rank(), dist.get_world_size())
    with ExitStack() as stack:
        if not processes.first:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(redirect_stdout(nowhere))
            stack.enter_context(redirect_stderr(nowhere))
        yield processes
    if started:
        processes.gather(
            None
        )  # torchrun ends the others as soon as one has ended after a signal: the first has more to do
        dist.destroy_process_group()


def take_a_share_of_the_threads() -> None:
    """Gives each process of a machine as many threads as there are cores for it, unless OMP_NUM_THREADS says otherwise.

    torchrun sets OMP_NUM_THREADS to 1 where the user has not set it, so a 1 says nothing.
    """
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))))


def _start(timeout: float) -> None:
    from megalodon_ops.distributed.start import start

    try:
        start("cuda" if torch.cuda.is_available() else "cpu", timedelta(seconds=timeout))
    except (RuntimeError, ValueError) as error:
        raise CommandError(
            f"the processes have not found each other, which --timeout gives {timeout:g} s for: {first_line(error)}"
        ) from error


def says_why(error: Exception) -> str | None:
    """The line in which this process tells the user of an error: None where another process has failed before it."""
    text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
    if not is_one_of_several():
        return text
    try:
        first = not dist.is_initialized() or dist.distributed_c10d._get_default_store().add("failed", 1) == 1
    except RuntimeError:  # the process that keeps the store has ended
        first = False
    return f"rank {os.environ['RANK']}: {text}" if first else None
