"""A command in several processes, as torchrun starts them: how they find each other, who speaks, who is started again."""

from __future__ import annotations

import argparse
import logging
import math
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from typing import TYPE_CHECKING

import torch

from megalodon_ops.cli.errors import CommandError
from megalodon_ops.errors import TeamError

if TYPE_CHECKING:
    from megalodon_ops.training.team import Team

TIMEOUT = 600.0
"""Seconds that processes wait for each other, where --timeout says nothing"""
LAUNCH = "launch"
"""The file in a run's folder that says which launch of torchrun may start the run again"""


def is_one_of_several() -> bool:
    """Whether a launcher has started this process as one of several."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def speaks_for(error: Exception) -> bool:
    """Whether this process is the one to show an error: the first, where all have it, else the first of its machine."""
    return (
        not is_one_of_several() or os.environ.get("RANK" if isinstance(error, TeamError) else "LOCAL_RANK", "0") == "0"
    )


@contextmanager
def joined(options: argparse.Namespace) -> Iterator[Team]:
    """The processes of the command, or this one alone. Inside the block, the first one alone is heard."""
    from megalodon_ops.training.team import Team  # here: `info` does without the extra `train`

    mesh = getattr(options, "mesh", None)
    size, world = math.prod((mesh or {}).values()), int(os.environ["WORLD_SIZE"]) if is_one_of_several() else 1
    if mesh is not None and size != world:
        if world > 1:
            raise TeamError(f"--mesh {text_of(mesh)}: is of {size} processes, and there are {world}")
        raise CommandError(
            f"--mesh {text_of(mesh)}: is of {size} processes, and this is one alone; start them by "
            f"torchrun --nproc-per-node {size} -m megalodon_ops ..."
        )
    if world == 1:
        yield Team()
        return
    import torch.distributed as dist

    take_a_share_of_the_threads()
    timeout, started = timedelta(seconds=getattr(options, "timeout", TIMEOUT)), not dist.is_initialized()
    if started:
        _start(timeout)
    team = Team(several=True, timeout=timeout)
    with only_the_first_is_heard(team):
        yield team
    if started:
        dist.destroy_process_group()


def text_of(mesh: dict[str, int]) -> str:
    return ",".join(f"{name}={size}" for name, size in mesh.items())


def _start(timeout: timedelta) -> None:
    """Starts the process group of all processes."""
    from megalodon_ops.distributed.start import start

    try:
        start("cuda" if torch.cuda.is_available() else "cpu", timeout)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:300]
        raise CommandError(
            f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}: the processes have not found each other, which "
            f"--timeout gives {timeout.total_seconds():g} s for: {reason}"
        ) from error


def take_a_share_of_the_threads() -> None:
    """Gives each process of a machine as many threads as it has cores, unless OMP_NUM_THREADS says otherwise."""
    if "OMP_NUM_THREADS" not in os.environ or _is_torchrun_s_own_setting():
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ["WORLD_SIZE"])))


def _is_torchrun_s_own_setting() -> bool:
    """Whether torchrun has set OMP_NUM_THREADS to 1, as it does for several processes of users who have not set it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ["OMP_NUM_THREADS"] != "1":
        return False
    return b"OMP_NUM_THREADS=" not in _environment_of_the_launcher()


def _environment_of_the_launcher() -> bytes:
    """What torchrun itself was started in, `name=value` with zeros between; OMP_NUM_THREADS= where it is not known."""
    try:
        return Path(f"/proc/{os.getppid()}/environ").read_bytes()
    except OSError:
        return b"OMP_NUM_THREADS="


@contextmanager
def only_the_first_is_heard(team: Team) -> Iterator[None]:
    """Inside the block, what the other processes print is thrown away.

    torch's notes on how its own exchanges could be faster, which every process logs, are left out.
    """
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)
    if team.first:
        yield
        return
    heard = sys.stdout, sys.stderr
    with open(os.devnull, "w") as nowhere:
        sys.stdout = sys.stderr = nowhere
        try:
            yield
        finally:
            sys.stdout, sys.stderr = heard


def may_be_started_again() -> bool:
    """Whether torchrun starts the command anew where one of its processes fails."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0


def is_started_again() -> bool:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def sign(folder: Path) -> None:
    """Says in a run's folder that this launch of torchrun may go on with the run."""
    if may_be_started_again():
        (folder / LAUNCH).write_text(_this_launch() + "\n")


def is_of_this_launch(folder: Path) -> bool:
    """Whether this launch of torchrun has begun, or resumed, the run in a folder, and now starts it again."""
    try:
        return is_started_again() and (folder / LAUNCH).read_text().strip() == _this_launch()
    except OSError:
        return False


def folder_of_run(options: argparse.Namespace, choose: Callable[[argparse.Namespace], Path]) -> Path:
    """The folder that `choose` gives, or that of the run which this launch has begun without a name."""
    if is_started_again() and not hasattr(options, "out"):
        for mark in sorted(Path("runs").glob(f"*/{LAUNCH}")):
            if is_of_this_launch(mark.parent):
                return mark.parent
    return choose(options)


def _this_launch() -> str:
    """torchrun's identifier of its run, where it was given one; else the process of torchrun, and when that began."""
    if (run_id := os.environ.get("TORCHELASTIC_RUN_ID", "none")) != "none":
        return run_id
    launcher = os.getppid()
    try:
        began = Path(f"/proc/{launcher}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        began = "unknown"
    return f"process {launcher} of {socket.gethostname()} that began at {began}"
