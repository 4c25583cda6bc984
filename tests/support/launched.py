"""`train` in several processes: in the pool of processes, in processes of their own, or by torchrun."""

import contextlib
import faulthandler
import io
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch.distributed as dist
from command_line import TINY as TINY_SINGLE
from command_line import hasten
from ranks import TIMEOUT, Ranks, forkserver

from megalodon_ops import cli

TINY = [*TINY_SINGLE, "--layers", "1", "--batch", "4", "--length", "48"]
"""One block, and four rows of three chunks, which four processes can split"""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node"]


class Result(NamedTuple):
    code: int
    out: str
    err: str


def flags(text: Path, out: Path, *more: object) -> list[str]:
    return ["train", "--data", str(text), "--out", str(out), *TINY, *map(str, more)]


def command(arguments: Sequence[str], patch: Any = None) -> Result:
    """Run a command in this process of the pool, as torchrun would start it; first call `patch` with a MonkeyPatch."""
    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as changed:
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}.items():
            changed.setenv(name, value)
        hasten(changed)
        if patch is not None:
            patch(changed)
        faulthandler.dump_traceback_later(TIMEOUT - 10, file=sys.__stderr__)  # shows where a process hangs
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = cli.main(list(arguments))
        finally:
            faulthandler.cancel_dump_traceback_later()
    return Result(code, out.getvalue(), err.getvalue())


def run_on_ranks(ranks: Ranks, count: int, arguments: Sequence[str], *, code: int = 0) -> list[Result]:
    """Run a command in `count` processes of the pool, all of which end with this exit code."""
    results = ranks.run(command, count, [*map(str, arguments)])
    assert [result.code for result in results] == [code] * count, results
    return results


class Launch:
    """Two processes of a command as torchrun would start them, but forked from one that has imported torch."""

    def __init__(self, arguments: Sequence[str], folder: Path, patch: Callable[[], Any] | None = None) -> None:
        """folder: for the output; patch: a function that can be pickled, called in each process before the command."""
        self._folder, port = folder, free_port()
        self.processes = [
            forkserver().Process(target=_rank, args=(list(arguments), rank, port, folder, patch), daemon=True)
            for rank in range(2)
        ]
        for process in self.processes:
            process.start()

    def results(self, seconds: float = TIMEOUT) -> list[Result]:
        """Exit code and output of each process; kills those that have not ended after `seconds`."""
        end = time.monotonic() + seconds
        results = []
        for rank, process in enumerate(self.processes):
            process.join(max(0.0, end - time.monotonic()))
            process.kill()
            process.join()
            printed = [(self._folder / f"{rank}.{stream}").read_text() for stream in ("out", "err")]
            results.append(Result(process.exitcode, *printed))
        return results


def _rank(arguments: list[str], rank: int, port: int, folder: Path, patch: Callable[[], Any] | None) -> None:
    for number, stream in enumerate(("out", "err"), 1):
        os.dup2(os.open(folder / f"{rank}.{stream}", os.O_WRONLY | os.O_CREAT), number)
    hasten(pytest.MonkeyPatch())
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    sys.argv[1:] = arguments
    if patch is not None:
        patch()
    cli.process()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def copy_without_the_last(run: Path, target: Path) -> Path:
    """Copy a run without its last checkpoint."""
    shutil.copytree(run, target)
    newest = max((target / "checkpoints").iterdir())
    shutil.rmtree(newest)
    return target


def workers(process: Any) -> list[int]:
    """Ids of the processes that torchrun has started, in order of their ranks."""
    found = {}
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        try:
            with open(f"/proc/{pid}/stat") as file:
                parent = int(file.read().rpartition(")")[2].split()[1])
            if parent == process.pid:
                with open(f"/proc/{pid}/environ") as file:
                    environment = dict(pair.partition("=")[::2] for pair in file.read().split("\0"))
                found[int(environment["RANK"])] = pid
        except (OSError, KeyError):
            continue
    return [found[rank] for rank in sorted(found)]


@contextlib.contextmanager
def ended_afterwards(process: Any) -> Iterator[Any]:
    """Kill torchrun and the processes that it has started when the test ends."""
    try:
        yield process
    finally:
        for pid in [process.pid, *workers(process)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
        process.wait()
        for pipe in (process.stdout, process.stderr):
            pipe.close()
