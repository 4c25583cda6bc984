"""Claim c: the loss of a model that is trained on carried states falls as the context grows, far beyond a row of training."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean
from typing import Any

from megalodon_ops.evaluation import Evaluation, evaluate

from . import models, text, verdict
from .report import axis_of_tokens
from .runs import Session
from .train import KEPT_POINTS, Recipe, config, estimate, train_on_text

TITLE = "Loss as the context grows"
RULE = (
    "The middle million bytes of each source, held out, are predicted in windows of 1,024 tokens, 2,048, and so on, the last "
    "as long as the document, every token once for each; figures are means over the sources. Held where the mean over the "
    "seeds falls at every doubling; not held where it rises at one by more than 3 standard errors of the rises over the "
    "seeds, and by more than 0.0005 bits per byte; undecided else."
)
LEAST = 5e-4
CHUNK, LENGTH, ROWS, LR, PIECE = 128, 512, 16, 1e-2, 4096
SIZE, TOKENS, LONGEST = "1M", 12_000_000, 1 << 20
QUICK = ("100k", 60_000, 1 << 14)
SHORTEST = 1 << 10


def run(session: Session, data: list[str] | None) -> None:
    size, tokens, longest = QUICK if session.quick else (SIZE, TOKENS, LONGEST)
    contexts = round(math.log2(longest / SHORTEST)) + 1
    sources = len(data or text.LONG)
    reading = sources * contexts * estimate(size, CHUNK, models.MEGALODON, longest, LENGTH, training=False)
    estimated = estimate(size, CHUNK, models.MEGALODON, tokens, LENGTH) + reading
    for seed in session.seeds():
        session.run(f"seed={seed}", work, estimated, size=size, tokens=tokens, longest=longest, seed=seed, data=data)


def work(scratch: Path, *, size: str, tokens: int, longest: int, seed: int, data: list[str] | None) -> dict[str, Any]:
    long = text.long_text(data, longest, ROWS)
    model = models.build(models.MEGALODON, config(size, CHUNK), LENGTH, seed)
    result = train_on_text(model, Recipe(tokens, ROWS, LENGTH, LR), long.train, scratch, seed=seed, carries=True)
    contexts = [SHORTEST << i for i in range(round(math.log2(longest / SHORTEST)) + 1)]
    by_source = {
        name: evaluate(model, text.to_evaluate([document]), contexts=contexts, rows=1, piece=PIECE)
        for name, document in long.held_out.items()
    }
    bits = {name: {str(each.context): each.bits_per_byte for each in found} for name, found in by_source.items()}
    return result | {
        "bits_per_byte": {str(context): fmean(of_source[str(context)] for of_source in bits.values()) for context in contexts},
        "by_source": bits, "by_position": by_position([found[-1] for found in by_source.values()]),
        "text": long.fingerprint, "train_bytes": sum(map(len, long.train)), "parameters": model.num_parameters(),
    }  # fmt: skip


def by_position(found: list[Evaluation]) -> list[list[float]]:
    """The last position of each stretch of bins, bits a byte of all sources there, and how many predictions."""
    bins = [*zip(*(each.by_position for each in found), strict=True)]
    size = -(-len(bins) // KEPT_POINTS)
    rows = []
    for i in range(0, len(bins), size):
        stretch = [bin for of_sources in bins[i : i + size] for bin in of_sources]
        count = sum(bin.tokens for bin in stretch)
        bits = math.fsum(bin.nats for bin in stretch) / count / math.log(2)
        rows.append([stretch[-1].last, round(bits, 5), count])
    return rows


def curves(results: list[dict[str, Any]]) -> tuple[list[int], list[list[float]]]:
    bits = [content["result"]["bits_per_byte"] for content in results]
    contexts = sorted(map(int, bits[0]))
    return contexts, [[of_seed[str(context)] for context in contexts] for of_seed in bits]


def verdicts(results: list[dict[str, Any]]) -> dict[str, str]:
    contexts, found = curves(results)
    by_comparison = {"claim": verdict.falls(found, LEAST)}
    for name in results[0]["result"]["by_source"]:
        of_source = [content["result"]["by_source"][name] for content in results]
        falling = [[bits[str(context)] for context in contexts] for bits in of_source]
        by_comparison[f"falls in {name}"] = verdict.falls(falling, LEAST)
    ends = [[curve[0], curve[-1]] for curve in found]
    return by_comparison | {f"lower at {contexts[-1]:,} than at {contexts[0]:,}": verdict.falls(ends, LEAST)}


def table(results: list[dict[str, Any]]) -> list[str]:
    contexts, found = curves(results)
    sources = [*results[0]["result"]["by_source"]]
    lines = [f"| context | bits per byte | {' | '.join(sources)} |", "| --- | --- |" + " --- |" * len(sources)]
    for i, context in enumerate(contexts):
        values = [curve[i] for curve in found]
        of_sources = [[c["result"]["by_source"][name][str(context)] for c in results] for name in sources]
        lines.append(f"| {context:,} | {' | '.join(map(verdict.spread, (values, *of_sources)))} |")
    return lines


def plot(results: list[dict[str, Any]], figure: Any) -> None:
    left, right = figure.subplots(1, 2)
    contexts, found = curves(results)
    for content, curve in zip(results, found, strict=True):
        left.plot(contexts, curve, marker="o", label=content["run"])
        last, bits, _ = zip(*content["result"]["by_position"], strict=True)
        right.plot(last, bits, lw=0.8)
    axis_of_tokens(left, "context, tokens")
    left.set_ylabel("bits per byte of the whole text")
    axis_of_tokens(right, "tokens that a prediction is made from")
    right.set_ylabel("bits")
    left.legend()
