"""Tables, verdicts and plots of the claims, from the results on disk alone."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from bench.records import write

from .runs import duration, results


def report(claim: str, module: ModuleType, path: Path) -> str | None:
    """Write a page and its plot beside the results in `path`; return the page, or None if there are no results."""
    found = [*results(path).values()]
    if not found:
        return None
    page = "\n".join(page_of(claim, module, found, path.stem)) + "\n"
    write(path.with_suffix(".md"), page)
    draw(partial(module.plot, found), path.with_suffix(".png"))
    return page


def page_of(claim: str, module: ModuleType, found: list[dict[str, Any]], name: str) -> list[str]:
    """Lines of a page whose plot is `<name>.png`."""
    verdicts = module.verdicts(found)
    decided = verdicts.pop("claim")
    machines = [content["machine"] for content in found]
    processors = sorted({f"{machine['processor']}, threads: {machine['threads']}" for machine in machines})
    packages = ("megalodon_ops", "torch", "transformers")
    versions = sorted({", ".join(f"{package} {machine[package]}" for package in packages) for machine in machines})
    dates = sorted(content["date"][:10] for content in found)
    spent = duration(sum(content["seconds"] for content in found))
    seeds = sorted({content["settings"]["seed"] for content in found if "seed" in content["settings"]})
    quick = []
    if name.endswith("-quick"):
        quick = ["", "**A quick run: it tests the programs and says nothing about the claim.**"]
    lines = [f"# {module.TITLE}: " + (f"a quick run ({decided})" if quick else decided), *quick, "", module.RULE, ""]
    lines += [*module.table(found), "", "| comparison | verdict |", "| --- | --- |"]
    lines += [f"| {comparison} | {verdict} |" for comparison, verdict in verdicts.items()]
    runs = f"{len(found)} runs, {spent} in all, {dates[0]} to {dates[-1]}"
    runs += f", seeds {', '.join(map(str, seeds))}" if seeds else ""
    runs += f"; {'; '.join(processors)}; {'; '.join(versions)}."
    return [*lines, "", f"![{module.TITLE}]({name}.png)", "", f"`python -m bench.claims {claim}`, {runs}"]


def draw(plot: Callable[[Any], None], path: Path) -> None:
    """Save the figure that `plot` draws."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(9, 4.5), layout="constrained")
    plot(figure)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def axis_of_tokens(axes: Any, label: str) -> None:
    """Label the x axis in tokens at powers of two, as 512, 1k, 1M."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda tokens, _: short_number(tokens))
    axes.set_xlabel(label)


def short_number(tokens: float) -> str:
    for size, letter in ((1 << 20, "M"), (1 << 10, "k")):
        if tokens >= size:
            return f"{tokens / size:g}{letter}"
    return f"{tokens:g}"
