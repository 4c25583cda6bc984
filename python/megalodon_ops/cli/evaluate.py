"""`eval`: bits per byte of a trained model, on text of any length in constant memory."""

from __future__ import annotations

import argparse
import gzip
import lzma
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from megalodon_ops import Megalodon, MegalodonState
from megalodon_ops.cli.batches import Batch, Batches, Document
from megalodon_ops.cli.data import FileDocument, check_glob, find_files, load_corpus
from megalodon_ops.cli.errors import CommandError
from megalodon_ops.cli.models import precision, trained_model, usable_device


class Reader:
    """A model that reads batch after batch, each row going on from the state the batch before left it in.

    With carries=False every batch starts afresh, which is all that packed batches ask for.
    """

    def __init__(self, model: Megalodon, carries: bool = True):
        self.model, self.carries = model, carries
        self.state: MegalodonState | None = None  # of each sequence of the last batch
        self.last: Tensor | None = None  # (R,) the sequence that ended each row

    def loss(self, batch: Batch, reduction: str = "mean") -> Tensor:
        """Nats a target, float32; with reduction "none" those of every target, (1, T)."""
        tokens, targets, bounds, going_on, last = (tensor.to(next(self.model.parameters()).device) for tensor in batch)
        options = dict(reduction=reduction, cu_seqlens=bounds)
        if not self.carries:
            return self.model.loss(tokens, targets, **options)
        state = None
        if self.state is not None and self.last is not None:
            state = select(self.state, torch.where(going_on < 0, -1, self.last[going_on]))
        loss, self.state = self.model.loss(tokens, targets, state=state, return_state=True, **options)
        self.state, self.last = self.state.detach(), last
        return loss

    def rows(self) -> MegalodonState | None:
        """The state of each row, for a checkpoint."""
        return None if self.state is None or self.last is None else select(self.state, self.last)

    def seek(self, rows: MegalodonState | None) -> None:
        self.state = rows
        self.last = None if rows is None else torch.arange(len(rows.norm.count), device=rows.norm.count.device)


def run(options: argparse.Namespace) -> int:
    device = usable_device(options.device)
    model, record = trained_model(options.checkpoint, device)
    dtype = options.dtype or record["options"]["dtype"]
    documents, text = _documents(options, record)
    total = sum(map(len, documents))
    print(f"{text}: {len(documents)} documents, {total:,} bytes; step {record['step']}")
    with tqdm(total=total, unit="B", unit_scale=True, mininterval=0.5, leave=False) as bar:
        bits = bits_per_byte(model, documents, options.batch, options.piece, precision(device, dtype), bar)
    perplexity = torch.tensor(bits, dtype=torch.float64).exp2().item()  # infinite from 1024 bits on
    print(f"{bits:.4f} bits per byte, perplexity {perplexity:.4f} per byte")
    return 0


def select(state: MegalodonState, rows: Tensor) -> MegalodonState:
    """The state of the sequences `rows`; a row of -1 becomes a fresh state. Where all rows go on, nothing is copied."""
    if torch.equal(rows, torch.arange(state.num_sequences, device=rows.device)):
        return state
    return state[rows.clamp(min=0)].reset(rows < 0)


@torch.no_grad()
def bits_per_byte(
    model: Megalodon,
    documents: Sequence[Document],
    rows: int,
    length: int,
    autocast: AbstractContextManager,
    bar: tqdm | None = None,
) -> float:
    """Bits per byte, every byte of every document predicted from all bytes before it, read in pieces of `length`.

    Raises FloatingPointError where a loss is infinite or NaN.
    """
    training = model.training
    model.eval()
    batches = Batches(documents, min(rows, len(documents)), length, context="streamed", seed=None)
    reader = Reader(model)
    nats, count = 0.0, 0
    while (batch := batches.next()) is not None:
        with autocast:
            losses = reader.loss(batch, "none")
        nats += losses.double().sum().item()
        count += losses.numel()
        if bar is not None:
            bar.update(losses.numel())
    model.train(training)
    if not math.isfinite(nats):
        raise FloatingPointError(
            f"the loss of the text to predict is {nats}; the model's weights are too large, or damaged"
        )
    return nats / count / math.log(2)


def compressed_bits(documents: Sequence[bytes]) -> dict[str, float]:
    """Bits per byte that general compressors need for the documents laid end to end."""
    text = b"".join(documents)
    sizes = {"gzip -9": len(gzip.compress(text, 9)), "xz -9": len(lzma.compress(text, preset=9))}
    return {name: 8 * size / len(text) for name, size in sizes.items()}


def _documents(options: argparse.Namespace, record: dict[str, Any]) -> tuple[Sequence[Document], str]:
    globs = getattr(options, "glob", None)
    if hasattr(options, "data"):
        return [FileDocument(path) for path in find_files(options.data, globs)], " ".join(map(str, options.data))
    check_glob(globs, None)
    corpus = load_corpus(record["options"]["data"], record["options"]["glob"])
    if corpus.fingerprint != record["data"]["fingerprint"]:
        raise CommandError("the text of the run has changed since, so what was held out is not known; give --data")
    return corpus.held_out, "held-out text of the run"
