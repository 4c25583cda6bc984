"""`python -m bench.stream_memory`: resident memory of this process while a model reads, then decodes, a long stream.

The memory is read from /proc/self/statm (Linux) after 1k, 2k, 4k and so on tokens: first of a text read in pieces of a
chunk, then of tokens decoded one by one. A stream's memory must not grow: the exit status is 1 if the last value is more
than 2 % above that at 1k tokens. Prints a table; with --out also writes a plot and the numbers.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

import megalodon_ops as mo

from .plots import plain_ticks

CONFIG = dict(num_layers=4, model_dim=128, num_heads=2, z_dim=64, value_dim=256, ffn_hidden_dim=256)
CONFIG |= dict(chunk_size=512, vocab_size=256)
MAX_GROWTH = 0.02
Samples = list[tuple[int, int]]
"""Number of tokens so far, and resident bytes then"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.stream_memory", description=__doc__)
    parser.add_argument("--tokens", type=int, default=1_000_000, help="length of each stream (1,000,000)")
    parser.add_argument("--out", type=Path, help="folder for stream_memory.json and stream_memory.png")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = mo.Megalodon(mo.MegalodonConfig(**CONFIG)).eval()
    streams = {}
    begin = time.monotonic()
    for name, stream in {"reading": read, "decoding": decode}.items():
        streams[name] = sample(stream(model, options.tokens), options.tokens)
        print(f"{time.monotonic() - begin:4.0f} s  {name}", file=sys.stderr)
    print(table(streams))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        Path(options.out, "stream_memory.json").write_text(json.dumps(streams, indent=1) + "\n")
        plot(streams, options.out / "stream_memory.png")
    return int(any(growth(samples) > MAX_GROWTH for samples in streams.values()))


@torch.no_grad()
def read(model: mo.Megalodon, tokens: int) -> Iterator[int]:
    """Read a stream in pieces; yield the number of tokens so far."""
    state = None
    random = torch.Generator().manual_seed(0)
    size = model.config.chunk_size
    for start in range(0, tokens, size):
        piece = torch.randint(model.config.vocab_size, (1, min(size, tokens - start)), generator=random)
        _, state = model(piece, state=state, return_state=True, inplace_state=state is not None)
        yield start + piece.shape[1]


def decode(model: mo.Megalodon, tokens: int) -> Iterator[int]:
    """Generate a stream; yield the number of tokens so far."""
    for count, _ in zip(range(1, tokens + 1), model.stream(torch.tensor([[0]]), seed=0), strict=False):
        yield count


def sample(counts: Iterator[int], tokens: int) -> Samples:
    """Resident memory at about 1,000, 2,000, 4,000, ... tokens, and at the end."""
    samples = []
    mark = 1000  # tokens at the next sample
    for count in counts:
        if count >= mark or count == tokens:
            samples.append((count, resident_bytes()))
            while mark <= count:
                mark *= 2
    return samples


def resident_bytes() -> int:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def growth(samples: Samples) -> float:
    """Growth from the first to the last value, as a share of the first."""
    return samples[-1][1] / samples[0][1] - 1


def table(streams: dict[str, Samples]) -> str:
    lines = ["| stream | tokens | resident, MiB | more than at first, MiB |", "| --- | --- | --- | --- |"]
    for name, samples in streams.items():
        for count, size in samples:
            more = (size - samples[0][1]) / 2**20
            lines.append(f"| {name} | {count:,} | {size / 2**20:,.1f} | {more:+.1f} |")
    return "\n".join(lines)


def plot(streams: dict[str, Samples], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for name, samples in streams.items():
        counts = [count for count, _ in samples]
        axes.plot(counts, [size / 2**20 for _, size in samples], marker="o", label=name)
    axes.set(xscale="log", xlabel="tokens", ylabel="resident memory, MiB", ylim=(0, None))
    plain_ticks(axes.xaxis)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


if __name__ == "__main__":
    raise SystemExit(main())
