"""Speed-up over the best path in plain torch for the same work, from the tables in bench/results.

A dot is the first row of a work and dtype, with all threads and a warm cache. A forward is left out if forward and
backward together have a row.
"""

from style import GREEN, INK, RED, panels

from bench.summary import RESULTS, Page

BENCHES = {"cema", "timestep_norm", "attention", "linear", "elementwise", "model"}


def rows(page: Page) -> dict[str, float]:
    """Return speed-ups by label: work, shape and dtype."""
    found = {}
    for line in page.lines:
        if line["bench"] not in BENCHES or line.get("cache") != "warm" or line["threads"] != page.cores:
            continue
        if line["times faster"]:
            names_the_op = "_" in line["work"] or line["bench"] in ("elementwise", "linear")
            work = line["work"] if names_the_op else f"{line['bench']}: {line['work']}"
            found.setdefault((work, line["type"]), (line["shape"], float(line["times faster"].strip("*"))))
    speedups = {}
    for (work, dtype), (shape, times) in found.items():
        if (f"{work} + backward", dtype) not in found:
            speedups[f"{work}\n{shape}, {dtype}"] = times
    return speedups


pages = [Page(path) for path in sorted(RESULTS.glob("*-cpu.md"))]
speedups = [rows(page) for page in pages]
newest = speedups[-1]
names = [name for name in newest if all(name in found for found in speedups)]
names.sort(key=newest.get, reverse=True)

figure, axes = panels(6.4, 0.5 * len(names) + 1)
height = 0.8 / len(pages)
for i, (page, found, colour) in enumerate(zip(pages, speedups, (GREEN, RED, INK))):
    y = [k + (i - (len(pages) - 1) / 2) * height for k in range(len(names))]
    axes.plot([found[name] for name in names], y, "o", color=colour, label=page.processor)
axes.axvline(1, color=INK, linewidth=1)
axes.set(xscale="log", xlabel="times faster than the best in plain torch", ylim=(len(names) - 0.4, -0.6))
axes.set_yticks(range(len(names)), names, fontsize=8.5)
axes.set_xticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
axes.minorticks_off()
axes.legend(loc="lower right")
figure.tight_layout()
