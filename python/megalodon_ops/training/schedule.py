"""Progress of a run, and its learning rate.

    lr = peak * min(1, max((step + 1) / warmup, 10 progress)) * (1 - progress)

With `steps`, progress is step / steps. With `minutes`, progress is a line from the spent share of the time to 1.
`set_pace` fits the line to the pace of the steps, only at checkpoints, and each checkpoint stores the line. So losses
after a resume are those of the uninterrupted run.
"""

from typing import Any

import msgspec
import torch


class SchedulePosition(msgspec.Struct):
    """The fields of `Schedule.position`."""

    budget: float | None  # seconds
    anchor: tuple[int, float]  # step and progress where the line starts
    end: int | None  # step where the line ends


class Schedule:
    """Linear warmup and linear decay to zero, over `steps` or `minutes`.

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
        """Return the share of the run before a step, from 0 to 1."""
        start, done = self.anchor
        share = 0.0 if self.end is None else (step - start) / max(1, self.end - start)
        return min(1.0, done + (1 - done) * share)

    def lr(self, step: int) -> float:
        """Return the learning rate of a step; the first step is 0."""
        progress = self.progress(step)
        ramp = min(1.0, max((step + 1) / max(1, self.warmup), 10 * progress))
        return self.peak * ramp * (1 - progress)

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        """Set the learning rate of a step in every group of the optimizer, and return it."""
        rate = self.lr(step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        return rate

    def finished(self, step: int) -> bool:
        """Return True if the run ends before this step."""
        return self.end is not None and step >= self.end

    def set_pace(self, step: int, seconds: float, seconds_per_step: float) -> None:
        """Fit the end to the budget, of which `seconds` are spent; a step takes `seconds_per_step`."""
        if self.budget is None:
            return
        self.anchor = (step, min(1.0, seconds / self.budget))
        self.end = step + max(0, round((self.budget - seconds) / seconds_per_step))

    def position(self) -> dict[str, Any]:
        """Return the line of progress, as JSON."""
        return {"budget": self.budget, "anchor": list(self.anchor), "end": self.end}

    def seek(self, position: dict[str, Any], step: int, seconds: float = 0.0) -> None:
        """Restore a checkpoint's line of progress; for other `minutes`, fit a line from `step`, after `seconds`."""
        stored = msgspec.convert(position, SchedulePosition)
        if self.budget is None:
            return
        if self.budget == stored.budget:
            self.anchor, self.end = stored.anchor, stored.end
        elif step:
            self.set_pace(step, seconds, seconds / step)
