"""Times faster than the best path in plain torch that does the same work, from the tables in bench/results.

A bar is a row of a bench's first table, for all threads and inputs that a call before has just used; of the rows of one
work and type, the first. Forwards whose backward has a row are left out.
"""

import re
from pathlib import Path

from style import BLUE, GREY, ORANGE, REPOSITORY, panels

RESULTS = REPOSITORY / "bench" / "results"
BENCHES = {"cema", "timestep_norm", "attention", "linear", "elementwise", "model"}


def rows(page: Path) -> tuple[str, dict[str, float]]:
    """The processor, and times faster by work, shape and type."""
    text = page.read_text()
    processor = re.search(r"- processor: (.*)", text)[1]
    threads = re.search(r"- cores: (\d+)", text)[1]
    found = {}
    for section in re.split(r"^## ", text, flags=re.M)[1:]:
        bench = section.split("\n")[0].strip()
        lines = [line.strip("| \n").split(" | ") for line in section.split("\n") if line.startswith("| ")]
        if bench not in BENCHES or not lines:
            continue
        header = [cell.strip() for cell in lines[0]]
        for cells in lines[2:]:
            row = dict(zip(header, (cell.strip() for cell in cells)))
            if cells == header or "path" in row or len(cells) != len(header):
                break  # the second table, of every path
            if row["threads"] == threads and row["cache"] == "warm" and row["times faster"]:
                named = "_" in row["work"] or bench in ("elementwise", "linear")  # the work's name has the op's
                work = row["work"] if named else f"{bench}: {row['work']}"
                found.setdefault((work, row["type"]), (row["shape"], float(row["times faster"].strip("*"))))
    found = {key: value for key, value in found.items() if (f"{key[0]} + backward", key[1]) not in found}
    found = {f"{work}\n{shape}, {dtype}": times for (work, dtype), (shape, times) in found.items()}
    return processor, found


pages = sorted(RESULTS.glob("*-cpu.md"))
by_processor = [rows(page) for page in pages]
names = [name for name in by_processor[-1][1] if all(name in found for _, found in by_processor)]
names = sorted(names, key=lambda name: -by_processor[-1][1][name])

figure, axes = panels(6.4, 0.5 * len(names) + 1)
height = 0.8 / len(by_processor)
for i, ((processor, found), colour) in enumerate(zip(by_processor, (ORANGE, BLUE, GREY))):
    y = [k + (i - (len(by_processor) - 1) / 2) * height for k in range(len(names))]
    axes.barh(y, [found[name] for name in names], height, color=colour, label=processor)
axes.axvline(1, color="#24292f", linewidth=1)
axes.set(xscale="log", xlabel="times faster than the best in plain torch", ylim=(len(names) - 0.4, -0.6))
axes.set_yticks(range(len(names)), names, fontsize=8.5)
axes.set_xticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
axes.minorticks_off()
axes.legend(loc="lower right")
figure.tight_layout()
