"""Plot of a run's metrics."""

from __future__ import annotations

import os
from typing import Any

import numpy

from .. import extras
from ..storage.files import as_path, write_atomically
from ..ops.common.checks import describe

_BLUE, _GREY = "#2f6fb0", "#8c959f"  # this package's model, and references


def draw_metrics(
    path: str | os.PathLike, rows: list[dict[str, Any]], references: dict[str, float] | None = None
) -> None:
    """Plot bits per byte against steps, in training and on held-out text, as a PNG file.

    rows: rows of `read_metrics`, with `bits_per_byte` or `held_out_bits_per_byte`, and `final` if the figure is that of
    all held-out text. references: bits per byte to compare with, by name.
    """
    if not isinstance(rows, list | tuple) or not all(isinstance(row, dict) for row in rows):
        raise TypeError(f"draw_metrics: `rows` must be a list of `read_metrics`, got {describe(rows)}.")
    figure = extras.load("matplotlib.figure", "train").Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot(xlabel="optimizer step", ylabel="bits per byte", title="bits per byte of a run")
    train = [(row["step"], row["bits_per_byte"]) for row in rows if "bits_per_byte" in row]
    tops = [4.5, *(references or {}).values()]  # the first steps may be far above
    if train:
        steps, bits = numpy.array(train).T
        axes.plot(steps, bits, color=_BLUE, alpha=0.2, linewidth=0.8)
        width = -(-len(bits) // 50)
        smooth = numpy.convolve(bits, numpy.full(width, 1 / width), "valid")
        axes.plot(steps[width - 1 :], smooth, color=_BLUE, alpha=0.6, label="training, smoothed")
        tops.append(float(numpy.percentile(bits, 95)))
    for final, style in {
        False: dict(color=_BLUE, marker="o", markersize=3, label="held-out, a sample of all"),
        True: dict(color=_BLUE, marker="*", markersize=9, linestyle="", label="held-out, all"),
    }.items():
        evaluations = [row for row in rows if "held_out_bits_per_byte" in row and bool(row.get("final")) == final]
        if evaluations:
            figures = [row["held_out_bits_per_byte"] for row in evaluations]
            axes.plot([row["step"] for row in evaluations], figures, **style)
            tops.append(min(figures))
    for (name, bits), style in zip((references or {}).items(), ("--", ":"), strict=False):
        axes.axhline(bits, color=_GREY, linestyle=style, label=f"{name} ({bits:.2f})")
    axes.set_ylim(top=1.02 * max(tops))
    axes.grid(alpha=0.3)
    if axes.has_data():
        axes.legend()
    with write_atomically(as_path("draw_metrics", "path", path)) as draft:
        figure.savefig(draft, format="png")
