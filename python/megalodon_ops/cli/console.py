"""Progress bar of a run, and the signals that stop it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm


def work_bar(**style: Any) -> tqdm:
    """Return a progress bar that a terminal erases at its end; in a log, the bar keeps its own line."""
    is_terminal = sys.stderr.isatty()
    return tqdm(leave=not is_terminal, mininterval=0.5 if is_terminal else 10, **style)


def bytes_bar(total: int, **style: Any) -> tqdm:
    return work_bar(total=total, unit="B", unit_scale=True, **style)


class Progress:
    """Progress bar with loss, bits per byte and tokens per second.

    The bar counts steps or, with a time limit, seconds, because the number of steps is then unknown.
    """

    def __init__(self, row: dict[str, Any], steps: int | None, seconds: float | None):
        """Start at `row`; the run ends after `seconds` seconds or, if that is None, `steps` steps."""
        self.held_out: float | None = None  # bits per byte
        self.smooth: dict[str, float] = {}  # moving averages
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
    def describe(self, activity: str) -> Iterator[None]:
        """Show, inside the block, the activity for which the steps wait."""
        self.bar.set_description_str(activity)
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
        """Return the completed part of the bar's total; the last step may exceed the time limit."""
        return min(row["seconds"], self.seconds) if self.seconds else row["step"]


class StopSignals:
    """Let the step finish on SIGINT, SIGTERM and SIGHUP; a second signal ends the process at once.

    launched: True if torchrun has started the process. Then a second signal is ignored: torchrun forwards signals that
    the terminal has already sent, and kills slow processes itself. The run also stops if torchrun has ended.
    """

    def __init__(self, launched: bool = False):
        self.launcher = os.getppid() if launched else None
        self._received = 0

    @property
    def received(self) -> int:
        """Number of the received signal, or 0."""
        if self.launcher is not None and os.getppid() != self.launcher:
            return self._received or signal.SIGTERM
        return self._received

    def __enter__(self) -> StopSignals:
        self._before = {}
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # ignored under `nohup`, say
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self._received = self._received or number
        if self.launcher is None:
            self.__exit__()  # the earlier handlers take a second signal
