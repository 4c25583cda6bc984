"""How far a run has come, and the learning rate there.

    lr = peak * min(1, max((step + 1) / warmup, 10 progress)) * (1 - progress)

For a number of steps, progress is step / steps. For minutes, progress runs along a straight line that `set_pace` draws
from the time spent to the end of the budget, at every checkpoint and only there: the line is part of the checkpoint, so
the losses after a checkpoint are the same whenever they are computed.
"""

from __future__ import annotations

from typing import Any

import msgspec
import torch


class SchedulePosition(msgspec.Struct):
    """What `Schedule.position` gives."""

    budget: float | None
    anchor: tuple[int, float]
    end: int | None


class Schedule:
    """Warmup and a line to zero, over `steps` steps or over `minutes`.

    Example:
        >>> from megalodon_ops.training import Schedule
        >>> schedule = Schedule(lr=1e-3, warmup=10, steps=100)
        >>> [round(schedule.lr(step), 6) for step in (0, 9, 50, 99)], schedule.finished(100)
        ([0.0001, 0.00091, 0.0005, 1e-05], True)
    """

    def __init__(self, lr: float, warmup: int, steps: int | None = None, minutes: float | None = None):
        if bool(steps) == bool(minutes):
            raise ValueError("Schedule: `steps` or `minutes` must be given, and not both.")
        self.peak, self.warmup = lr, warmup
        self.budget = 60 * minutes if minutes else None
        self.anchor = (0, 0.0)  # (step, progress) where the line starts
        self.end = steps  # the step where the line ends; None until the pace is known

    def progress(self, step: int) -> float:
        """How much of the run is done before a step, from 0 to 1."""
        start, done = self.anchor
        along = 0.0 if self.end is None else (step - start) / max(1, self.end - start)
        return min(1.0, done + (1 - done) * along)

    def lr(self, step: int) -> float:
        """The learning rate of a step, the first of which is 0."""
        progress = self.progress(step)
        ramp = min(1.0, max((step + 1) / max(1, self.warmup), 10 * progress))
        return self.peak * ramp * (1 - progress)

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        """Gives every group of the optimizer the learning rate of a step, and returns the rate."""
        rate = self.lr(step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        return rate

    def finished(self, step: int) -> bool:
        """Whether the run ends before a step."""
        return self.end is not None and step >= self.end

    def set_pace(self, step: int, seconds: float, seconds_per_step: float) -> None:
        """Draws the line anew, after `seconds` of the budget, for steps that take `seconds_per_step`."""
        if self.budget is None:
            return
        self.anchor = (step, min(1.0, seconds / self.budget))
        self.end = step + max(0, round((self.budget - seconds) / seconds_per_step))

    def position(self) -> dict[str, Any]:
        """The line that progress runs along, as JSON."""
        return {"budget": self.budget, "anchor": list(self.anchor), "end": self.end}

    def seek(self, position: dict[str, Any], step: int, seconds: float = 0.0) -> None:
        """Takes up the line of a checkpoint or, for a run that was given another length, draws a line from there.

        seconds: those spent so far, which a schedule by the clock needs.
        """
        found = msgspec.convert(position, SchedulePosition)
        if self.budget is None:
            return
        if self.budget == found.budget:
            self.anchor, self.end = found.anchor, found.end
        elif step:
            self.set_pace(step, seconds, seconds / step)
