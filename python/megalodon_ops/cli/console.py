"""What a run shows while it goes, and how it is stopped."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm


class Progress:
    """The bar: how much of the run is done, its loss, bits per byte and tokens a second.

    The bar shows a share of the steps or, in a run of a given time, of the seconds: how many steps the seconds will
    hold is not known before, and an estimate by the pace so far goes up and down.
    """

    def __init__(self, row: dict[str, Any], steps: int | None, seconds: float | None):
        """For a run that is at `row`, and ends after `seconds` seconds or, where there is no such limit, `steps` steps."""
        self.held_out: float | None = None
        self.smooth: dict[str, float] = {}
        self.seconds = seconds
        style = dict(dynamic_ncols=True, mininterval=0.1 if sys.stderr.isatty() else 10, unit="step")
        if seconds:
            style |= dict(unit="s", bar_format="{l_bar}{bar}| {n:.0f}/{total:.0f} s{postfix}")
        self.bar = tqdm(initial=self._done(row), total=seconds or steps, **style)

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
        figures = {"step": str(row["step"])} if self.seconds else {}
        figures |= {"loss": f"{self.smooth['loss']:.3f}", "bits/byte": f"{self.smooth['bits_per_byte']:.3f}"}
        if self.held_out is not None:
            figures["held-out"] = f"{self.held_out:.3f}"
        figures["tokens/s"] = f"{row['tokens_per_second']:,}"
        if "mfu" in row:
            figures["MFU"] = f"{row['mfu']:.1%}"
        self.bar.set_postfix(figures, refresh=False)
        self.bar.update(self._done(row) - self.bar.n)

    def _done(self, row: dict[str, Any]) -> float:
        """How much of the bar's total is done; the last step may take longer than the time that was left."""
        return min(row["seconds"], self.seconds) if self.seconds else row["step"]


class StopSignals:
    """Ctrl-C, kill and the end of the terminal let the step finish; a second signal ends the process at once.

    launched: by torchrun, which sends on what a terminal has sent to all, so that a second signal says nothing; a process
    that takes long is ended by torchrun itself. Where torchrun has ended, the run stops as well.
    """

    def __init__(self, launched: bool = False):
        self.launcher = os.getppid() if launched else None
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
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self._received = self._received or number
        if self.launcher is None:
            self.__exit__()
