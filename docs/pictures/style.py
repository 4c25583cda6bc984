"""Style of the pictures: colours, axes without a frame, boxes and arrows."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Patch

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))
from bench.plots import BLUE, GREEN, GREY, INK, LIGHT, ORANGE, RED, plain_ticks  # noqa: E402, F401

SEQUENCES = [GREEN, RED, INK]

_FONT = {"font.size": 11, "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK}
_AXES = {"axes.edgecolor": GREY, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}


def panels(width: float, height: float, columns: int = 1) -> tuple[Figure, Axes]:
    """Create a figure of `width` by `height` inches for plots, and its axes, side by side."""
    plt.rcParams.update(_FONT | _AXES)
    return plt.subplots(1, columns, figsize=(width, height))


def sheet(width: float, height: float, x: tuple[float, float], y: tuple[float, float]) -> Axes:
    """Create axes of `width` by `height` inches to draw on, without ticks or a fixed aspect."""
    plt.rcParams.update(_FONT)
    figure = plt.figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(*x)
    axes.set_ylim(*y)
    axes.axis("off")
    return axes


def legend_below(figure: Figure, colours: dict[str, str], note: str) -> None:
    """Draw a row of names with their colours below the plots, and a note below it."""
    patches = [Patch(color=colour, label=name) for name, colour in colours.items()]
    place = dict(loc="lower left", bbox_to_anchor=(0, 0.06), ncols=len(patches))
    figure.legend(handles=patches, **place, handlelength=1, columnspacing=1.2)
    figure.text(0.015, 0.02, note, color=GREY, fontsize=10)
    figure.tight_layout(rect=(0, 0.16, 1, 1))


def new_cema() -> tuple:
    """Return a new ComplexEMA and, for four of its channels: angle, number and colour."""
    import megalodon_ops as mo
    import torch

    torch.manual_seed(3)
    layer = mo.ComplexEMA(512, ndim=16)
    by_angle = layer.theta.flatten().argsort()
    channels = []
    for quantile, colour in zip((0.05, 0.5, 0.8, 0.97), (BLUE, ORANGE, GREEN, RED)):
        channel = by_angle[int(quantile * 512)]
        channels.append((f"{layer.theta[channel].sigmoid().item():.2g} turns", channel, colour))
    return layer, channels


def box(axes: Axes, x: float, y: float, text: str, width: float, height: float = 0.62, colour: str = LIGHT) -> None:
    """Draw a box with rounded corners, centred at (x, y)."""
    corner = (x - width / 2, y - height / 2)
    style = "round,pad=0,rounding_size=0.12"
    axes.add_patch(FancyBboxPatch(corner, width, height, boxstyle=style, facecolor=colour, edgecolor=GREY, zorder=3))
    axes.text(x, y, text, ha="center", va="center", zorder=4)


def arrow(axes: Axes, *points: tuple[float, float], colour: str = INK, width: float = 1.3) -> None:
    """Draw a line through the points, with a head at the last."""
    x = [point[0] for point in points]
    y = [point[1] for point in points]
    axes.plot(x, y, color=colour, linewidth=width, zorder=2, solid_capstyle="round")
    style = {"arrowstyle": "-|>", "color": colour, "linewidth": width, "shrinkB": 0}
    axes.annotate("", xy=points[-1], xytext=points[-2], zorder=2, arrowprops=style)


def node(axes: Axes, x: float, y: float, text: str) -> None:
    """Draw a small circle with an operator."""
    axes.plot(x, y, "o", markersize=17, color="white", markeredgecolor=GREY, zorder=3)
    axes.text(x, y - 0.02, text, ha="center", va="center", zorder=4, fontsize=13)
