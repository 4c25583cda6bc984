"""Claim a: trained on the same text, MEGALODON has a lower loss than a Transformer of as many parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from . import models, text, verdict
from .runs import Session
from .train import Recipe, bits_per_byte, config, estimate, train_on_text

TITLE = "Training loss against a Transformer"
RULE = (
    "At each size, bits per byte of the held-out text in windows of the length of a row are compared, and training losses, the "
    "mean of a run's last tenth. A learning rate is chosen for each model by a sweep of runs of a third of the tokens, by their "
    "training loss, which goes on by a factor of 2, twice at most, where the best is at the sweep's end. Held where MEGALODON's "
    "held-out figure is lower by more than 3 standard errors over the seeds at every size. Beside these, which decide nothing: each "
    "model at half its rate, at sizes but the smallest by one seed, and, at the smallest, MEGALODON in chunks of half a row."
)
RATES = (2e-3, 4e-3, 8e-3)
LONGER = 2
"""How often a sweep goes on beyond its ends"""
BOTH = (models.MEGALODON, models.LLAMA)
LENGTH, ROWS = 256, 32
"""Of a batch; MEGALODON's chunk is a row, which is what the Llama sees"""
TOKENS = {"1M": 10_000_000, "4M": 6_000_000}
QUICK = {"100k": 60_000}


def run(session: Session, data: list[str] | None) -> None:
    sizes = QUICK if session.quick else TOKENS
    smallest = next(iter(sizes))
    for size, tokens in sizes.items():
        for model in BOTH:
            settings = dict(model=model, size=size, chunk=LENGTH, data=data)
            rate = train_by_sweep(session, f"{size} {model}", tokens, **settings)
            seeds = session.seeds() if size == smallest else [session.seed]
            train_seeds(session, f"{size} {model} lr={rate / 2:g}", tokens, rate / 2, seeds, **settings)
    chunk = LENGTH // 2
    settings = dict(model=models.MEGALODON, size=smallest, chunk=chunk, data=data)
    train_by_sweep(session, f"{smallest} {models.MEGALODON} chunk={chunk}", sizes[smallest], **settings)


def train_by_sweep(session: Session, label: str, tokens: int, **settings: Any) -> float:
    """The sweep, then runs of all seeds by the best rate, which is returned; settings: model, size, chunk and data."""
    third = tokens // 3

    def at(rate: float) -> float | None:
        found = session.run(
            f"{label} sweep lr={rate:g}", work, seconds(third, **settings), **settings, tokens=third, lr=rate,
            seed=session.seed, held_out=False,
        )  # fmt: skip
        return None if found is None else as_figure(found["train_loss"])

    rate = sweep(at, RATES)
    train_seeds(session, label, tokens, rate, session.seeds(), **settings)
    return rate


def train_seeds(
    session: Session, label: str, tokens: int, rate: float, seeds: Iterable[int], **settings: Any
) -> None:  # fmt: skip
    """Runs at one rate, read on the held-out text."""
    for seed in seeds:
        session.run(
            f"{label} seed={seed}", work, seconds(tokens, held_out=True, **settings), **settings, tokens=tokens, lr=rate,
            seed=seed, held_out=True,
        )  # fmt: skip


def sweep(loss: Callable[[float], float | None], rates: tuple[float, ...], more: int = LONGER) -> float:
    """The rate of the lowest loss, of `rates` and up to `more` further ones while the best is at an end; where losses are only
    planned, which is None, the middle one or the best that has been run."""
    found = {rate: loss(rate) for rate in rates}
    if None in found.values():
        return rates[len(rates) // 2]
    for _ in range(more):
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


def seconds(tokens: int, *, model: str, size: str, chunk: int, data: Any, held_out: bool = False) -> float:
    """The held-out text is read in windows of a row, and as a whole, by the Llama twice: its windows overlap."""
    reading = HELD_OUT * (3 if model == models.LLAMA else 2) * held_out
    return estimate(size, chunk, model, tokens, LENGTH) + estimate(size, chunk, model, reading, LENGTH, training=False)


def work(
    scratch: Path, *, model: str, size: str, chunk: int, data: list[str] | None, tokens: int, lr: float, seed: int,
    held_out: bool,
) -> dict[str, Any]:  # fmt: skip
    corpus = text.documents(data)
    built = models.build(model, config(size, chunk), LENGTH // 2, seed)
    carries = model != models.LLAMA
    result = train_on_text(built, Recipe(tokens, ROWS, LENGTH, lr), corpus.train, scratch, seed=seed, carries=carries)
    result |= {"parameters": built.num_parameters(), "text": corpus.fingerprint}
    if held_out:
        documents = text.to_evaluate(corpus.held_out)
        bits = bits_per_byte(built, documents, [LENGTH], LENGTH)
        whole = bits_per_byte(built, documents, ["all"], 2048 if carries else LENGTH // 2)
        result["held_out_bits_per_byte"] = bits | whole
    return result


class Trained(NamedTuple):
    """What the runs of one row of the table have in common; they differ by their seeds."""

    size: str
    model: str
    chunk: int
    lr: float


def trained(settings: dict[str, Any]) -> Trained:
    return Trained(*(settings[name] for name in Trained._fields))


def figures(results: list[dict[str, Any]], pick: Callable[[dict[str, Any]], Any]) -> dict[Trained, list[float]]:
    """The figures of the seeds of all runs that were not for a sweep."""
    found: dict[Trained, list[float]] = {}
    for content in results:
        if content["settings"]["held_out"]:
            found.setdefault(trained(content["settings"]), []).append(as_figure(pick(content["result"])))
    return dict(sorted(found.items()))


def chosen(results: list[dict[str, Any]]) -> set[Trained]:
    """What the sweeps chose: of size, model and chunk, the rate of the lowest training loss."""
    swept: dict[tuple[str, str, int], dict[Trained, float]] = {}
    for content in results:
        if not content["settings"]["held_out"]:
            key = trained(content["settings"])
            swept.setdefault(key[:3], {})[key] = as_figure(content["result"]["train_loss"])
    return {min(losses, key=losses.get) for losses in swept.values()}


def of_the_claim(results: list[dict[str, Any]]) -> set[Trained]:
    """What the claim compares: of both models the sweep's rate, in chunks of a row."""
    return {key for key in chosen(results) if key.chunk == LENGTH}


def in_windows(result: dict[str, Any]) -> float | None:
    """Held-out bits per byte in windows of a row, by which the claim is decided."""
    return result["held_out_bits_per_byte"][str(LENGTH)]


FIGURES = {
    f"held out, context {LENGTH}, bits per byte": in_windows,
    "held out, whole past or sliding window, bits per byte": lambda result: result["held_out_bits_per_byte"]["all"],
    "training loss, nats a byte": lambda result: result["train_loss"],
}


def verdicts(results: list[dict[str, Any]]) -> dict[str, str]:
    decisive = of_the_claim(results)
    of_claim, beside, by_size = {}, {}, {}
    for what, pick in FIGURES.items():
        found = figures(results, pick)
        llamas = {key.size: found.get(key, []) for key in decisive if key.model == models.LLAMA}
        for key in found:
            if key.model != models.MEGALODON:
                continue
            outcome = verdict.lower(found[key], llamas.get(key.size, []))
            if key in decisive:
                of_claim[f"{key.size}, {what}"] = outcome
                by_size.setdefault(key.size, outcome)  # the first of FIGURES decides
            else:
                beside[f"{key.size} in chunks of {key.chunk} at the rate {key.lr:g}, {what}"] = outcome
    asked = TOKENS if by_size.keys() <= TOKENS.keys() else by_size
    claim = verdict.together([by_size.get(size, verdict.UNDECIDED) for size in asked])
    return {"claim": claim, **of_claim, **beside}


def table(results: list[dict[str, Any]]) -> list[str]:
    lines = ["| size | model | parameters | chunk | learning rate | seeds | " + " | ".join(FIGURES) + " |"]
    lines.append("|" + " --- |" * (6 + len(FIGURES)))
    found = [figures(results, pick) for pick in FIGURES.values()]
    parameters = {(c["settings"]["size"], c["settings"]["model"]): c["result"]["parameters"] for c in results}
    for key in found[0]:
        cells = [
            key.size, key.model, f"{parameters[key.size, key.model]:,}", "" if key.model == models.LLAMA else str(key.chunk),
            f"{key.lr:g}" + (", the sweep's" if key in chosen(results) else ""), str(len(found[0][key])),
            *(verdict.spread(of_what[key]) for of_what in found),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def plot(results: list[dict[str, Any]], figure: Any) -> None:
    axes = figure.add_subplot()
    decisive = of_the_claim(results)
    for content in results:
        settings = content["settings"]
        if settings["held_out"] and trained(settings) in decisive:
            steps, losses = zip(*content["result"]["curve"], strict=True)
            colour = models.COLOURS[settings["model"]]
            style = "-" if settings["size"] != "4M" else "--"
            axes.plot(steps, losses, style, color=colour, lw=0.8, label=f"{settings['model']} {settings['size']}")
    axes.set(xlabel="step", ylabel="training loss, nats a byte", yscale="log")
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    axes.legend(handles.values(), handles.keys())
