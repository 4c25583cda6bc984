"""A pool of processes for tests, forked from one process that has imported the packages; tests share the pool."""

import contextlib
import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

PRELOADED = ["pytest", "hypothesis", "megalodon_ops.cli.train", "megalodon_ops.distributed", "torch._dynamo"]
PRELOADED += [f"torch.distributed.{name}" for name in ("fsdp", "tensor", "checkpoint")]
"""Imported once, by the process from which the pool is forked"""
TIMEOUT = 120.0
"""Seconds that a function may take in all ranks, on a busy machine"""
AFTER_A_FAULT = 20.0
"""Seconds until the other ranks must end after one has failed"""


class RankError(AssertionError):
    """The errors of the ranks; also raised if a rank does not answer."""


class Ranks:
    """Processes that are started when they are first needed and restarted after a failure."""

    def __init__(self) -> None:
        self._workers: list[tuple[multiprocessing.Process, Connection]] = []

    def run(self, function: Callable[..., Any], world_size: int, *args: Any, timeout: float = TIMEOUT) -> list[Any]:
        """Call `function(*args)` in each of `world_size` ranks of a gloo process group; return the results in order.

        `function` must be at the top level of a module, so that new processes find it. If a rank raises an exception or
        does not answer within `timeout` seconds, all processes end, and a RankError is raised here.
        """
        workers = self._first(world_size)
        with tempfile.TemporaryDirectory() as folder:
            try:
                for rank, (_, connection) in enumerate(workers):
                    connection.send((function, args, rank, world_size, f"{folder}/store", timeout))
                answers = _answers([connection for _, connection in workers], timeout)
            except BaseException:
                self.close()
                raise
        faults = [f"rank {rank}: {fault}" for rank, (fault, _) in enumerate(answers) if fault]
        if faults:
            self.close()
            raise RankError("\n".join(faults))
        return [result for _, result in answers]

    def close(self) -> None:
        for _, connection in self._workers:
            connection.close()
        end = time.monotonic() + 1  # by then, a process that waits for work has ended by itself
        for process, _ in self._workers:
            process.join(max(0.0, end - time.monotonic()))
            process.kill()
            process.join()
        self._workers = []

    def _first(self, count: int) -> list[tuple[multiprocessing.Process, Connection]]:
        context = forkserver()
        while len(self._workers) < count:
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there,), daemon=True)
            process.start()
            there.close()
            self._workers.append((process, here))
        return self._workers[:count]


def forkserver() -> multiprocessing.context.ForkServerContext:
    """A context whose processes are forked from one that has imported torch and the package."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _answers(connections: list[Connection], timeout: float) -> list[tuple[str, Any]]:
    """The answer of each rank: a fault, or "" and a result. After a fault the others must answer in AFTER_A_FAULT."""
    answers: dict[Connection, tuple[str, Any]] = {}
    end = time.monotonic() + timeout
    while len(answers) < len(connections):
        left = [connection for connection in connections if connection not in answers]
        ready = wait(left, max(0.0, end - time.monotonic()))
        if not ready:
            answers.update((connection, (f"no answer in {timeout:.0f} s", None)) for connection in left)
        for connection in ready:
            try:
                answers[connection] = connection.recv()
            except EOFError:
                answers[connection] = ("the process has ended", None)
            if answers[connection][0]:
                end = min(end, time.monotonic() + AFTER_A_FAULT)
    return [answers[connection] for connection in connections]


def _serve(connection: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            function, args, rank, world_size, store, timeout = connection.recv()
        except EOFError:
            return
        try:
            with _process_group(rank, world_size, store, timeout):
                answer = ("", function(*args))
        except BaseException:
            answer = (traceback.format_exc(), None)
        connection.send(answer)


@contextlib.contextmanager
def _process_group(rank: int, world_size: int, store: str, timeout: float):
    import torch.distributed as dist

    dist.init_process_group(
        "gloo", init_method=Path(store).as_uri(), rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout)
    )
    try:
        dist.barrier()  # an idle rank must not close connections that another one is still opening
        yield
    finally:
        dist.destroy_process_group()
