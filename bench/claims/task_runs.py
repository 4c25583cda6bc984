"""Claim d: on tasks that need memory or state tracking, MEGALODON is as good as a Transformer, or better."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from torch import nn

from bench.plots import GREY

from . import gecko, loss, models, text, verdict
from .runs import Session
from .tasks import NONE, TASKS
from .train import Recipe, config, estimate, train

TITLE = "Tasks"
RULE = (
    "Each task is trained at one length and evaluated at this length and at 2, 4 and 8 times it, MQAR also with more pairs. A "
    "learning rate is chosen for each model and task by a run at each of three. At each length, better or worse means that the "
    "share of right targets differs by more than 5 standard errors over the seeds and by more than 0.05. The claim is held if "
    "MEGALODON is worse nowhere and better somewhere, and not held if it is worse anywhere. MEGALODON's chunk is the trained "
    "length. Also shown, without deciding: MEGALODON in chunks of a quarter of that length."
)
BATCH = 32
RATES = (1e-3, 4e-3, 16e-3)
MIN_DIFFERENCE = 0.05
SIZE, STEPS, NUM_EVALUATED = "100k", 3000, 512
QUICK = ("tiny", 12, 32)
TIMES = (1, 2, 4, 8)
GENERATION_SECONDS = {"listops": 0.05}
"""For a batch's examples, where not negligible"""
EVALUATION_SEED = 1 << 32
"""Added to a seed, so that no training example is evaluated"""


class Entrant(NamedTuple):
    """A model in a comparison."""

    model: str
    chunk: int
    """MEGALODON's; for the Llama, its training length"""

    @property
    def label(self) -> str:
        return self.model if self in DECIDING else f"{self.model} chunk={self.chunk}"


OURS = Entrant(models.MEGALODON, 128)
THEIRS = Entrant(models.LLAMA, 128)
DECIDING = (OURS, THEIRS)
SHORT_CHUNKS = Entrant(models.MEGALODON, 32)
ENTRANTS = (*DECIDING, SHORT_CHUNKS)


def costs(entrant: Entrant, length: int) -> tuple[float, int]:
    """Operations a token and numbers in a state, of a layer's attention and memory, in rows of `length`."""
    return gecko.cost(config(SIZE, entrant.chunk), gecko.PARTS.get(entrant.model, gecko.Parts()), length)


def control(entrant: Entrant, length: int, *, megalodons: Sequence[Entrant]) -> Entrant:
    """MEGALODON at equal operations: the first that takes at least as many as `entrant`, or else the last."""
    operations, _ = costs(entrant, length)
    return next((other for other in megalodons if costs(other, length)[0] >= operations), megalodons[-1])


def run(session: Session, data: list[str] | None) -> None:
    for task, entrant in itertools.product(TASKS, DECIDING):
        train_by_sweep(session, task, entrant, data)
    for task in TASKS:
        train_by_sweep(session, task, SHORT_CHUNKS, data)


def train_by_sweep(session: Session, task: str, entrant: Entrant, data: list[str] | None) -> None:
    """Run the first seed at each rate, then the others at the rate of the lowest training loss."""
    first, *others = session.seeds()
    found = {rate: train_once(session, task, entrant, data, lr=rate, seed=first) for rate in RATES}
    losses = {rate: loss.as_figure(result["train_loss"]) for rate, result in found.items() if result is not None}
    rate = min(losses, key=losses.get) if losses else RATES[0]
    for seed in others:
        train_once(session, task, entrant, data, lr=rate, seed=seed)


def train_once(
    session: Session, task: str, entrant: Entrant, data: list[str] | None, lr: float, seed: int
) -> dict[str, Any] | None:
    size, steps, asked = QUICK if session.quick else (SIZE, STEPS, NUM_EVALUATED)
    data = data if TASKS[task].needs_text else None
    estimated = seconds(size, entrant, task, steps, asked)
    settings = dict(task=task, **entrant._asdict(), size=size, steps=steps, asked=asked, data=data, lr=lr, seed=seed)
    return session.run(f"{task} {entrant.label} lr={lr:g} seed={seed}", work, estimated, **settings)


def seconds(size: str, entrant: Entrant, task: str, steps: int, asked: int) -> float:
    length = TASKS[task].length
    model, chunk = entrant
    training = estimate(size, chunk, model, steps * BATCH * length, length) + steps * GENERATION_SECONDS.get(task, 0.0)
    return training + sum(
        estimate(size, chunk, model, asked * length * times, length * times, training=False) for times in TIMES
    )


def work(
    scratch: Path, *, task: str, model: str, chunk: int, size: str, steps: int, asked: int, lr: float, seed: int,
    data: list[str] | None,
) -> dict[str, Any]:  # fmt: skip
    spec = TASKS[task]
    train_text, held_out_text = {}, {}
    if spec.needs_text:
        corpus = text.documents(data)
        train_text, held_out_text = ({"text": b"\n".join(part)} for part in (corpus.train, corpus.held_out))
    net = models.build(model, config(size, chunk), spec.length, seed)
    step = 0

    def next_loss() -> torch.Tensor:
        nonlocal step
        random = numpy.random.default_rng([seed, step])
        step += 1
        return net.loss(*spec.examples(random, BATCH, spec.length, **train_text))

    def seek(position: dict[str, Any]) -> None:
        nonlocal step
        step = position["step"]

    recipe = Recipe(tokens=steps * BATCH * spec.length, rows=BATCH, length=spec.length, lr=lr)
    result = train(net, recipe, next_loss, scratch, position=lambda: {"step": step}, seek=seek)
    rows = []
    for length, settings in evaluation_settings(task):
        random = numpy.random.default_rng([EVALUATION_SEED + seed, length])
        right = accuracy(net, spec, random, asked, length, **settings, **held_out_text)
        rows.append({"length": length, **settings, **right})
    return result | {"accuracy": rows, "parameters": net.num_parameters()}


def evaluation_settings(task: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Lengths and settings: growing lengths, then harder settings at the trained length."""
    yield from ((TASKS[task].length * times, {}) for times in TIMES)
    yield from ((TASKS[task].length, settings) for settings in TASKS[task].harder_settings)


@torch.no_grad()
def accuracy(
    model: nn.Module, spec: Any, random: numpy.random.Generator, count: int, length: int, **settings: Any
) -> dict[str, float]:
    """Share of targets, and of rows with all their targets, that the model's likeliest token gets right."""
    model.eval()
    right = total = rows = 0
    for begin in range(0, count, BATCH):
        tokens, targets = spec.examples(random, min(BATCH, count - begin), length, **settings)
        if spec.last is not None:
            targets[:, : -spec.last] = NONE
        is_target = targets != NONE
        hits = (model(tokens).argmax(-1) == targets) & is_target
        right += int(hits.sum())
        total += int(is_target.sum())
        rows += int((hits.sum(1) == is_target.sum(1)).sum())
    return {"targets": right / total, "rows": rows / count}


def chosen_runs(results: list[dict[str, Any]]) -> dict[tuple[str, Entrant], list[dict[str, Any]]]:
    """By task and entrant, the runs at the rate with the most seeds, which is that of the lowest loss."""
    found: dict[tuple[str, Entrant], dict[float, list[dict[str, Any]]]] = {}
    for content in results:
        s = content["settings"]
        found.setdefault((s["task"], Entrant(s["model"], s["chunk"])), {}).setdefault(s["lr"], []).append(content)
    return {key: max(by_rate.values(), key=len) for key, by_rate in found.items()}


Shares = dict[tuple[str, str], dict[Entrant, list[float]]]
"""Shares of right targets of each entrant over the seeds, by task and evaluation setting"""


def cells(results: list[dict[str, Any]], entrants: Sequence[Entrant] = ENTRANTS) -> Shares:
    """Shares in the order of TASKS."""
    found: Shares = {}
    runs_of = chosen_runs(results)
    for task, entrant in itertools.product(TASKS, entrants):
        for content in runs_of.get((task, entrant), []):
            for row in content["result"]["accuracy"]:
                setting = f"length {row['length']}" + (f", {row['pairs']} pairs" if "pairs" in row else "")
                found.setdefault((task, setting), {}).setdefault(entrant, []).append(row["targets"])
    return found


def verdicts(results: list[dict[str, Any]]) -> dict[str, str]:
    found = cells(results)
    by_comparison = {
        f"{task}, {setting}": verdict.decide_higher(
            shares.get(OURS, []), shares.get(THEIRS, []), MIN_DIFFERENCE, verdict.MANY_COMPARISONS
        )
        for (task, setting), shares in found.items()
    }
    complete = {
        task
        for (task, _), shares in found.items()
        if all(len(shares.get(entrant, [])) >= verdict.SEEDS for entrant in DECIDING)
    }
    claim = verdict.UNDECIDED
    if verdict.NOT_HELD in by_comparison.values():
        claim = verdict.NOT_HELD
    elif verdict.HELD in by_comparison.values() and complete == TASKS.keys():
        claim = verdict.HELD
    return {"claim": claim, **by_comparison}


def table(results: list[dict[str, Any]]) -> list[str]:
    lines = [
        f"| task | evaluated at | a guess | {' | '.join(entrant.label for entrant in ENTRANTS)} |",
        "|" + " --- |" * (3 + len(ENTRANTS)),
    ]
    for (task, setting), shares in cells(results).items():
        shown = [verdict.spread(shares[entrant]) if entrant in shares else "" for entrant in ENTRANTS]
        lines.append(f"| {task} | {setting} | {TASKS[task].guess:.4f} | {' | '.join(shown)} |")
    return ["Shares of right targets; a guess is the most frequent answer, given to every example.", "", *lines]


def plot(results: list[dict[str, Any]], figure: Any) -> None:
    runs_of = chosen_runs(results)
    for axes, (task, spec) in zip(figure.subplots(2, 3, sharey=True).flat, TASKS.items()):
        for entrant in ENTRANTS:
            for content in runs_of.get((task, entrant), []):
                rows = [row for row in content["result"]["accuracy"] if "pairs" not in row]
                lengths, shares = [row["length"] for row in rows], [row["targets"] for row in rows]
                style = ":" if entrant == SHORT_CHUNKS else "-"
                axes.plot(lengths, shares, style, color=models.COLOURS[entrant.model], marker=".", label=entrant.label)
        axes.axhline(spec.guess, color=GREY, lw=0.6)
        axes.set(title=task, xscale="log", ylim=(-0.02, 1.02))
        lengths = [spec.length * times for times in TIMES]
        axes.set_xticks(lengths, map(str, lengths))
        axes.minorticks_off()
        axes.set_xlabel("tokens of a row")
    handles = {
        label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3)
    figure.supylabel("share of right targets; gray: a guess")
