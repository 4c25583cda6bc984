"""The picture of a run's metrics."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import matplotlib
import numpy
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..model.files import write_whole


def draw_metrics(
    path: str | os.PathLike, rows: list[dict[str, Any]], references: dict[str, float] | None = None
) -> None:
    """Draws bits per byte against steps, in training and on held-out text, as a PNG file.

    rows: those that `read_metrics` gives, with `bits_per_byte` or `held_out_bits_per_byte`, and `final` where the figure
    is of all held-out text. references: figures to compare with, by name.
    """
    train = [(row["step"], row["bits_per_byte"]) for row in rows if "bits_per_byte" in row]
    looks = [row for row in rows if "held_out_bits_per_byte" in row]
    held_out, final = (
        [(row["step"], row["held_out_bits_per_byte"]) for row in looks if bool(row.get("final")) == whole]
        for whole in (False, True)
    )
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="step", ylabel="bits per byte", title="next-token loss, in bits per byte")
    if train:
        steps, bits = numpy.array(train).T
        axes.plot(steps, bits, color="tab:blue", alpha=0.25, linewidth=0.8)
        axes.plot(steps, _smooth(bits), color="tab:blue", label="training, smoothed")
        axes.set_ylim(top=max(4.5, float(numpy.percentile(bits, 95))))
    if held_out:
        axes.plot(
            *numpy.array(held_out).T, color="tab:orange", marker="o", markersize=3, label="held-out, a sample of all"
        )
    if final:
        axes.plot(*numpy.array(final).T, color="tab:red", marker="*", markersize=9, linestyle="", label="held-out, all")
    for (name, bits), style in zip((references or {}).items(), ("--", ":"), strict=False):
        axes.axhline(bits, color="gray", linestyle=style, label=f"{name} ({bits:.2f})")
    axes.grid(alpha=0.3)
    if axes.has_data():
        axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": f"matplotlib {matplotlib.__version__}"})
    write_whole(Path(path), picture.getvalue())


def _smooth(values: numpy.ndarray) -> numpy.ndarray:
    """The mean over a window of up to a fiftieth of the run that ends at each value."""
    width = max(1, len(values) // 50)
    sums = numpy.concatenate(([0.0], numpy.cumsum(values)))
    ends = numpy.arange(1, len(values) + 1)
    starts = numpy.maximum(ends - width, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)
