"""Claim e: training memory is proportional to the length, and a stream's memory is constant.

Each figure comes from its own process, `python -m bench.claims.memory --model M --work training --length N`: the peak of
resident bytes beyond those before the work (Linux).
"""

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
from bench.plots import plain_ticks

from . import models, verdict
from .report import axis_of_tokens
from .runs import Session
from .train import config, estimate

TITLE = "Memory against length"
RULE = (
    "Training: a training step of one row takes at most 1.1 times as many bytes a token at the longest length as at an eighth of "
    "it. Streaming: at the end of the stream a process has at most 2 % more resident memory than after 1,000 tokens. The claim is "
    "held if both hold. The Llama's figures are shown for comparison: its training memory is proportional to the length too, as "
    "SDPA keeps no scores, and its stream keeps the keys and values of all tokens."
)
SIZE, CHUNK, LENGTHS = "1M", 1024, [1 << i for i in range(10, 17)]
STREAMS = {models.MEGALODON: 1_000_000, models.LLAMA: 32_000}
QUICK = ("tiny", 64, [256, 512, 1024, 2048])
QUICK_STREAMS = {models.MEGALODON: 4_000, models.LLAMA: 2_000}
MAX_RATIO = 1.1
PIECE = 512  # tokens of a stream that a call reads
START_SECONDS = 8.0


def run(session: Session, data: list[str] | None) -> None:
    size, chunk, lengths = QUICK if session.quick else (SIZE, CHUNK, LENGTHS)
    for name, tokens in (QUICK_STREAMS if session.quick else STREAMS).items():
        settings = dict(model=name, size=size, chunk=chunk)
        for length in lengths:
            estimated = START_SECONDS + 2 * estimate(size, chunk, name, length, length)
            session.run(f"training {name} {length}", work, estimated, work_of="training", length=length, **settings)
        estimated = START_SECONDS + estimate(size, chunk, name, tokens, tokens, training=False)
        session.run(f"streaming {name}", work, estimated, work_of="streaming", length=tokens, **settings)


def work(scratch: Path, *, work_of: str, model: str, size: str, chunk: int, length: int) -> dict[str, Any]:
    flags = dict(work=work_of, model=model, size=size, chunk=chunk, length=length)
    command = [sys.executable, "-m", "bench.claims.memory", *(f"--{name}={value}" for name, value in flags.items())]
    process = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    if process.returncode:
        raise SystemExit(process.stderr[-2000:])
    return json.loads(process.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.claims.memory")
    for name, kind in {"work": str, "model": str, "size": str, "chunk": int, "length": int}.items():
        parser.add_argument(f"--{name}", type=kind, required=True)
    options = parser.parse_args()
    model = models.build(options.model, config(options.size, options.chunk), PIECE, 0)
    measure = measure_training if options.work == "training" else measure_streaming
    print(json.dumps(measure(model, options.length)))


def measure_training(model: torch.nn.Module, length: int) -> dict[str, Any]:
    """Peak bytes of loss and gradients beyond those resident before; gradient buffers exist before, as in a run."""
    tokens = torch.randint(256, (1, length + 1), generator=torch.Generator().manual_seed(0))

    def step(until: int) -> None:
        model.zero_grad(set_to_none=False)
        model.loss(tokens[:, :until], tokens[:, 1 : until + 1]).backward()

    step(min(length, 64))
    in_use = machine.reset_peak_memory()
    step(length)
    return {"peak_bytes": machine.peak_memory_since(in_use)}


def measure_streaming(model: torch.nn.Module, tokens: int) -> dict[str, Any]:
    """Numbers of tokens read, and resident bytes then."""
    model.eval()
    counts = stream_memory.read(model, tokens) if hasattr(model, "layers") else read_with_cache(model, tokens)
    return {"resident": stream_memory.sample(counts, tokens)}


@torch.no_grad()
def read_with_cache(model: Any, tokens: int) -> Iterator[int]:
    """Read a stream in pieces by the Llama, with transformers' cache of all keys and values."""
    from transformers import DynamicCache

    cache, random = DynamicCache(), torch.Generator().manual_seed(0)
    for start in range(0, tokens, PIECE):
        piece: Tensor = torch.randint(256, (1, min(PIECE, tokens - start)), generator=random)
        model.net(piece, past_key_values=cache, use_cache=True, logits_to_keep=1)
        yield start + piece.shape[1]


def peaks(results: list[dict[str, Any]]) -> dict[str, dict[int, int | None]]:
    """Peak training bytes by model and length."""
    found: dict[str, dict[int, int | None]] = {}
    for content in results:
        settings = content["settings"]
        if settings["work_of"] == "training":
            found.setdefault(settings["model"], {})[settings["length"]] = content["result"]["peak_bytes"]
    return {model: dict(sorted(by_length.items())) for model, by_length in found.items()}


def streams(results: list[dict[str, Any]]) -> dict[str, stream_memory.Samples]:
    """Numbers of tokens read and resident bytes then, by model."""
    runs = [content for content in results if content["settings"]["work_of"] == "streaming"]
    return {content["settings"]["model"]: content["result"]["resident"] for content in runs}


def verdicts(results: list[dict[str, Any]]) -> dict[str, str]:
    ours = peaks(results).get(models.MEGALODON, {})
    stream = streams(results).get(models.MEGALODON)
    longest = max(ours, default=0)
    by_comparison = {}
    if ours.get(longest) and ours.get(longest // 8):
        bytes_a_token = {length: ours[length] / length for length in (longest, longest // 8)}
        ratio = bytes_a_token[longest] / bytes_a_token[longest // 8]
        by_comparison["training: bytes a token do not grow"] = verdict.from_bool(ratio <= MAX_RATIO)
    if stream:
        growth = stream_memory.growth(stream)
        by_comparison["streaming: no growth"] = verdict.from_bool(growth <= stream_memory.MAX_GROWTH)
    claim = verdict.combine([*by_comparison.values()]) if len(by_comparison) == 2 else verdict.UNDECIDED
    return {"claim": claim, **by_comparison}


def table(results: list[dict[str, Any]]) -> list[str]:
    lines = ["| work | model | tokens | MiB | bytes a token |", "| --- | --- | --- | --- | --- |"]
    for name, by_length in peaks(results).items():
        for length, peak in by_length.items():
            if peak is not None:
                cells = f"{length:,} | {peak / 2**20:,.1f} | {peak / length:,.0f}"
                lines.append(f"| training, beyond memory in use | {name} | {cells} |")
    for name, samples in streams(results).items():
        for tokens, size in samples:
            lines.append(f"| reading a stream, whole process | {name} | {tokens:,} | {size / 2**20:,.1f} | |")
    return lines


def plot(results: list[dict[str, Any]], figure: Any) -> None:
    left, right = figure.subplots(1, 2)
    for name, by_length in peaks(results).items():
        mebibytes = [(peak or 0) / 2**20 for peak in by_length.values()]
        left.plot([*by_length], mebibytes, marker="o", label=name, color=models.COLOURS[name])
    axis_of_tokens(left, "tokens of a row")
    left.set(yscale="log", ylabel="training, MiB")
    plain_ticks(left.yaxis)
    left.legend()
    plot_streams(results, right)


def plot_streams(results: list[dict[str, Any]], axes: Any) -> None:
    for name, samples in streams(results).items():
        tokens, sizes = zip(*samples, strict=True)
        axes.plot(tokens, [(size - sizes[0]) / 2**20 for size in sizes], marker="o", color=models.COLOURS[name])
    axis_of_tokens(axes, "tokens read")
    axes.set_ylabel("more resident than after 1,000 tokens, MiB")


if __name__ == "__main__":
    main()
