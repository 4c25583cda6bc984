"""Tokens a second at 25M parameters, from the newest page of bench/results: this package, plain torch, and a Llama."""

from style import BLUE, GREY, ORANGE, legend_below, panels

from bench.summary import MODELS, Page, newest, tokens_a_second

PATHS = {"megalodon_ops": BLUE, "plain torch": GREY, "Llama": ORANGE}
TRAINING = {"2,048 tokens": MODELS[0], "8,192 tokens": MODELS[1]}
DECODING = {"1,000 tokens": MODELS[-2], "32,744 tokens": MODELS[-1]}
"""Rows of the page of results, by the labels below their bars"""
PAGE = Page(newest())


def measured() -> dict[str, dict[str, float]]:
    """Return tokens a second in float32, by label and by path."""
    found = {}
    for label, work in (TRAINING | DECODING).items():
        (row,) = (row for row in PAGE.rows(work) if row.type == "fp32")
        times = zip(PATHS, (row.ours, row.torch, row.llama))
        found[label] = {path: tokens_a_second(time, work) for path, time in times if time}
    return found


def draw(axes, labels, *, title: str, xlabel: str) -> None:
    """Draw a group of bars for each label, and a bar for each path."""
    place = 0.0
    middles = []
    for label in labels:
        middles.append(place + (len(rates[label]) - 1) / 2)
        for path, rate in rates[label].items():
            axes.bar(place, rate, width=0.92, color=PATHS[path])
            axes.text(place, rate, f"{rate:,.0f}", ha="center", va="bottom", fontsize=10)
            place += 1
        place += 0.7
    axes.set_xticks(middles, labels)
    axes.tick_params(axis="x", length=0)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set(xlim=(-0.6, 5.3), xlabel=xlabel, ylabel="tokens a second")
    axes.set_title(title, fontsize=11, loc="left", pad=14)


rates = measured()  # readme.py stores them in the picture
figure, (left, right) = panels(6.8, 3.6, columns=2)
draw(left, TRAINING, title="training", xlabel="length of a row")
draw(right, DECODING, title="decoding", xlabel="context")
names = {"this package": BLUE, "MEGALODON in plain torch": GREY, "Llama": ORANGE}
legend_below(figure, names, f"25M parameters, float32, two cores of an {PAGE.processor}")
