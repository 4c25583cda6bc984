"""Claim c: the loss of a model trained on carried states falls as the context grows, far beyond a training row."""

import itertools
import math
from pathlib import Path
from statistics import fmean
from typing import Any

from bench.plots import BLUE
from megalodon_ops.evaluation import Evaluation, evaluate

from . import models, text, verdict
from .report import axis_of_tokens
from .runs import Session
from .train import MAX_POINTS, Recipe, config, estimate, train_on_text

TITLE = "Loss as the context grows"
RULE = (
    "The middle million bytes of each source are held out and predicted in windows of 1,024 tokens, 2,048, and so on up to "
    "the whole document, every token once per window length; figures are means over the sources. Held if the mean over the "
    "seeds falls at every doubling; not held if it rises at one by more than 3 standard errors of the rises over the seeds "
    "and by more than 0.0005 bits per byte; otherwise undecided."
)
MIN_RISE = 5e-4
CHUNK = 128
LENGTH, ROWS = 512, 16  # shape of a batch
LR = 1e-2
PIECE = 4096  # tokens of held-out text that a call reads
SIZE, TOKENS, LONGEST = "1M", 12_000_000, 1 << 20
QUICK = ("100k", 60_000, 1 << 14)
SHORTEST = 1 << 10


def contexts_up_to(longest: int) -> list[int]:
    return [SHORTEST << i for i in range(round(math.log2(longest / SHORTEST)) + 1)]


def run(session: Session, data: list[str] | None) -> None:
    size, tokens, longest = QUICK if session.quick else (SIZE, TOKENS, LONGEST)
    passes = len(data or text.LONG) * len(contexts_up_to(longest))
    reading = passes * estimate(size, CHUNK, models.MEGALODON, longest, LENGTH, training=False)
    estimated = estimate(size, CHUNK, models.MEGALODON, tokens, LENGTH) + reading
    for seed in session.seeds():
        session.run(f"seed={seed}", work, estimated, size=size, tokens=tokens, longest=longest, seed=seed, data=data)


def work(scratch: Path, *, size: str, tokens: int, longest: int, seed: int, data: list[str] | None) -> dict[str, Any]:
    long = text.long_text(data, longest, ROWS)
    model = models.build(models.MEGALODON, config(size, CHUNK), LENGTH, seed)
    recipe = Recipe(tokens=tokens, rows=ROWS, length=LENGTH, lr=LR)
    result = train_on_text(model, recipe, long.train, scratch, seed=seed, carries=True)
    contexts = contexts_up_to(longest)
    by_source = {
        name: evaluate(model, text.to_evaluate([document]), contexts=contexts, rows=1, piece=PIECE)
        for name, document in long.held_out.items()
    }
    bits = {name: {str(each.context): each.bits_per_byte for each in found} for name, found in by_source.items()}
    return result | {
        "bits_per_byte": {str(context): fmean(found[str(context)] for found in bits.values()) for context in contexts},
        "by_source": bits,
        "by_position": by_position([found[-1] for found in by_source.values()]),
        "text": long.fingerprint,
        "train_bytes": sum(map(len, long.train)),
        "parameters": model.num_parameters(),
    }


def by_position(found: list[Evaluation]) -> list[list[float]]:
    """Last position of each stretch of bins, bits per byte of all sources there, and number of predictions."""
    bins = [*zip(*(each.by_position for each in found), strict=True)]
    size = -(-len(bins) // MAX_POINTS)
    rows = []
    for i in range(0, len(bins), size):
        stretch = [*itertools.chain.from_iterable(bins[i : i + size])]
        count = sum(bin.tokens for bin in stretch)
        bits = math.fsum(bin.nats for bin in stretch) / count / math.log(2)
        rows.append([stretch[-1].last, round(bits, 5), count])
    return rows


def curves(results: list[dict[str, Any]]) -> tuple[list[int], list[list[float]]]:
    bits = [content["result"]["bits_per_byte"] for content in results]
    contexts = sorted(map(int, bits[0]))
    return contexts, [[by_context[str(context)] for context in contexts] for by_context in bits]


def verdicts(results: list[dict[str, Any]]) -> dict[str, str]:
    contexts, found = curves(results)
    by_comparison = {"claim": verdict.decide_falling(found, MIN_RISE)}
    for name in results[0]["result"]["by_source"]:
        by_context = [content["result"]["by_source"][name] for content in results]
        source_curves = [[bits[str(context)] for context in contexts] for bits in by_context]
        by_comparison[f"falls in {name}"] = verdict.decide_falling(source_curves, MIN_RISE)
    ends = [[curve[0], curve[-1]] for curve in found]
    by_comparison[f"lower at {contexts[-1]:,} than at {contexts[0]:,}"] = verdict.decide_falling(ends, MIN_RISE)
    return by_comparison


def table(results: list[dict[str, Any]]) -> list[str]:
    contexts, found = curves(results)
    sources = [*results[0]["result"]["by_source"]]
    lines = [f"| context | bits per byte | {' | '.join(sources)} |", "| --- | --- |" + " --- |" * len(sources)]
    for i, context in enumerate(contexts):
        values = [curve[i] for curve in found]
        by_source = [[c["result"]["by_source"][name][str(context)] for c in results] for name in sources]
        lines.append(f"| {context:,} | {' | '.join(map(verdict.spread, (values, *by_source)))} |")
    return lines


def plot(results: list[dict[str, Any]], figure: Any) -> None:
    left, right = figure.subplots(1, 2)
    contexts, found = curves(results)
    for content, curve, style in zip(results, found, ("-", "--", ":", "-."), strict=False):
        left.plot(contexts, curve, style, marker="o", color=BLUE, label=content["run"])
        last, bits, _ = zip(*content["result"]["by_position"], strict=True)
        right.plot(last, bits, style, color=BLUE, lw=0.8)
    axis_of_tokens(left, "context, tokens")
    left.set_ylabel("bits per byte of the whole text")
    axis_of_tokens(right, "tokens that a prediction is made from")
    right.set_ylabel("bits")
    left.legend()
