"""Claim e: training takes memory in proportion to the length, and a stream takes the same memory however long it is.

Each figure is of a process of its own, `python -m bench.claims.memory --model M --work training --length N`: the bytes that are
resident at most beyond those before the work (Linux).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import machine, stream_memory

from . import models, verdict
from .report import axis_of_tokens
from .runs import Session
from .train import config, estimate

TITLE = "Memory against length"
RULE = (
    "Training: the bytes a token of one row's step at the longest length are at most 1.1 times those at an eighth of it. Streaming: "
    "at the end of the stream a process has at most 2 % more resident than after 1,000 tokens. The claim is held where both are. "
    "The Llama's figures stand beside: its training is in proportion to the length too, as SDPA keeps no scores, and its stream "
    "keeps the keys and values of all tokens."
)
SIZE, CHUNK, LENGTHS = "1M", 1024, [1 << i for i in range(10, 17)]
STREAMS = {models.MEGALODON: 1_000_000, models.LLAMA: 32_000}
QUICK = ("tiny", 64, [256, 512, 1024, 2048])
QUICK_STREAMS = {models.MEGALODON: 4_000, models.LLAMA: 2_000}
MOST_BY_TOKEN, PIECE, START_UP = 1.1, 512, 8.0


def run(session: Session, data: list[str] | None) -> None:
    size, chunk, lengths = QUICK if session.quick else (SIZE, CHUNK, LENGTHS)
    for name, tokens in (QUICK_STREAMS if session.quick else STREAMS).items():
        for length in lengths:
            took = START_UP + 2 * estimate(size, chunk, name, length, length)
            session.run(
                f"training {name} {length}",
                work,
                took,
                work_of="training",
                model=name,
                size=size,
                chunk=chunk,
                length=length,
            )
        took = START_UP + estimate(size, chunk, name, tokens, tokens, training=False)
        session.run(
            f"streaming {name}", work, took, work_of="streaming", model=name, size=size, chunk=chunk, length=tokens
        )


def work(scratch: Path, *, work_of: str, model: str, size: str, chunk: int, length: int) -> dict[str, Any]:
    flags = dict(work=work_of, model=model, size=size, chunk=chunk, length=length)
    command = [sys.executable, "-m", "bench.claims.memory", *(f"--{name}={value}" for name, value in flags.items())]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.claims.memory")
    for name, kind in {"work": str, "model": str, "size": str, "chunk": int, "length": int}.items():
        parser.add_argument(f"--{name}", type=kind, required=True)
    options = parser.parse_args()
    model = models.build(options.model, config(options.size, options.chunk), PIECE, 0)
    measure = training if options.work == "training" else streaming
    print(json.dumps(measure(model, options.length)))


def training(model: torch.nn.Module, length: int) -> dict[str, Any]:
    """Peak bytes of loss and gradients beyond what was resident; the gradients are there before, as in a run."""
    tokens = torch.randint(256, (1, length + 1), generator=torch.Generator().manual_seed(0))

    def step(until: int) -> None:
        model.zero_grad(set_to_none=False)
        model.loss(tokens[:, :until], tokens[:, 1 : until + 1]).backward()

    step(min(length, 64))
    in_use = machine.reset_peak_memory()
    step(length)
    return {"peak_bytes": machine.peak_memory_since(in_use)}


def streaming(model: torch.nn.Module, tokens: int) -> dict[str, Any]:
    """Tokens read, and resident bytes then."""
    model.eval()
    passed = stream_memory.read(model, tokens) if hasattr(model, "layers") else read_with_cache(model, tokens)
    return {"resident": stream_memory.sample(passed, tokens)}


@torch.no_grad()
def read_with_cache(model: Any, tokens: int) -> Iterator[int]:
    """The Llama reads a stream in pieces, with transformers' cache of all keys and values."""
    from transformers import DynamicCache

    cache, random = DynamicCache(), torch.Generator().manual_seed(0)
    for start in range(0, tokens, PIECE):
        piece: Tensor = torch.randint(256, (1, min(PIECE, tokens - start)), generator=random)
        model.net(piece, past_key_values=cache, use_cache=True, logits_to_keep=1)
        yield start + piece.shape[1]


def by_model(results: list[dict[str, Any]], work_of: str) -> dict[str, Any]:
    """Training: {model: {length: bytes}}; streaming: {model: [(tokens, bytes), ...]}."""
    found: dict[str, Any] = {}
    for content in results:
        s, result = content["settings"], content["result"]
        if s["work_of"] == work_of == "training":
            found.setdefault(s["model"], {})[s["length"]] = result["peak_bytes"]
        elif s["work_of"] == work_of:
            found[s["model"]] = result["resident"]
    return {name: dict(sorted(f.items())) if isinstance(f, dict) else f for name, f in found.items()}


def verdicts(results: list[dict[str, Any]]) -> dict[str, str]:
    peaks, streams = by_model(results, "training"), by_model(results, "streaming")
    said = {}
    ours = peaks.get(models.MEGALODON, {})
    longest = max(ours, default=0)
    if ours.get(longest) and ours.get(longest // 8):
        ratio = ours[longest] / longest / (ours[longest // 8] / (longest // 8))
        said["training: bytes a token do not grow"] = verdict.HELD if ratio <= MOST_BY_TOKEN else verdict.NOT_HELD
    if models.MEGALODON in streams:
        growth = stream_memory.growth(streams[models.MEGALODON])
        said["streaming: no growth"] = verdict.HELD if growth <= stream_memory.MOST_GROWTH else verdict.NOT_HELD
    return {"claim": verdict.together([*said.values()]) if len(said) == 2 else verdict.UNDECIDED, **said}


def table(results: list[dict[str, Any]]) -> list[str]:
    lines = ["| work | model | tokens | MiB | bytes a token |", "| --- | --- | --- | --- | --- |"]
    for name, of_model in by_model(results, "training").items():
        for length, peak in of_model.items():
            if peak is not None:
                lines.append(
                    f"| training, beyond what was there | {name} | {length:,} | {peak / 2**20:,.1f} | {peak / length:,.0f} |"
                )
    for name, samples in by_model(results, "streaming").items():
        for tokens, size in samples:
            lines.append(f"| reading a stream, whole process | {name} | {tokens:,} | {size / 2**20:,.1f} | |")
    return lines


def plot(results: list[dict[str, Any]], figure: Any) -> None:
    left, right = figure.subplots(1, 2)
    for name, of_model in by_model(results, "training").items():
        left.plot(
            [*of_model],
            [(peak or 0) / 2**20 for peak in of_model.values()],
            marker="o",
            label=name,
            color=models.COLOURS[name],
        )
    for name, samples in by_model(results, "streaming").items():
        tokens, sizes = zip(*samples, strict=True)
        right.plot(tokens, [(size - sizes[0]) / 2**20 for size in sizes], marker="o", color=models.COLOURS[name])
    axis_of_tokens(left, "tokens of a row")
    left.set(yscale="log", ylabel="training, MiB")
    axis_of_tokens(right, "tokens read")
    right.set_ylabel("more resident than after 1,000 tokens, MiB")
    left.legend()


if __name__ == "__main__":
    main()
