"""Tables, verdicts and plots of the claims, from the results on the disk alone."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

from .runs import duration, results, write


def report(claim: str, module: ModuleType, folder: Path) -> str | None:
    """Writes `<folder>.md` and `<folder>.png`; the page's text, or None where there are no results."""
    found = results(folder)
    if not found:
        return None
    page = "\n".join(page_of(claim, module, found, folder)) + "\n"
    write(folder.with_suffix(".md"), page)
    draw(module, found, folder.with_suffix(".png"))
    return page


def page_of(claim: str, module: ModuleType, found: list[dict[str, Any]], folder: Path) -> list[str]:
    said = module.verdicts(found)
    machines = sorted({f"{c['machine']['processor']}, threads: {c['machine']['threads']}" for c in found})
    versions = sorted(
        {
            f"megalodon_ops {c['machine']['megalodon_ops']}, torch {c['machine']['torch']}, transformers {c['machine']['transformers']}"
            for c in found
        }
    )
    dates = sorted(c["date"][:10] for c in found)
    spent = sum(c["seconds"] for c in found)
    quick = (
        ["", "**A quick run: it tests the programs, and says nothing of the claim.**"]
        if folder.name.endswith("-quick")
        else []
    )
    seeds = sorted({c["settings"]["seed"] for c in found if "seed" in c["settings"]})
    title = f"a quick run ({said['claim']})" if quick else said["claim"]
    return [
        f"# {module.TITLE}: {title}", *quick, "", module.RULE, "", *module.table(found), "",
        "| of this | is said |", "| --- | --- |", *(f"| {what} | {verdict} |" for what, verdict in said.items() if what != "claim"), "",
        f"![{module.TITLE}]({folder.name}.png)", "",
        f"`python -m bench.claims {claim}`, {len(found)} runs, {duration(spent)} in all, {dates[0]} to {dates[-1]}"
        + (f", seeds {', '.join(map(str, seeds))}" if seeds else "") + f"; {'; '.join(machines)}; {'; '.join(versions)}.",
    ]  # fmt: skip


def draw(module: ModuleType, found: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(9, 4.5), layout="constrained")
    module.plot(found, figure)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def axis_of_tokens(axes: Any, label: str) -> None:
    """Makes the axis of x one of numbers of tokens: powers of two, as 512, 1k, 1M."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda tokens, _: short(tokens))
    axes.set_xlabel(label)


def short(tokens: float) -> str:
    for size, letter in ((1 << 20, "M"), (1 << 10, "k")):
        if tokens >= size:
            return f"{tokens / size:g}{letter}"
    return f"{tokens:g}"
