"""Claim d: on tasks that ask for memory and for tracking a state, MEGALODON does as well as a Transformer, or better."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from torch import nn

from . import loss, models, text, verdict
from .runs import Session
from .tasks import NONE, TASKS
from .train import Recipe, config, estimate, train

TITLE = "Tasks"
RULE = (
    "Each task is trained at one length and asked at this length and at 2, 4 and 8 times it, MQAR at more pairs too. A learning "
    "rate is chosen for each model and task by a run at each of three. At each length, better or worse is a difference of the "
    "share of right targets by more than 5 standard errors over the seeds and by more than 0.05. The claim is held where "
    "MEGALODON is worse nowhere and better somewhere, and not held where it is worse anywhere. MEGALODON's chunk is the "
    "trained length. Beside this, MEGALODON in chunks of a quarter of that length, which decides nothing."
)
SIZE, BATCH, RATES, LEAST = "100k", 32, (1e-3, 4e-3, 16e-3), 0.05
STEPS, ASKED = 3000, 512
QUICK = ("tiny", 12, 32)
TIMES = (1, 2, 4, 8)
GENERATING = {"listops": 0.05}
"""Seconds that a batch's examples take to generate, where it shows"""
OF_EVALUATION = 1 << 32
"""Added to a seed, so that no example of training is asked"""


class Entrant(NamedTuple):
    """A model as it takes part in a task."""

    model: str
    chunk: int
    """MEGALODON's; of the Llama, the length that it is trained on"""

    @property
    def label(self) -> str:
        return self.model if self in COMPARED else f"{self.model} chunk={self.chunk}"


OURS, THEIRS = COMPARED = Entrant(models.MEGALODON, 128), Entrant(models.LLAMA, 128)
BESIDE = Entrant(models.MEGALODON, 32)
ENTRANTS = (*COMPARED, BESIDE)


def run(session: Session, data: list[str] | None) -> None:
    for task, entrant in [*itertools.product(TASKS, COMPARED), *itertools.product(TASKS, (BESIDE,))]:
        train_by_sweep(session, task, entrant, data)


def train_by_sweep(session: Session, task: str, entrant: Entrant, data: list[str] | None) -> None:
    """The first seed at each rate, then the others at the rate of the lowest training loss."""
    first, *others = session.seeds()
    found = {rate: train_once(session, task, entrant, data, rate, first) for rate in RATES}
    losses = {rate: loss.as_figure(result["train_loss"]) for rate, result in found.items() if result is not None}
    rate = min(losses, key=losses.get) if losses else RATES[0]
    for seed in others:
        train_once(session, task, entrant, data, rate, seed)


def train_once(
    session: Session, task: str, entrant: Entrant, data: list[str] | None, lr: float, seed: int
) -> dict[str, Any] | None:
    size, steps, asked = QUICK if session.quick else (SIZE, STEPS, ASKED)
    return session.run(
        f"{task} {entrant.label} lr={lr:g} seed={seed}", work, seconds(size, entrant, task, steps, asked), task=task,
        **entrant._asdict(), size=size, steps=steps, asked=asked, data=data if TASKS[task].needs_text else None, lr=lr,
        seed=seed,
    )  # fmt: skip


def seconds(size: str, entrant: Entrant, task: str, steps: int, asked: int) -> float:
    length, (model, chunk) = TASKS[task].length, entrant
    training = estimate(size, chunk, model, steps * BATCH * length, length) + steps * GENERATING.get(task, 0.0)
    return training + sum(
        estimate(size, chunk, model, asked * length * times, length * times, training=False) for times in TIMES
    )


def work(
    scratch: Path, *, task: str, model: str, chunk: int, size: str, steps: int, asked: int, lr: float, seed: int,
    data: list[str] | None,
) -> dict[str, Any]:  # fmt: skip
    spec = TASKS[task]
    held = {"train": {}, "ask": {}}
    if spec.needs_text:
        corpus = text.documents(data)
        held = {"train": {"text": b"\n".join(corpus.train)}, "ask": {"text": b"\n".join(corpus.held_out)}}
    built = models.build(model, config(size, chunk), spec.length, seed)
    done = 0

    def next_loss() -> torch.Tensor:
        nonlocal done
        random = numpy.random.default_rng([seed, done])
        done += 1
        return built.loss(*spec.examples(random, BATCH, spec.length, **held["train"]))

    def seek(position: dict[str, Any]) -> None:
        nonlocal done
        done = position["step"]

    recipe = Recipe(steps * BATCH * spec.length, BATCH, spec.length, lr)
    result = train(built, recipe, next_loss, scratch, position=lambda: {"step": done}, seek=seek)
    accuracy = []
    for length, settings in asked_at(task):
        random = numpy.random.default_rng([OF_EVALUATION + seed, length])
        right = share_right(built, spec, random, asked, length, **settings, **held["ask"])
        accuracy.append({"length": length, **settings, **right})
    return result | {"accuracy": accuracy, "parameters": built.num_parameters()}


def asked_at(task: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Lengths and settings: growing lengths, then what is harder at the trained length."""
    yield from ((TASKS[task].length * times, {}) for times in TIMES)
    yield from ((TASKS[task].length, settings) for settings in TASKS[task].more)


@torch.no_grad()
def share_right(
    model: nn.Module, spec: Any, random: numpy.random.Generator, count: int, length: int, **settings: Any
) -> dict[str, float]:
    """The share of targets, and of rows with all their targets, that the model's likeliest token is right for."""
    model.eval()
    right = total = rows = 0
    for begin in range(0, count, BATCH):
        tokens, targets = spec.examples(random, min(BATCH, count - begin), length, **settings)
        if spec.last is not None:
            targets[:, : -spec.last] = NONE
        asked = targets != NONE
        hits = (model(tokens).argmax(-1) == targets) & asked
        right, total = right + int(hits.sum()), total + int(asked.sum())
        rows += int((hits.sum(1) == asked.sum(1)).sum())
    return {"targets": right / total, "rows": rows / count}


def chosen(results: list[dict[str, Any]]) -> dict[tuple[str, Entrant], list[dict[str, Any]]]:
    """By task and entrant, the runs of the learning rate that most seeds have, which is the one of the lowest loss."""
    found: dict[tuple[str, Entrant], dict[float, list[dict[str, Any]]]] = {}
    for content in results:
        s = content["settings"]
        found.setdefault((s["task"], Entrant(s["model"], s["chunk"])), {}).setdefault(s["lr"], []).append(content)
    return {key: max(by_rate.values(), key=len) for key, by_rate in found.items()}


Shares = dict[tuple[str, str], dict[Entrant, list[float]]]
"""By task and what is asked, the shares of right targets of each entrant over the seeds"""


def cells(results: list[dict[str, Any]], entrants: Sequence[Entrant] = ENTRANTS) -> Shares:
    """In the order of TASKS."""
    found: Shares = {}
    runs_of = chosen(results)
    for task, entrant in itertools.product(TASKS, entrants):
        for content in runs_of.get((task, entrant), []):
            for row in content["result"]["accuracy"]:
                asked = f"length {row['length']}" + (f", {row['pairs']} pairs" if "pairs" in row else "")
                found.setdefault((task, asked), {}).setdefault(entrant, []).append(row["targets"])
    return found


def verdicts(results: list[dict[str, Any]]) -> dict[str, str]:
    found = cells(results)
    by_comparison = {
        f"{task}, {asked}": verdict.higher(shares.get(OURS, []), shares.get(THEIRS, []), LEAST, verdict.OF_MANY)
        for (task, asked), shares in found.items()
    }
    complete = {
        task
        for (task, _), shares in found.items()
        if all(len(shares.get(entrant, [])) >= verdict.SEEDS for entrant in COMPARED)
    }
    worse, better = (outcome in by_comparison.values() for outcome in (verdict.NOT_HELD, verdict.HELD))
    held = better and complete == TASKS.keys()
    return {"claim": verdict.NOT_HELD if worse else verdict.HELD if held else verdict.UNDECIDED, **by_comparison}


def table(results: list[dict[str, Any]]) -> list[str]:
    lines = [
        f"| task | asked at | a guess | {' | '.join(entrant.label for entrant in ENTRANTS)} |",
        "|" + " --- |" * (3 + len(ENTRANTS)),
    ]
    for (task, asked), shares in cells(results).items():
        shown = [verdict.spread(shares[entrant]) if entrant in shares else "" for entrant in ENTRANTS]
        lines.append(f"| {task} | {asked} | {TASKS[task].guess:.4f} | {' | '.join(shown)} |")
    return ["Shares of right targets; a guess is the likeliest answer, whatever the example.", "", *lines]


def plot(results: list[dict[str, Any]], figure: Any) -> None:
    runs_of = chosen(results)
    for axes, (task, spec) in zip(figure.subplots(2, 3, sharey=True).flat, TASKS.items()):
        for entrant in ENTRANTS:
            for content in runs_of.get((task, entrant), []):
                rows = [row for row in content["result"]["accuracy"] if "pairs" not in row]
                lengths, shares = [row["length"] for row in rows], [row["targets"] for row in rows]
                style = ":" if entrant == BESIDE else "-"
                axes.plot(lengths, shares, style, color=models.COLOURS[entrant.model], marker=".", label=entrant.label)
        axes.axhline(spec.guess, color="gray", lw=0.6)
        axes.set(title=task, xscale="log", ylim=(-0.02, 1.02))
        lengths = [spec.length * times for times in TIMES]
        axes.set_xticks(lengths, map(str, lengths))
        axes.minorticks_off()
    handles = {
        label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3)
    figure.supylabel("share of right targets; gray: a guess")
