"""What a run shows while it goes, and how it is stopped."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from tqdm import tqdm


class Progress:
    """The bar: loss, bits per byte, tokens a second; how much of the run is done.

    The bar shows a share of the steps or, in a run of a given time, of the seconds: how many steps the seconds will
    hold is not known before, and an estimate by the pace so far goes up and down.
    """

    def __init__(self, row: dict[str, Any], steps: int | None, seconds: float | None):
        """For a run that is at `row`, and ends after `steps` steps or `seconds` seconds, whichever comes first."""
        self.held_out: float | None = None
        self.smooth: dict[str, float] = {}
        self.steps, self.seconds = steps, seconds
        timed = dict(unit="s", bar_format="{l_bar}{bar}| {n:.0f}/{total:.0f} s{postfix}")
        self.bar = tqdm(
            initial=self._done(row), total=steps if seconds is None else seconds, dynamic_ncols=True,
            **(dict(unit="step") if seconds is None else timed),
        )  # fmt: skip
        if not self.bar.fp.isatty():
            self.bar.mininterval = 10

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def show(self, row: dict[str, Any]) -> None:
        for name in ("loss", "bits_per_byte"):
            self.smooth[name] = 0.95 * self.smooth.get(name, row[name]) + 0.05 * row[name]
        figures = {}
        if self.seconds is not None:
            figures["step"] = str(row["step"]) if self.steps is None else f"{row['step']}/{self.steps}"
        figures |= {"loss": f"{self.smooth['loss']:.3f}", "bits/byte": f"{self.smooth['bits_per_byte']:.3f}"}
        if self.held_out is not None:
            figures["held-out"] = f"{self.held_out:.3f}"
        figures["tokens/s"] = f"{row['tokens_per_second']:,}"
        self.bar.set_postfix(figures, refresh=False)
        self.bar.update(self._done(row) - self.bar.n)

    def _done(self, row: dict[str, Any]) -> float:
        """How much of the bar's total is done; the last step may take longer than the time that was left."""
        return row["step"] if self.seconds is None else min(row["seconds"], self.seconds)


ECHO = 5.0
"""Seconds after a signal in which torchrun may send it to a process that has it already"""


class StopSignals:
    """Ctrl-C and kill let the step finish; a second signal ends the process at once.

    launched: torchrun, which has started the process, sends the signals on that it gets, and a terminal sends Ctrl-C to
    both; so a signal that follows within seconds is no second one.
    """

    def __init__(self, launched: bool = False):
        self.echo = ECHO if launched else 0.0

    def __enter__(self) -> StopSignals:
        self.received = 0
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def _note(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if not self.received:
            self.received, self._first = number, now
            if not self.echo:
                self._restore()
        elif now - self._first > self.echo:
            self._restore()
            os.kill(os.getpid(), number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
