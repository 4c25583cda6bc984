"""Claim f: each part of the architecture helps: without it the loss is higher."""

from typing import Any

from bench.plots import BLUE, GREY

from . import loss, models, verdict
from .runs import Session

TITLE = "Effect of each part"
RULE = (
    "MEGALODON and each model with one part exchanged are trained in the same way, at the learning rate that a sweep of a "
    "third of the tokens chose for MEGALODON. A part helps (held) if MEGALODON's held-out bits per byte in windows of a row "
    "are lower than those without the part by more than 3 standard errors over the seeds. The claim is held if every part "
    "helps."
)
SIZE, TOKENS, CHUNK = "1M", 4_000_000, 128
QUICK = ("100k", 40_000)


def run(session: Session, data: list[str] | None) -> None:
    size, tokens = QUICK if session.quick else (SIZE, TOKENS)
    settings = dict(size=size, chunk=CHUNK, data=data)
    rate = loss.train_by_sweep(session, f"{size} {models.MEGALODON}", tokens, model=models.MEGALODON, **settings)
    for model in models.ABLATIONS:
        loss.train_seeds(session, f"{size} {model}", tokens, rate, session.seeds(), model=model, **settings)


def verdicts(results: list[dict[str, Any]]) -> dict[str, str]:
    found = loss.figures(results, loss.window_bits)
    bits = {key.model: values for key, values in found.items()}
    ours = bits[models.MEGALODON]
    outcomes = {f"better than with {name}": verdict.decide_lower(ours, bits.get(name, [])) for name in models.ABLATIONS}
    return {"claim": verdict.combine([*outcomes.values()]), **outcomes}


table = loss.table


def plot(results: list[dict[str, Any]], figure: Any) -> None:
    axes = figure.add_subplot()
    found = loss.figures(results, loss.window_bits)
    names = [key.model for key in found]
    for key, values in found.items():
        colour = BLUE if key.model == models.MEGALODON else GREY
        axes.plot(values, [names.index(key.model)] * len(values), "o", color=colour)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel=next(iter(loss.FIGURES)), ylabel="model")
