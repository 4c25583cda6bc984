"""The picture at the head of docs/claims.md: speed, memory and loss beside a Transformer's."""

from __future__ import annotations

from typing import Any

from . import loss, memory, models, speed

DRAWN = ("speed", "memory", "loss")
"""Claims whose results it shows"""


def plot(results: dict[str, list[dict[str, Any]]], figure: Any) -> None:
    """results: of each claim of DRAWN."""
    from matplotlib.lines import Line2D

    left, middle, right = figure.subplots(1, 3)
    speed.plot_rates(results["speed"], left)
    memory.plot_streams(results["memory"], middle)
    decisive = loss.of_the_claim(results["loss"])
    sizes = sorted({key.size for key in decisive})
    for key, values in loss.figures(results["loss"], loss.in_windows).items():
        if key in decisive:
            right.plot([key.size] * len(values), values, "o", color=models.COLOURS[key.model], fillstyle="none")
    right.set(
        xlim=(-0.5, len(sizes) - 0.5), xlabel="parameters", ylabel=f"bits per byte, windows of {loss.LENGTH} bytes"
    )
    for axes, title in zip((left, middle, right), ("Training speed", "Memory of a stream", "Held-out loss, 3 seeds")):
        axes.set_title(title)
    lines = [Line2D([], [], color=models.COLOURS[name], marker="o") for name in loss.BOTH]
    figure.legend(lines, ["MEGALODON", "Llama of the same size"], loc="outside lower center", ncols=2)
