"""Figure at the head of docs/claims.md: speed, memory and loss, compared with a Transformer's."""

from typing import Any

from . import loss, memory, models, speed

SHOWN_CLAIMS = ("speed", "memory", "loss")


def plot(results: dict[str, list[dict[str, Any]]], figure: Any) -> None:
    """results: the results of each of SHOWN_CLAIMS."""
    from matplotlib.lines import Line2D

    left, middle, right = figure.subplots(1, 3)
    speed.plot_rates(results["speed"], left)
    memory.plot_streams(results["memory"], middle)
    decisive = loss.decisive_keys(results["loss"])
    sizes = sorted({key.size for key in decisive})
    for key, values in loss.figures(results["loss"], loss.window_bits).items():
        if key in decisive:
            right.plot([key.size] * len(values), values, "o", color=models.COLOURS[key.model], fillstyle="none")
    right.set(
        xlim=(-0.5, len(sizes) - 0.5), xlabel="parameters", ylabel=f"bits per byte, windows of {loss.LENGTH} bytes"
    )
    for axes, title in zip((left, middle, right), ("Training speed", "Memory of a stream", "Held-out loss, 3 seeds")):
        axes.set_title(title)
    lines = [Line2D([], [], color=models.COLOURS[name], marker="o") for name in loss.MODELS]
    figure.legend(lines, ["MEGALODON", "Llama of the same size"], loc="outside lower center", ncols=2)
