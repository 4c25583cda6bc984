"""Pictures of an evaluation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from megalodon_ops import extras
from megalodon_ops.evaluation import Evaluation
from megalodon_ops.model.files import write_atomically

FORMATS = (".png", ".pdf", ".svg")


def draw_by_position(path: Path, evaluations: Sequence[Evaluation], unit: str) -> None:
    """Bits of a prediction against the tokens that it is made from, a line for each context, each named by its mean.

    unit: what a token is.
    """
    figure = extras.load("matplotlib.figure", "train").Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot(
        xlabel=f"{unit}s of context", ylabel=f"bits per {unit}", title="loss by position", xscale="log"
    )
    for evaluation in evaluations:
        bins = evaluation.by_position
        middles = [math.sqrt(bin.first * bin.last) for bin in bins]
        bits = [bin.nats / math.log(2) / bin.tokens for bin in bins]
        mean = evaluation.nats / math.log(2) / evaluation.tokens
        label = evaluation.context if evaluation.context == "all" else f"{evaluation.context:,}"
        axes.plot(middles, bits, marker=".", markersize=4, label=f"context {label} (mean {mean:.3f})")
    axes.grid(alpha=0.3)
    axes.legend()
    with write_atomically(path) as draft:
        figure.savefig(draft, format=path.suffix[1:])
