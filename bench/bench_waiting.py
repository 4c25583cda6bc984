"""Wait policies of OpenMP's threads: the default training run on idle cores, and beside two busy processes.

A training step has hundreds of parallel regions of tens of microseconds, each ended by a barrier. Spinning threads
continue at once on idle cores; beside other work they take the processor from the threads that they wait for.

Settings: the command line's (`GOMP_SPINCOUNT`), OpenMP's default, and `OMP_WAIT_POLICY=passive`. Each runs in its own
process, because OpenMP reads its wait policy once, when it is loaded. The losses must equal those of OpenMP's default.
Both cases need all of the machine's processors.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import torch
from megalodon_ops_startup import SPIN_COUNT
from torch import Tensor

from .harness import OURS, Case, Outputs, Path

BUSY = 2  # processes in the second case
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
            paths = [Path(label, run.next_steps(steps, busy), before=run.restart) for label, run in runs.items()]
            yield Case(
                name=f"steps of the default run, {name}",
                shape=f"0.67M, {steps} steps",
                dtype="fp32",
                paths=paths,
                expected=runs["OpenMP's default"].first_steps(steps),
                tolerance=1e-6,
                units=steps * 64 * 64,
                unit="token",
                cold=False,
                fewer_threads=False,
            )
    finally:
        for run in runs.values():
            run.end()


class _Run:
    """A training run in its own process with its own environment variables, which takes steps on request."""

    def __init__(self, variables: dict[str, str]):
        ours = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
        environment = {name: value for name, value in os.environ.items() if name not in ours} | variables
        command = [sys.executable, "-m", "bench.waiting_run"]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.process = subprocess.Popen(command, env=environment, text=True, bufsize=1, **pipes)

    def restart(self) -> None:
        self._ask("restart")

    def next_steps(self, steps: int, busy: int) -> Callable[[], Outputs]:
        """A call that takes the run's next steps beside `busy` other processes and returns the losses."""

        def call() -> Outputs:
            others = [subprocess.Popen(["sh", "-c", "while kill -0 $PPID; do :; done"]) for _ in range(busy)]
            try:
                return (_losses(self._ask(str(steps))),)
            finally:
                for other in others:
                    other.kill()
                    other.wait()

        return call

    def first_steps(self, steps: int) -> Callable[[], Outputs]:
        """A call that returns the losses of the run's first steps."""

        def call() -> Outputs:
            self.restart()
            return (_losses(self._ask(str(steps))),)

        return call

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()

    def _ask(self, request: str) -> str:
        self.process.stdin.write(request + "\n")
        return self.process.stdout.readline()


def _losses(line: str) -> Tensor:
    return torch.tensor([float(loss) for loss in line.split()])
