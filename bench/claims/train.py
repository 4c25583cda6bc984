"""Train any of the models with one loop: the same batches, tokens, optimizer and schedule. Interrupted runs resume.

    python -m bench.claims.train --model llama --size 1M --tokens 200000 --out runs/llama

The models differ in their context: MEGALODON continues from each row's state after the previous batch; the Llama sees the
tokens of its row, at most `length`.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import megalodon_ops as mo
from megalodon_ops.evaluation import Document, evaluate
from megalodon_ops.model.model_state import complete, from_named, named_tensors
from megalodon_ops.training import START, Batches, Muon, Reader, Schedule, adamw, optimizer_threads, threads

from bench import records

from . import gecko, models, runs, text

VOCABULARY = START + 1
WEIGHT_DECAY, CLIP = 0.1, 1.0
SAVE_SECONDS = 60.0
"""Interval between saves of a run's progress"""
EVALUATION_POINTS = (0.25, 0.5, 1)
"""Parts of a run after which a model is evaluated on request"""
OPTIMIZERS = {"adamw": adamw, "muon": Muon}
MAX_POINTS = 50
"""Maximum number of points of a curve in a result"""


class Recipe(NamedTuple):
    """Settings of a training run, except model, text and seed."""

    tokens: int
    rows: int
    length: int
    lr: float
    warmup: int = 100
    optimizer: str = "adamw"

    @property
    def steps(self) -> int:
        return max(1, round(self.tokens / (self.rows * self.length)))


def config(size: str, chunk_size: int, vocabulary: int = VOCABULARY) -> mo.MegalodonConfig:
    """MEGALODON of a named size: values and hidden units 2 D, keys D / 2, norm groups of 16 channels."""
    layers, dim = SIZES[size]
    widths = dict(model_dim=dim, z_dim=dim // 2, value_dim=2 * dim, ffn_hidden_dim=2 * dim, norm_num_groups=dim // 16)
    return mo.MegalodonConfig(num_layers=layers, **widths, num_heads=1, chunk_size=chunk_size, vocab_size=vocabulary)


SIZES = {"1M": (5, 128), "4M": (5, 256), "100k": (2, 64), "tiny": (1, 32)}
"""Layers and width D; the parameters are 1,058,368, 4,000,896, 137,280 and 30,800"""


def train(
    model: nn.Module,
    recipe: Recipe,
    next_loss: Callable[[], torch.Tensor],
    scratch: Path,
    *,
    position: Callable[[], dict[str, Any]],
    seek: Callable[[dict[str, Any]], None],
    evaluation: Callable[[], dict[str, Any]] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Any]:
    """Train the model on the losses of `next_loss`; resume from `scratch` if an earlier call was interrupted.

    position, seek: get and set the position of the source of the losses, a value for torch.save.
    evaluation: returns JSON figures of the model, called at EVALUATION_POINTS.
    clock: measures the seconds of training.
    """
    optimizer = OPTIMIZERS[recipe.optimizer](model, lr=recipe.lr, weight_decay=WEIGHT_DECAY)
    schedule = Schedule(recipe.lr, recipe.warmup, recipe.steps)
    step, spent = 0, 0.0
    losses, evaluations = [], {}
    marks = {round(part * recipe.steps): f"{part:g}" for part in EVALUATION_POINTS if evaluation is not None}
    if scratch.exists():
        saved = torch.load(scratch, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        seek(saved["position"])
        step, spent = saved["step"], saved["seconds"]
        losses, evaluations = saved["losses"], saved["looks"]
    model.train()
    begin = clock()
    saved_at = begin
    while step < recipe.steps:
        schedule.apply(optimizer, step)
        loss = next_loss()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        with threads(optimizer_threads(model)):
            optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        step += 1
        if not math.isfinite(losses[-1]):  # the learning rate is too high, which is a result too
            break
        if step in marks:
            evaluations[marks[step]] = evaluation()
        if clock() - saved_at > SAVE_SECONDS or step == recipe.steps:
            saved_at = clock()
            content = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), position=position(), step=step)
            content |= dict(losses=losses, looks=evaluations, seconds=spent + saved_at - begin)
            draft = scratch.with_suffix(".draft")
            torch.save(content, draft)
            draft.replace(scratch)
    seconds = spent + clock() - begin
    return {
        "train_loss": _last_tenth(losses),
        "curve": _thinned(losses),
        "train_seconds": round(seconds, 1),
        "steps": step,
        **({"looks": evaluations} if evaluations else {}),
    }


def train_on_text(
    model: nn.Module,
    recipe: Recipe,
    documents: Sequence[Any],
    scratch: Path,
    *,
    seed: int,
    carries: bool,
    evaluation: Callable[[], dict[str, Any]] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Train on bytes or ids of documents; a seed gives the same batches to every model.

    carries: carry the state from batch to batch. evaluation: as in `train`. options: of Batches.
    """
    batches = Batches(documents, recipe.rows, recipe.length, seed=seed, end=None, **options)
    reader = Reader(model, carries=carries)

    def position() -> dict[str, Any]:
        rows = reader.rows()
        state = None if rows is None else named_tensors(complete(rows))
        return {"batches": json.dumps(batches.position()), "state": state}

    def seek(found: dict[str, Any]) -> None:
        batches.seek(json.loads(found["batches"]))
        if found["state"] is not None:
            reader.seek(from_named(mo.MegalodonState, found["state"]))

    source = dict(position=position, seek=seek)
    return train(model, recipe, lambda: reader.loss(batches.next()), scratch, **source, evaluation=evaluation)


def bits_per_byte(
    model: nn.Module, documents: list[Document], contexts: list[Any], piece: int
) -> dict[str, float | None]:
    """Bits per byte by context; None if the loss is infinite or NaN."""
    try:
        found = evaluate(model, documents, contexts=contexts, piece=piece)
    except FloatingPointError:
        return dict.fromkeys(map(str, contexts))
    return {str(result.context): result.bits_per_byte for result in found}


def flops_a_token(size: mo.MegalodonConfig, name: str, length: int, training: bool = True) -> float:
    """Useful operations of a token, for MEGALODON by the formulas of bench_model.py; the Llama attends to `length` / 2 tokens."""
    matrices = size.num_parameters() - size.vocab_size * size.model_dim
    if name == models.LLAMA:
        attention = size.num_layers * 4 * size.model_dim * length / 2
    else:
        operations, _ = gecko.cost(size, gecko.PARTS.get(name, gecko.Parts()), length)
        attention = size.num_layers * (operations + 12 * size.cema_ndim * size.model_dim)
    return (2 * matrices + attention) * (3.5 if training else 1)


RATES = {"4M": 220e9, "1M": 160e9, "100k": 80e9, "tiny": 4e9}
"""Operations a second on 2 cores of an Intel Xeon with AMX. One thread reached 167, 120 and 73 GFLOP per second of processor time
in training MEGALODON of 4M, 1M and 100k parameters, and 131, 94 and 48 in training the Llama. Two threads are assumed to reach 1.5
times the mean of the two models, and 1.3 times at 100k. Results record estimated and measured seconds."""


def estimate(
    size: str, chunk: int, name: str, tokens: float, length: int, *, training: bool = True, vocabulary: int = VOCABULARY
) -> float:
    """Estimated seconds on 2 quiet cores."""
    return tokens * flops_a_token(config(size, chunk, vocabulary), name, length, training) / RATES[size]


def _last_tenth(losses: list[float]) -> float | None:
    """Mean over the last tenth of the steps; None if it is not finite."""
    tail = losses[-max(1, len(losses) // 10) :]
    mean = sum(tail) / len(tail)
    return mean if math.isfinite(mean) else None


def _thinned(losses: list[float]) -> list[list[float]]:
    """Last step and mean loss of up to MAX_POINTS equal pieces."""
    size = -(-len(losses) // MAX_POINTS)
    pieces = [(min(i + size, len(losses)), losses[i : i + size]) for i in range(0, len(losses), size)]
    return [[end, round(sum(part) / len(part), 5)] for end, part in pieces if math.isfinite(sum(part))]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.claims.train", description=__doc__.split("\n")[0])
    names = [models.MEGALODON, models.LLAMA, *models.ABLATIONS]
    parser.add_argument("--model", choices=names, default=models.LLAMA, help=", ".join(names))
    parser.add_argument("--size", choices=SIZES, default="1M")
    parser.add_argument("--data", nargs="+", metavar="PATH", help="files and folders of text (the standard library)")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="to train on (1,000,000)")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--chunk", type=int, default=128, help="MEGALODON's chunk size")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder of result.json; an interrupted run resumes")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    corpus = text.documents(options.data)
    model = models.build(options.model, config(options.size, options.chunk), options.length // 2, options.seed)
    recipe = Recipe(tokens=options.tokens, rows=options.rows, length=options.length, lr=options.lr)
    carries = options.model != models.LLAMA
    scratch = options.out / "unfinished.pt"
    result = train_on_text(model, recipe, corpus.train, scratch, seed=options.seed, carries=carries)
    piece = 2048 if carries else options.length // 2
    result["parameters"] = model.num_parameters()
    held_out = text.to_evaluate(corpus.held_out)
    result["held_out_bits_per_byte"] = bits_per_byte(model, held_out, [options.length], options.length)
    result["held_out_bits_per_byte"] |= bits_per_byte(model, held_out, ["all"], piece)
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    content = {"settings": settings, "machine": runs.facts(), "result": result}
    records.write(options.out / "result.json", json.dumps(content, indent=1) + "\n")
    print(json.dumps({name: value for name, value in result.items() if name != "curve"}, indent=1))


if __name__ == "__main__":
    main()
