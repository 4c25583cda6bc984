"""Claim a: trained on the same text, MEGALODON has a lower loss than a Transformer of as many parameters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import models, text, verdict
from .runs import Session
from .train import Recipe, bits_per_byte, config, estimate, train_on_text

TITLE = "Training loss against a Transformer"
RULE = (
    "At each size, bits per byte of the held-out text in windows of the length of a row are compared, and training losses, the "
    "mean of a run's last tenth. A learning rate is chosen for each model by a sweep of runs of a third of the tokens, by their "
    "training loss, which goes on by a factor of 2, twice at most, where the best is at the sweep's end. Held where MEGALODON's "
    "held-out figure is lower by more than 3 standard errors over the seeds at every size."
)
RATES = (2e-3, 4e-3, 8e-3)
LONGER = 2
"""How often a sweep goes on beyond its ends"""
BOTH = (models.MEGALODON, models.LLAMA)
CHUNK, LENGTH, ROWS = 128, 256, 32
TOKENS = {"1M": 10_000_000, "4M": 6_000_000}
QUICK = {"100k": 60_000}


def run(session: Session, data: list[str] | None) -> None:
    for size, tokens in (QUICK if session.quick else TOKENS).items():
        for name in BOTH:
            train_seeds(session, name, size, tokens, data)


def train_seeds(session: Session, name: str, size: str, tokens: int, data: list[str] | None, seeds: int = 3) -> float:
    """The sweep, then runs of all seeds by the best rate, which is returned."""
    common = dict(model=name, size=size, data=data)
    third = tokens // 3

    def at(rate: float) -> float | None:
        found = session.run(
            f"{size} {name} sweep lr={rate:g}", work, seconds(name, size, third), **common, tokens=third, lr=rate,
            seed=session.seed, held_out=False,
        )  # fmt: skip
        return None if found is None else as_figure(found["train_loss"])

    rate = sweep(at, RATES)
    for seed in session.seeds(seeds):
        session.run(
            f"{size} {name} seed={seed}", work, seconds(name, size, tokens, True), **common, tokens=tokens, lr=rate, seed=seed,
            held_out=True,
        )  # fmt: skip
    return rate


def sweep(loss: Callable[[float], float | None], rates: tuple[float, ...]) -> float:
    """The rate of the lowest loss; where losses are only planned, which is None, the middle one or the best that has been run."""
    found = {rate: loss(rate) for rate in rates}
    if None in found.values():
        return rates[len(rates) // 2]
    for _ in range(LONGER):
        best = min(found, key=found.get)
        further = best / 2 if best == min(found) else 2 * best if best == max(found) else None
        figure = None if further is None else loss(further)
        if figure is None:
            break
        found[further] = figure
    return min(found, key=found.get)


def as_figure(value: float | None) -> float:
    return float("inf") if value is None else value


HELD_OUT = 600_000
"""Bytes of the standard library that are held out, about"""


def seconds(name: str, size: str, tokens: int, held_out: bool = False) -> float:
    """The held-out text is read in windows of a row, and as a whole, by the Llama twice: its windows overlap."""
    reading = HELD_OUT * (3 if name == models.LLAMA else 2) * held_out
    return estimate(size, CHUNK, name, tokens, LENGTH) + estimate(size, CHUNK, name, reading, LENGTH, training=False)


def work(
    scratch: Path, *, model: str, size: str, tokens: int, lr: float, seed: int, data: list[str] | None, held_out: bool
) -> dict[str, Any]:
    corpus = text.documents(data)
    built = models.build(model, config(size, CHUNK), LENGTH // 2, seed)
    carries = model != models.LLAMA
    result = train_on_text(built, Recipe(tokens, ROWS, LENGTH, lr), corpus.train, scratch, seed=seed, carries=carries)
    result |= {"parameters": built.num_parameters(), "text": corpus.fingerprint}
    if held_out:
        bits = bits_per_byte(built, corpus.held_out, [LENGTH], LENGTH)
        whole = bits_per_byte(built, corpus.held_out, ["all"], 2048 if carries else LENGTH // 2)
        result["held_out_bits_per_byte"] = bits | whole
    return result


def figures(results: list[dict[str, Any]], pick: Callable[[dict[str, Any]], Any]) -> dict[tuple[str, str], list[float]]:
    """By size and model, the figures of the seeds of the runs that were not for the sweep."""
    found: dict[tuple[str, str], list[float]] = {}
    for content in results:
        settings = content["settings"]
        if settings["held_out"]:
            found.setdefault((settings["size"], settings["model"]), []).append(as_figure(pick(content["result"])))
    return found


WHAT = {
    f"held out, context {LENGTH}, bits per byte": lambda result: result["held_out_bits_per_byte"][str(LENGTH)],
    "held out, whole past or sliding window, bits per byte": lambda result: result["held_out_bits_per_byte"]["all"],
    "training loss, nats a byte": lambda result: result["train_loss"],
}


def verdicts(results: list[dict[str, Any]]) -> dict[str, str]:
    said: dict[str, str] = {}
    for what, pick in WHAT.items():
        found = figures(results, pick)
        for size in sorted({size for size, _ in found}):
            ours, others = found.get((size, models.MEGALODON), []), found.get((size, models.LLAMA), [])
            said[f"{size}, {what}"] = verdict.lower(ours, others)
    first = [said[key] for key in said if key.endswith(next(iter(WHAT)))]
    sizes = {content["settings"]["size"] for content in results}
    not_run = [verdict.UNDECIDED for size in TOKENS if size not in sizes and sizes <= TOKENS.keys()]
    return {"claim": verdict.together(first + not_run), **said}


def table(results: list[dict[str, Any]]) -> list[str]:
    lines = ["| size | model | parameters | learning rate | seeds | " + " | ".join(WHAT) + " |"]
    lines.append("|" + " --- |" * (5 + len(WHAT)))
    found = [figures(results, pick) for pick in WHAT.values()]
    for size, model in sorted(found[0]):
        of_run = [c for c in results if (c["settings"]["size"], c["settings"]["model"]) == (size, model)]
        last = next(c for c in of_run if c["settings"]["held_out"])
        cells = [
            size, model, f"{last['result']['parameters']:,}", f"{last['settings']['lr']:g}",
            str(len(found[0][size, model])), *(verdict.spread(of_what[size, model]) for of_what in found),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def plot(results: list[dict[str, Any]], figure: Any) -> None:
    axes = figure.add_subplot()
    for content in results:
        settings = content["settings"]
        if settings["held_out"]:
            steps, losses = zip(*content["result"]["curve"], strict=True)
            colour = models.COLOURS[settings["model"]]
            style = "-" if settings["size"] != "4M" else "--"
            axes.plot(steps, losses, style, color=colour, lw=0.8, label=f"{settings['model']} {settings['size']}")
    axes.set(xlabel="step", ylabel="training loss, nats a byte", yscale="log")
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    axes.legend(handles.values(), handles.keys())
