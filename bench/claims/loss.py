"""Claim a: trained on the same text, MEGALODON has a lower loss than a Transformer with as many parameters."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from bench.plots import plain_ticks

from . import models, text, verdict
from .runs import Session
from .train import Recipe, bits_per_byte, config, estimate, train_on_text

TITLE = "Training loss against a Transformer"
RULE = (
    "At each size, the models' bits per byte of held-out text in windows of a row are compared, and their training losses, the "
    "mean of a run's last tenth. Each model's learning rate is chosen by a sweep of runs of a third of the tokens, by training "
    "loss; while the best rate is at an end, the sweep continues by a factor of 2, at most twice. Held if MEGALODON's held-out "
    "figure is lower by more than 3 standard errors over the seeds at every size. Also shown, without deciding: each model at half "
    "its rate, with one seed except at the smallest size; and, at the smallest size, MEGALODON in chunks of half a row."
)
RATES = (2e-3, 4e-3, 8e-3)
EXTRA_RATES = 2
"""Rates that a sweep may add beyond its ends"""
MODELS = (models.MEGALODON, models.LLAMA)
LENGTH, ROWS = 256, 32
"""Shape of a batch; MEGALODON's chunk is a row, which is what the Llama sees"""
TOKENS = {"1M": 10_000_000, "4M": 6_000_000}
QUICK = {"100k": 60_000}


def run(session: Session, data: list[str] | None) -> None:
    sizes = QUICK if session.quick else TOKENS
    smallest = next(iter(sizes))
    for size, tokens in sizes.items():
        for model in MODELS:
            settings = dict(model=model, size=size, chunk=LENGTH, data=data)
            rate = train_by_sweep(session, f"{size} {model}", tokens, **settings)
            seeds = session.seeds() if size == smallest else [session.seed]
            train_seeds(session, f"{size} {model} lr={rate / 2:g}", tokens, rate / 2, seeds, **settings)
    chunk = LENGTH // 2
    settings = dict(model=models.MEGALODON, size=smallest, chunk=chunk, data=data)
    train_by_sweep(session, f"{smallest} {models.MEGALODON} chunk={chunk}", sizes[smallest], **settings)


def train_by_sweep(session: Session, label: str, tokens: int, **settings: Any) -> float:
    """Sweep the rate, run all seeds at the best, and return it; settings: model, size, chunk and data."""
    third = tokens // 3

    def train_loss(rate: float) -> float | None:
        run = dict(tokens=third, lr=rate, seed=session.seed, held_out=False)
        found = session.run(f"{label} sweep lr={rate:g}", work, seconds(third, **settings), **settings, **run)
        return None if found is None else as_figure(found["train_loss"])

    rate = sweep(train_loss, RATES)
    train_seeds(session, label, tokens, rate, session.seeds(), **settings)
    return rate


def train_seeds(session: Session, label: str, tokens: int, rate: float, seeds: Iterable[int], **settings: Any) -> None:
    """Run the seeds at one rate, and evaluate them on the held-out text."""
    estimated = seconds(tokens, held_out=True, **settings)
    for seed in seeds:
        run = dict(tokens=tokens, lr=rate, seed=seed, held_out=True)
        session.run(f"{label} seed={seed}", work, estimated, **settings, **run)


def sweep(loss: Callable[[float], float | None], rates: tuple[float, ...], extra: int = EXTRA_RATES) -> float:
    """Return the rate of the lowest loss, of `rates` and up to `extra` further ones while the best is at an end.

    A loss is None if its run is only planned: return the middle rate, or the best rate so far.
    """
    found = {rate: loss(rate) for rate in rates}
    if None in found.values():
        return rates[len(rates) // 2]
    for _ in range(extra):
        best = min(found, key=found.get)
        if min(found) < best < max(found):
            break
        further = best / 2 if best == min(found) else 2 * best
        figure = loss(further)
        if figure is None:
            break
        found[further] = figure
    return min(found, key=found.get)


def as_figure(value: float | None) -> float:
    return float("inf") if value is None else value


HELD_OUT = 600_000
"""Approximate number of held-out bytes of the standard library"""


def seconds(tokens: int, *, model: str, size: str, chunk: int, data: Any, held_out: bool = False) -> float:
    """Estimate for training and for held-out text in windows of a row and as a whole; the Llama reads the latter twice."""
    passes = (3 if model == models.LLAMA else 2) if held_out else 0
    reading = HELD_OUT * passes
    return estimate(size, chunk, model, tokens, LENGTH) + estimate(size, chunk, model, reading, LENGTH, training=False)


def work(
    scratch: Path, *, model: str, size: str, chunk: int, data: list[str] | None, tokens: int, lr: float, seed: int,
    held_out: bool,
) -> dict[str, Any]:  # fmt: skip
    corpus = text.documents(data)
    net = models.build(model, config(size, chunk), LENGTH // 2, seed)
    carries = model != models.LLAMA
    recipe = Recipe(tokens=tokens, rows=ROWS, length=LENGTH, lr=lr)
    result = train_on_text(net, recipe, corpus.train, scratch, seed=seed, carries=carries)
    result |= {"parameters": net.num_parameters(), "text": corpus.fingerprint}
    if held_out:
        documents = text.to_evaluate(corpus.held_out)
        bits = bits_per_byte(net, documents, [LENGTH], LENGTH)
        whole = bits_per_byte(net, documents, ["all"], 2048 if carries else LENGTH // 2)
        result["held_out_bits_per_byte"] = bits | whole
    return result


class RunKey(NamedTuple):
    """Settings shared by the runs of one table row, which differ by their seeds."""

    size: str
    model: str
    chunk: int
    lr: float


def run_key(settings: dict[str, Any]) -> RunKey:
    return RunKey(*(settings[name] for name in RunKey._fields))


def figures(results: list[dict[str, Any]], pick: Callable[[dict[str, Any]], Any]) -> dict[RunKey, list[float]]:
    """Figures of the seeds by key, without the sweep's runs."""
    found: dict[RunKey, list[float]] = {}
    for content in results:
        if content["settings"]["held_out"]:
            found.setdefault(run_key(content["settings"]), []).append(as_figure(pick(content["result"])))
    return dict(sorted(found.items()))


def chosen_keys(results: list[dict[str, Any]]) -> set[RunKey]:
    """Choices of the sweeps: for each size, model and chunk, the rate of the lowest training loss."""
    swept: dict[tuple[str, str, int], dict[RunKey, float]] = {}
    for content in results:
        if not content["settings"]["held_out"]:
            key = run_key(content["settings"])
            swept.setdefault(key[:3], {})[key] = as_figure(content["result"]["train_loss"])
    return {min(losses, key=losses.get) for losses in swept.values()}


def decisive_keys(results: list[dict[str, Any]]) -> set[RunKey]:
    """Keys that decide the claim: both models at the sweep's rate, in chunks of a row."""
    return {key for key in chosen_keys(results) if key.chunk == LENGTH}


def window_bits(result: dict[str, Any]) -> float | None:
    """Held-out bits per byte in windows of a row, which decide the claim."""
    return result["held_out_bits_per_byte"][str(LENGTH)]


FIGURES = {
    f"held out, context {LENGTH}, bits per byte": window_bits,
    "held out, whole past or sliding window, bits per byte": lambda result: result["held_out_bits_per_byte"]["all"],
    "training loss, nats a byte": lambda result: result["train_loss"],
}


def verdicts(results: list[dict[str, Any]]) -> dict[str, str]:
    decisive = decisive_keys(results)
    deciding, others, by_size = {}, {}, {}
    for name, pick in FIGURES.items():
        found = figures(results, pick)
        llamas = {key.size: found.get(key, []) for key in decisive if key.model == models.LLAMA}
        for key in found:
            if key.model != models.MEGALODON:
                continue
            outcome = verdict.decide_lower(found[key], llamas.get(key.size, []))
            if key in decisive:
                deciding[f"{key.size}, {name}"] = outcome
                by_size.setdefault(key.size, outcome)  # the first of FIGURES decides
            else:
                others[f"{key.size} in chunks of {key.chunk} at the rate {key.lr:g}, {name}"] = outcome
    sizes = TOKENS if by_size.keys() <= TOKENS.keys() else by_size
    claim = verdict.combine([by_size.get(size, verdict.UNDECIDED) for size in sizes])
    return {"claim": claim, **deciding, **others}


def table(results: list[dict[str, Any]]) -> list[str]:
    lines = ["| size | model | parameters | chunk | learning rate | seeds | " + " | ".join(FIGURES) + " |"]
    lines.append("|" + " --- |" * (6 + len(FIGURES)))
    found = [figures(results, pick) for pick in FIGURES.values()]
    parameters = {(c["settings"]["size"], c["settings"]["model"]): c["result"]["parameters"] for c in results}
    for key in found[0]:
        chunk = "" if key.model == models.LLAMA else str(key.chunk)
        rate = f"{key.lr:g}" + (", the sweep's" if key in chosen_keys(results) else "")
        cells = [key.size, key.model, f"{parameters[key.size, key.model]:,}", chunk, rate, str(len(found[0][key]))]
        lines.append("| " + " | ".join([*cells, *(verdict.spread(by_key[key]) for by_key in found)]) + " |")
    return lines


def plot(results: list[dict[str, Any]], figure: Any) -> None:
    axes = figure.add_subplot()
    decisive = decisive_keys(results)
    for content in results:
        settings = content["settings"]
        if settings["held_out"] and run_key(settings) in decisive:
            steps, losses = zip(*content["result"]["curve"], strict=True)
            colour = models.COLOURS[settings["model"]]
            style = "-" if settings["size"] != "4M" else "--"
            axes.plot(steps, losses, style, color=colour, lw=0.8, label=f"{settings['model']} {settings['size']}")
    axes.set(xlabel="optimizer step", ylabel="training loss, nats a byte", yscale="log")
    plain_ticks(axes.yaxis)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    axes.legend(handles.values(), handles.keys())
