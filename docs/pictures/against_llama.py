"""Tokens a second at 25M parameters, from the newest page of bench/results: this package, plain torch, and a Llama."""

from matplotlib.patches import Patch
from style import BLUE, GREY, ORANGE, panels

from bench.summary import MODELS, Page, newest, tokens_a_second

PATHS = {"megalodon_ops": BLUE, "plain torch": GREY, "Llama": ORANGE}
WORKS = dict(zip(("2,048 tokens", "8,192 tokens", "1,000 tokens", "32,744 tokens"), (*MODELS[:2], *MODELS[-2:])))
"""Works by the labels below their bars"""
AXES = {"training": "length of a row", "decoding": "context"}
PAGE = Page(newest())


def measured() -> dict[str, dict[str, float]]:
    """Return tokens a second in float32, by the works' labels and by path."""
    found = {}
    for label, work in WORKS.items():
        (row,) = (row for row in PAGE.rows(work) if row.type == "fp32")
        times = zip(PATHS, (row.ours, row.torch, row.llama))
        found[label] = {path: tokens_a_second(time, work) for path, time in times if time}
    return found


def draw(axes, work: str, groups: dict[str, dict[str, float]]) -> None:
    place, ticks = 0.0, []
    for label, rates in groups.items():
        ticks.append((place + (len(rates) - 1) / 2, label))
        for path, rate in rates.items():
            axes.bar(place, rate, width=0.92, color=PATHS[path])
            axes.text(place, rate, f"{rate:,.0f}", ha="center", va="bottom", fontsize=10)
            place += 1
        place += 0.7
    axes.set_xticks(*zip(*ticks))
    axes.tick_params(axis="x", length=0)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set(xlim=(-0.6, 5.3), xlabel=AXES[work], ylabel="tokens a second")
    axes.set_title(work, fontsize=11, loc="left", pad=14)


rates = measured()
figure, both = panels(6.8, 3.6, columns=2)
for axes, work, labels in zip(both, AXES, (list(rates)[:2], list(rates)[2:])):
    draw(axes, work, {label: rates[label] for label in labels})
patches = [Patch(color=colour) for colour in PATHS.values()]
names = ["this package", "MEGALODON in plain torch", "Llama"]
figure.legend(patches, names, loc="lower left", bbox_to_anchor=(0, 0.06), ncols=3, handlelength=1, columnspacing=1.2)
figure.text(0.015, 0.02, f"25M parameters, float32, two cores of an {PAGE.processor}", color=GREY, fontsize=10)
figure.tight_layout(rect=(0, 0.16, 1, 1))
