"""Plot of a run's metrics."""

import itertools
import math
import os
from typing import Any

import numpy

from .. import extras
from ..storage.files import as_path, write_atomically
from ..ops.common.checks import describe, short_text

_COLORS = ("#2f6fb0", "#d1602f", "#3a8f5c", "#8a5fb0", "#b0932f", "#4fa3a8")
"""Of runs, in order; the first also for the pictures of this package's models"""
_GREY = "#8c959f"
AXES = {"step": ("optimizer step", "step", 1), "tokens": ("tokens", "tokens", 1), "minutes": ("minutes", "seconds", 60)}
"""Horizontal axis -> its label, its field in a row, and the field's unit"""


def draw_metrics(
    path: str | os.PathLike,
    rows: list[dict[str, Any]] | dict[str, list[dict[str, Any]]],
    references: dict[str, float] | None = None,
    *,
    by: str = "step",
) -> None:
    """Plot bits per byte against steps, in training and on held-out text, as a PNG file.

    rows: rows of `read_metrics`, with `bits_per_byte` or `held_out_bits_per_byte`, and `final` if the figure is that of
    all held-out text; or, to compare runs, a dictionary of such rows by name. references: bits per byte to compare
    with, by name. by: the horizontal axis, "step", "tokens" or "minutes".
    """
    runs = rows if isinstance(rows, dict) else {"": rows}
    for run in runs.values():
        if not isinstance(run, list | tuple) or not all(isinstance(row, dict) for row in run):
            raise TypeError(f"draw_metrics: `rows` must be a list of `read_metrics`, got {describe(run)}.")
    if by not in AXES:
        raise ValueError(f"draw_metrics: `by` must be one of {', '.join(AXES)}, got {short_text(by)}.")
    label, field, unit = AXES[by]
    figure = extras.load("matplotlib.figure", "train").Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot(
        xlabel=label, ylabel="bits per byte", title=f"bits per byte of {len(runs)} run{'s'[: len(runs) > 1]}"
    )
    tops = [*(references or {}).values()]
    for (name, run), color in zip(runs.items(), itertools.cycle(_COLORS)):
        name = f"{name}, " if name else ""
        places = {row["step"]: row[field] / unit for row in run if field in row}
        train = [(row[field] / unit, row["bits_per_byte"]) for row in run if "bits_per_byte" in row and field in row]
        if train:
            where, bits = numpy.array(train).T
            width = math.ceil(len(bits) / 50)  # values in a moving average
            smooth = numpy.convolve(bits, numpy.full(width, 1 / width), "valid")
            axes.plot(where, bits, color=color, alpha=0.2, linewidth=0.8)
            marker = "." if len(smooth) == 1 else None  # a line of one point is invisible
            label = f"{name}training, smoothed"
            axes.plot(where[width - 1 :], smooth, color=color, alpha=0.6, marker=marker, label=label)
            tops.append(float(numpy.percentile(bits, 95)))  # the first steps may be far above
        for final, style in {
            False: dict(marker="o", markersize=3, label=f"{name}held-out, a sample of all"),
            True: dict(marker="*", markersize=9, linestyle="", label=f"{name}held-out, all"),
        }.items():
            held_out = [row for row in run if "held_out_bits_per_byte" in row and bool(row.get("final")) == final]
            points = [(places[row["step"]], row["held_out_bits_per_byte"]) for row in held_out if row["step"] in places]
            if points:
                axes.plot(*zip(*points, strict=True), color=color, **style)
                tops.append(min(bits for _, bits in points))
    for (name, bits), style in zip((references or {}).items(), ("--", ":"), strict=False):
        axes.axhline(bits, color=_GREY, linestyle=style, label=f"{name} ({bits:.2f})")
    if tops:
        bottom = axes.get_ylim()[0]
        axes.set_ylim(top=max(tops) + 0.05 * abs(max(tops) - bottom))
    axes.grid(alpha=0.3)
    if axes.has_data():
        axes.legend()
    with write_atomically(as_path("draw_metrics", "path", path)) as draft:
        figure.savefig(draft, format="png")
