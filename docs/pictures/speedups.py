"""Speed-up over the best path in plain torch for the same work, from the tables in bench/results.

A dot is a row of a bench's first table, with all threads and a warm cache; of the rows of one work and type, the first.
Forwards whose backward has a row are left out.
"""

from style import GREEN, INK, RED, panels

from bench.summary import RESULTS, Page

BENCHES = {"cema", "timestep_norm", "attention", "linear", "elementwise", "model"}


def rows(page: Page) -> dict[str, float]:
    """Return speed-ups by work, shape and type."""
    found = {}
    for line in page.lines:
        if line["bench"] not in BENCHES or line.get("cache") != "warm" or line["threads"] != page.cores:
            continue
        if line["times faster"]:
            named = "_" in line["work"] or line["bench"] in ("elementwise", "linear")  # the work's name has the op's
            work = line["work"] if named else f"{line['bench']}: {line['work']}"
            found.setdefault((work, line["type"]), (line["shape"], float(line["times faster"].strip("*"))))
    found = {key: value for key, value in found.items() if (f"{key[0]} + backward", key[1]) not in found}
    return {f"{work}\n{shape}, {dtype}": times for (work, dtype), (shape, times) in found.items()}


pages = [Page(path) for path in sorted(RESULTS.glob("*-cpu.md"))]
by_processor = [(page.processor, rows(page)) for page in pages]
names = [name for name in by_processor[-1][1] if all(name in found for _, found in by_processor)]
names = sorted(names, key=lambda name: -by_processor[-1][1][name])

figure, axes = panels(6.4, 0.5 * len(names) + 1)
height = 0.8 / len(by_processor)
for i, ((processor, found), colour) in enumerate(zip(by_processor, (GREEN, RED, INK))):
    y = [k + (i - (len(by_processor) - 1) / 2) * height for k in range(len(names))]
    axes.plot([found[name] for name in names], y, "o", color=colour, label=processor)
axes.axvline(1, color=INK, linewidth=1)
axes.set(xscale="log", xlabel="times faster than the best in plain torch", ylim=(len(names) - 0.4, -0.6))
axes.set_yticks(range(len(names)), names, fontsize=8.5)
axes.set_xticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
axes.minorticks_off()
axes.legend(loc="lower right")
figure.tight_layout()
