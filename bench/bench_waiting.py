"""How threads that wait for each other wait: the default training run on idle cores, and beside two busy processes.

A step of that run is hundreds of regions of tens of microseconds, at whose ends threads wait for each other. Threads
that spin go on at once on idle cores; beside other work they take the processor from those that they wait for. OpenMP
reads how to wait once, when it is loaded, so each setting has a process of its own: the command line's
(`GOMP_SPINCOUNT`), OpenMP's default, and `OMP_WAIT_POLICY=passive`. Expected are the losses of the default. The cases
want all of the machine's processors, as two busy processes do.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import torch
from megalodon_ops_startup import SPIN_COUNT
from torch import Tensor

from .harness import OURS, Case, Outputs, Path

BUSY = 2
"""Processes of the second case that do nothing else than take a processor"""
SETTINGS = {
    OURS: {"GOMP_SPINCOUNT": str(SPIN_COUNT)},
    "OpenMP's default": {},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
}


def cases(quick: bool, gpu: bool) -> Iterator[Case]:
    if gpu:
        return
    runs = {name: _Run(variables) for name, variables in SETTINGS.items()}
    steps = 2 if quick else 10
    try:
        for name, busy in {"idle": 0, f"beside {BUSY} busy processes": BUSY}.items():
            paths = [Path(label, run.takes(steps, busy), before=run.start_over) for label, run in runs.items()]
            yield Case(
                name=f"steps of the default run, {name}", shape=f"0.67M, {steps} steps", dtype="fp32", paths=paths,
                expected=runs["OpenMP's default"].from_the_start(steps), tolerance=1e-6, units=steps * 64 * 64,
                unit="token", cold=False, fewer_threads=False,
            )  # fmt: skip
    finally:
        for run in runs.values():
            run.end()


class _Run:
    """A training run in a process of its own, with variables in its environment, that takes steps when it is asked to."""

    def __init__(self, variables: dict[str, str]):
        ours = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
        environment = {name: value for name, value in os.environ.items() if name not in ours}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.waiting_run"], env=environment | variables, text=True, bufsize=1,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def start_over(self) -> None:
        self._ask("start over")

    def takes(self, steps: int, busy: int) -> Callable[[], Outputs]:
        """A call that takes the run's next steps beside `busy` other processes and returns their losses."""

        def call() -> Outputs:
            others = [subprocess.Popen(["sh", "-c", "while kill -0 $PPID; do :; done"]) for _ in range(busy)]
            try:
                return (_losses(self._ask(str(steps))),)
            finally:
                for other in others:
                    other.kill()
                    other.wait()

        return call

    def from_the_start(self, steps: int) -> Callable[[], Outputs]:
        """A call that returns the losses of the run's first steps."""

        def call() -> Outputs:
            self.start_over()
            return (_losses(self._ask(str(steps))),)

        return call

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()

    def _ask(self, what: str) -> str:
        self.process.stdin.write(what + "\n")
        return self.process.stdout.readline()


def _losses(line: str) -> Tensor:
    return torch.tensor([float(loss) for loss in line.split()])
