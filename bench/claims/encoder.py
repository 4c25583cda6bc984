"""Claim g: an encoder classifies long rows better than a Transformer encoder of as many parameters.

python -m bench.claims.encoder --task listops    # one run; prints its results
python -m bench.claims encoder                   # all runs; an interrupted call resumes
"""

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
import torch.nn.functional as F
from torch import nn

import megalodon_ops as mo
from bench import machine, plain_models
from bench.plots import BLUE, ORANGE

from . import long_rows, models, verdict
from .runs import Session
from .task_runs import EVALUATION_SEED
from .train import Recipe, train

TITLE = "Encoder"
RULE = (
    "Two encoders with equal numbers of parameters, MEGALODON's and torch's Transformer, are trained on the same rows, generated for "
    "each step, with the same number of steps of AdamW at a rate of 0.004 and one thread. Rows grow from short ones to full length "
    "in the first 60 % of the steps. ListOps follows Long Range Arena's rules with rows of 33 to 128 tokens in place of its 501 to "
    "2,000; its own lengths, and those of 129 to 512, are evaluated too, and decide nothing. Of a second of sound, 16,000 positions, "
    "MEGALODON reads each sample, and the Transformer patches of 160, as full attention takes it 9 s a row. A task is solved better if "
    "the share of right answers to new rows of full length differs by more than 3 standard errors over 3 seeds and by more than 0.03. "
    "The claim is held if MEGALODON is better in all three tasks, and not held if it is worse in one. Sizes, steps and rates were "
    "chosen by short runs of another seed, to fit a quarter of an hour on a busy machine; longer training is not part of the claim. "
    "Processor time is that of the training process; peak is its largest resident memory beyond that before, over all seeds. Also "
    "shown, without deciding, and added after the figures of the first seed's words had been read: the Transformer trained on words "
    "for 25 times the steps, which take it about as long as MEGALODON's."
)
MEGALODON, TRANSFORMER = models.MEGALODON, "transformer"
MODELS = (MEGALODON, TRANSFORMER)
LONG_TRANSFORMER = "transformer, longer"
COLOURS = {MEGALODON: BLUE, TRANSFORMER: ORANGE}
GROWTH_PART = 0.6
"""Part of a run in which the rows grow"""
MIN_DIFFERENCE = 0.03
"""Smallest difference in the share of right answers that counts"""


class Task(NamedTuple):
    """A task of both models. Rows grow from `first_length` to `max_length` positions, by the same factor at each step."""

    sample: Callable[[numpy.random.Generator, int, int], long_rows.Examples]
    sizes: dict[str, Any]
    """fields of the configuration, except the widths"""
    first_length: int
    max_length: int
    batch: int
    """positions of all rows of a training step"""
    steps: int
    seconds: dict[str, int]
    """estimate for a run of each model on a quiet core: two thirds of the time on a busy one"""
    num_evaluated: int
    other_lengths: tuple[int, ...] = ()
    """also evaluated, without deciding"""
    patch: int = 1
    """positions of the input that become one of the Transformer's"""
    longer: int = 0
    """factor of the steps of the Transformer's longer runs, which decide nothing; 0: no such runs"""

    @property
    def config(self) -> mo.MegalodonEncoderConfig:
        """Values and hidden units 2 D, keys D / 2, norms of groups of 16 channels."""
        D = self.sizes["model_dim"]
        return mo.MegalodonEncoderConfig(
            z_dim=D // 2, value_dim=2 * D, ffn_hidden_dim=2 * D, norm_num_groups=D // 16, **self.sizes
        )

    def examples(self, random: numpy.random.Generator, progress: float) -> long_rows.Examples:
        """A training batch at `progress`, from 0 to 1, of the run."""
        growth = min(1.0, progress / GROWTH_PART)
        longest = round(self.first_length * (self.max_length / self.first_length) ** growth)
        return self.sample(random, min(256, max(1, self.batch // longest)), longest)


RATES = {MEGALODON: 4e-3, TRANSFORMER: 4e-3}
_NUMBERS = dict(num_features=1, scale_inputs=False)  # the tasks' own scale, which both models read
_LISTOPS = dict(num_layers=3, model_dim=64, chunk_size=128, vocab_size=16, num_classes=10)
_WORDS = dict(num_layers=2, model_dim=32, chunk_size=100, **_NUMBERS, num_classes=10)
_PATHFINDER = dict(num_layers=2, model_dim=32, chunk_size=128, **_NUMBERS, num_classes=2)


def _seconds(megalodon: int, transformer: int) -> dict[str, int]:
    return {MEGALODON: megalodon, TRANSFORMER: transformer}


TASKS = {  # rows from a first length to the last, positions of a step, steps, seconds, rows to evaluate
    "listops": Task(long_rows.listops, _LISTOPS, 8, 128, 4096, 600, _seconds(70, 75), 500, other_lengths=(512, 2000)),
    "words": Task(long_rows.words, _WORDS, 1000, 16000, 32000, 200, _seconds(45, 2), 200, patch=160, longer=25),
    "pathfinder": Task(long_rows.pathfinder, _PATHFINDER, 1024, 1024, 8192, 150, _seconds(20, 40), 500),
}
"""Rates tried in the short runs: 0.001 and 0.004 for the Transformer, 0.004 for MEGALODON, and for words also 0.01"""


def run(session: Session, data: list[str] | None) -> None:
    for seed, (task, spec), model in itertools.product(session.seeds(), TASKS.items(), (*MODELS, LONG_TRANSFORMER)):
        if model == LONG_TRANSFORMER and not spec.longer:
            continue
        steps, asked = (3, 2) if session.quick else (spec.steps, spec.num_evaluated)
        steps *= spec.longer if model == LONG_TRANSFORMER else 1
        kind = MEGALODON if model == MEGALODON else TRANSFORMER
        settings = dict(task=task, model=model, steps=steps, asked=asked, lr=RATES[kind], seed=seed)
        session.run(f"{task} {model} seed={seed}", work, spec.seconds[kind] * steps / spec.steps, **settings)


def work(scratch: Path, *, task: str, model: str, steps: int, asked: int, lr: float, seed: int) -> dict[str, Any]:
    spec = TASKS[task]
    step = 0
    in_use = machine.reset_peak_memory()
    torch.manual_seed(seed)
    net = build(spec, model)

    def next_loss() -> torch.Tensor:
        nonlocal step
        inputs, lengths, labels = spec.examples(numpy.random.default_rng([seed, step]), step / steps)
        loss = F.cross_entropy(net(inputs, lengths=lengths), labels)
        step += 1
        if step % max(1, steps // 20) == 0:
            rows = f"{len(labels)} rows of up to {inputs.shape[1]:,} positions"
            print(f"step {step} of {steps}: {rows}, loss {loss:.3f}", flush=True)
        return loss

    def seek(position: dict[str, Any]) -> None:
        nonlocal step
        step = position["step"]

    recipe = Recipe(tokens=steps, rows=1, length=1, lr=lr, warmup=steps // 20)  # only the number of steps counts
    result = train(net, recipe, next_loss, scratch, position=lambda: {"step": step}, seek=seek, clock=time.process_time)
    peak = machine.peak_memory_since(in_use)
    lengths = (spec.max_length, *spec.other_lengths)
    decisive, *others = (accuracy(net, spec, length, asked, seed) for length in lengths)
    found = dict(beside=others, peak_bytes=peak, parameters=sum(p.numel() for p in net.parameters()))
    return {**result, **decisive, **found, "seconds": result["train_seconds"]}


def build(spec: Task, model: str) -> nn.Module:
    if model == MEGALODON:
        return mo.MegalodonEncoder(spec.config)
    return plain_models.TransformerEncoder(spec.config, patch=spec.patch)


@torch.no_grad()
def accuracy(model: nn.Module, spec: Task, longest: int, asked: int, seed: int) -> dict[str, Any]:
    """Share of `asked` new examples that the model answers right, and share of their most frequent label."""
    model.eval()
    right, answers = 0, []
    for count in [10] * (asked // 10) or [asked]:
        random = numpy.random.default_rng([EVALUATION_SEED + seed, longest, len(answers)])
        inputs, lengths, labels = spec.sample(random, count, longest)
        right += int((model(inputs, lengths=lengths).argmax(1) == labels).sum())
        answers += labels.tolist()
    guess = max(map(answers.count, answers)) / len(answers)
    return {"longest": longest, "right": right / len(answers), "guess": guess}


def by_model(results: list[dict[str, Any]], task: str) -> dict[str, list[dict[str, Any]]]:
    """Results of each model over the seeds."""
    found: dict[str, list[dict[str, Any]]] = {model: [] for model in (*MODELS, LONG_TRANSFORMER)}
    for content in results:
        if content["settings"]["task"] == task:
            found[content["settings"]["model"]].append(content["result"])
    return found


def verdicts(results: list[dict[str, Any]]) -> dict[str, str]:
    by_comparison = {}
    for task in TASKS:
        found = by_model(results, task)
        ours, theirs = ([result["right"] for result in found[model]] for model in MODELS)
        by_comparison[f"{task}: a larger share is right"] = verdict.decide_higher(ours, theirs, MIN_DIFFERENCE)
    return {"claim": verdict.combine([*by_comparison.values()]), **by_comparison}


def table(results: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| task | rows of up to | model | parameters | right | a guess | processor time, s | peak, MiB | seeds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for task, spec in TASKS.items():
        for model, runs in by_model(results, task).items():
            if not runs:
                continue
            peak = max((run["peak_bytes"] or 0 for run in runs)) / 2**20
            seconds = statistics.fmean(run["train_seconds"] for run in runs)
            training_cells = [f"{seconds:.0f}", f"{peak:,.0f}", str(len(runs))]
            for index, longest in enumerate((spec.max_length, *spec.other_lengths)):
                found = [[run, *run["beside"]][index] for run in runs]
                right = verdict.spread([a["right"] for a in found])
                guess = statistics.fmean(a["guess"] for a in found)
                cells = [task, f"{longest:,}", model, f"{runs[0]['parameters']:,}", right, f"{guess:.4f}"]
                cells += training_cells if index == 0 else [""] * len(training_cells)
                lines.append(f"| {' | '.join(cells)} |")
    return lines


def plot(results: list[dict[str, Any]], figure: Any) -> None:
    for axes, task in zip(figure.subplots(1, len(TASKS)), TASKS):
        found = by_model(results, task)
        for model in MODELS:
            for i, run in enumerate(found[model]):
                steps, losses = zip(*run["curve"], strict=True)
                axes.plot(steps, losses, color=COLOURS[model], label=None if i else model)
        axes.set(title=task, xlabel="optimizer step", ylabel="loss")
    figure.axes[-1].legend()


def summary(found: dict[str, Any], count: int) -> str:
    """Lines on a run's results, with `count` rows of each length."""
    lines = [
        f"right about {at['right']:.1%} of {count} rows of up to {at['longest']:,} positions; a guess {at['guess']:.1%}"
        for at in (found, *found["beside"])
    ]
    return "\n".join([*lines, f"{found['parameters']:,} parameters, {found['train_seconds']:.0f} s of processor time"])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.claims.encoder", description=__doc__.split("\n")[0])
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--model", choices=MODELS, default=MEGALODON)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="training steps (the claim's)")
    options = parser.parse_args(arguments)
    spec = TASKS[options.task]
    settings = dict(steps=options.steps or spec.steps, asked=spec.num_evaluated, lr=RATES[options.model])
    with tempfile.TemporaryDirectory() as folder:
        found = work(Path(folder) / "run.pt", **(vars(options) | settings))
    print(summary(found, spec.num_evaluated))


if __name__ == "__main__":
    main()
