"""Claim f: each part of the architecture does its share: without it the loss is higher."""

from __future__ import annotations

from typing import Any

from . import loss, models, verdict
from .runs import Session

TITLE = "What each part does"
RULE = (
    "MEGALODON and each model with one part exchanged train alike, by one learning rate, the one of MEGALODON in a sweep of "
    "a third of the tokens. A part helps (held) where the held-out bits per byte of MEGALODON in windows of a row are lower "
    "than those without the part, by more than 3 standard errors over the seeds. The claim is held where every part helps."
)
SIZE, TOKENS = "1M", 4_000_000
QUICK = ("100k", 40_000)


def run(session: Session, data: list[str] | None) -> None:
    size, tokens = QUICK if session.quick else (SIZE, TOKENS)
    rate = loss.train_seeds(session, models.MEGALODON, size, tokens, data)
    for name in models.ABLATIONS:
        for seed in session.seeds():
            session.run(
                f"{size} {name} seed={seed}", loss.work, loss.seconds(name, size, tokens, True), model=name, size=size, data=data,
                tokens=tokens, lr=rate, seed=seed, held_out=True,
            )  # fmt: skip


def verdicts(results: list[dict[str, Any]]) -> dict[str, str]:
    found = loss.figures(results, next(iter(loss.WHAT.values())))
    ((size, _), ours) = next((key, value) for key, value in found.items() if key[1] == models.MEGALODON)
    said = {f"better than with {name}": verdict.lower(ours, found.get((size, name), [])) for name in models.ABLATIONS}
    return {"claim": verdict.together([*said.values()]), **said}


table = loss.table


def plot(results: list[dict[str, Any]], figure: Any) -> None:
    axes = figure.add_subplot()
    found = loss.figures(results, next(iter(loss.WHAT.values())))
    names = sorted(name for _, name in found)
    for (_, name), values in found.items():
        axes.plot(
            values, [names.index(name)] * len(values), "o", color="tab:blue" if name == models.MEGALODON else "tab:gray"
        )
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel=next(iter(loss.WHAT)))
