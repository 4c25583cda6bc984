"""What a run shows while it goes, and how it is stopped."""

from __future__ import annotations

import math
import signal
from typing import Any

from tqdm import tqdm


class Progress:
    """The bar: loss, bits per byte, tokens (bytes) a second, time left."""

    def __init__(self, step: int, end: int | None):
        self.held_out: float | None = None
        self.loss: float | None = None
        self.bar = tqdm(initial=step, total=end, unit="step", dynamic_ncols=True)
        if not self.bar.fp.isatty():
            self.bar.mininterval = 10

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def show(self, row: dict[str, Any], end: int | None) -> None:
        self.loss = row["loss"] if self.loss is None else 0.95 * self.loss + 0.05 * row["loss"]
        self.bar.total = end
        figures = {"loss": f"{self.loss:.3f}", "bits/byte": f"{self.loss / math.log(2):.3f}"}
        if self.held_out is not None:
            figures["held-out"] = f"{self.held_out:.3f}"
        figures["tokens/s"] = f"{row['bytes_per_second']:,}"
        self.bar.set_postfix(figures, refresh=False)
        self.bar.update()


class StopSignals:
    """Ctrl-C and kill let the step finish; a second one ends the process at once."""

    def __enter__(self) -> StopSignals:
        self.received = 0
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self.received = number
        signal.signal(number, self._before[signal.Signals(number)])
