"""What a run shows while it goes, and how it is stopped."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
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

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Says, inside the block, what keeps the bar from going on."""
        self.bar.set_description_str(what)
        yield
        self.bar.set_description_str(None, refresh=False)

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
    """Ctrl-C, kill and the end of the terminal let the step finish; a second signal ends the process at once.

    launched: torchrun, which has started the process, sends the signals on that it gets, and a terminal sends Ctrl-C to
    both; so a signal that follows within seconds is no second one. Where torchrun itself ends, the run stops as well.
    """

    def __init__(self, launched: bool = False):
        self.echo, self.launcher = (ECHO, os.getppid()) if launched else (0.0, None)
        self._received = 0

    @property
    def received(self) -> int:
        """The number of the signal that has come, or 0."""
        if self.launcher is not None and os.getppid() != self.launcher:
            return self._received or signal.SIGTERM
        return self._received

    def __enter__(self) -> StopSignals:
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        ignored = [number for number in numbers if signal.getsignal(number) is signal.SIG_IGN]  # by `nohup`, say
        self._before = {number: signal.signal(number, self._note) for number in numbers if number not in ignored}
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def _note(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if not self._received:
            self._received, self._first = number, now
            if not self.echo:
                self._restore()
        elif now - self._first > self.echo:
            self._restore()
            os.kill(os.getpid(), number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
