"""Tokens a second of models of 25M parameters, from the newest page of bench/results: this package, the same model in plain
torch, and a Llama."""

import re

from matplotlib.patches import Patch
from style import BLUE, GREY, ORANGE, REPOSITORY, panels

PATHS = {"megalodon_ops": BLUE, "plain torch": GREY, "Llama": ORANGE}
WORK = {
    ("training step", "25M L 2048"): ("2,048 tokens", 2048),
    ("training step", "25M L 8192"): ("8,192", 8192),
    ("decode 16 tokens after 1000", "25M"): ("after 1,000", 16),
    ("decode 16 tokens after 32744", "25M"): ("32,744 tokens", 16),
}
"""Rows of the bench `model` in float32: what stands below their bars, and the tokens of a call"""
PAGE = sorted((REPOSITORY / "bench" / "results").glob("*-cpu.md"))[-1]


def tokens_a_second() -> dict[str, dict[str, float]]:
    """What the second table of the bench `model`, of every path, has of each work."""
    table = PAGE.read_text().partition("\n## model\n")[2].partition("Every path")[2]
    found = {label: {} for label, _ in WORK.values()}
    for line in table.splitlines():
        work, shape, dtype, path, milliseconds, *_ = [cell.strip() for cell in line.strip("|").split("|")] + [""] * 5
        if (work, shape) in WORK and dtype == "fp32" and path in PATHS:
            label, tokens = WORK[work, shape]
            found[label][path] = 1000 * tokens / float(milliseconds.replace(",", ""))
    return found


def draw(axes, title: str, groups: dict[str, dict[str, float]]) -> None:
    place, ticks = 0.0, []
    for label, rates in groups.items():
        ticks.append((place + (len(rates) - 1) / 2, label))
        for path, rate in rates.items():
            axes.bar(place, rate, width=0.92, color=PATHS[path])
            axes.text(place, rate, f"{rate:,.0f}", ha="center", va="bottom", fontsize=10)
            place += 1
        place += 0.7
    axes.set_xticks(*zip(*ticks))
    axes.set_yticks([])
    axes.tick_params(length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlim(-0.6, 5.3)
    axes.set_title(title, fontsize=11, loc="left", pad=14)


rates = tokens_a_second()
figure, both = panels(6.4, 3.4, columns=2)
for axes, title, labels in zip(both, ("training", "decoding"), (list(rates)[:2], list(rates)[2:])):
    draw(axes, f"{title}, tokens a second", {label: rates[label] for label in labels})
patches = [Patch(color=colour) for colour in PATHS.values()]
names = ["this package", "MEGALODON in plain torch", "Llama"]
figure.legend(patches, names, loc="lower left", bbox_to_anchor=(0, 0.06), ncols=3, handlelength=1, columnspacing=1.2)
processor = re.search(r"- processor: (.*)", PAGE.read_text())[1]
figure.text(0.015, 0.02, f"25M parameters, float32, two cores of an {processor}", color=GREY, fontsize=10)
figure.tight_layout(rect=(0, 0.16, 1, 1))
