"""`train`: a model of bytes or tokens, from text to a checkpoint, a loss curve and a sample."""

from __future__ import annotations

import argparse
import codecs
import math
import resource
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from megalodon_ops import Megalodon
from megalodon_ops.cli.console import Progress, StopSignals
from megalodon_ops.cli.data import load_corpus
from megalodon_ops.cli.errors import CommandError
from megalodon_ops.cli.evaluate import bits_per_byte, compressed_bits
from megalodon_ops.cli.generate import show_sample
from megalodon_ops.cli.lock import Lock
from megalodon_ops.cli.models import precision, usable_device
from megalodon_ops.cli.settings import Settings, resolve, run_folder
from megalodon_ops.ops.memory import check_fits
from megalodon_ops.tokenizers import Tokenizer
from megalodon_ops.training import (
    Batches, Checkpoint, Corpus, Metrics, Reader, Schedule, adamw, optimizer_threads, read_metrics,
    save_checkpoint, threads,
)  # fmt: skip
from megalodon_ops.training.batches import Document
from megalodon_ops.training.curve import draw_metrics
from megalodon_ops.training.metrics import is_end

METRICS = "metrics.jsonl"
LOOK = 1 << 15
"""Held-out bytes evaluated during the run; its end evaluates all bytes"""
LOOK_SHAPE = (8, 2048)
"""Rows and length of the batches of held-out bytes"""
FIRST_PACE = 8
"""Fewest steps that tell how long a step takes"""


def run(options: argparse.Namespace) -> int:
    with Lock(run_folder(options)) as lock:
        return _run(*resolve(options, lock.folder))


def _run(settings: Settings, saved: Checkpoint | None) -> int:
    device = usable_device(settings.device)
    check_memory(settings)
    corpus = load_corpus(settings.data, settings.glob)
    if saved and corpus.fingerprint != saved.record["data"]["fingerprint"]:
        raise CommandError("--resume: the text is not the one this run was started with; start another run")
    if saved and (end := recorded_end(settings, saved)):
        print(f"{settings.out}: finished after step {end['step']}; it goes on with a larger --steps or --minutes")
        show_figures(corpus, end)
        return 0
    with Metrics(settings.out / METRICS, saved.step if saved else 0) as metrics:
        return Trainer(settings, corpus, device, metrics, saved).run()


def check_memory(settings: Settings) -> None:
    """Refuses, before anything is allocated, a run whose parameters and activations alone do not fit in memory."""
    weights_gradients_and_moments, token_target_and_activations = 4, 4 + settings.config.num_layers
    numbers = weights_gradients_and_moments * settings.config.num_parameters()
    tokens = settings.batch * settings.length
    numbers += token_target_and_activations * tokens * settings.config.model_dim
    try:
        check_fits(numbers * torch.float32.itemsize, f"training {settings.config.num_parameters():,} parameters")
    except ValueError as error:
        raise CommandError(f"{error}; make --dim, --layers, --batch or --length smaller") from error


def recorded_end(settings: Settings, saved: Checkpoint) -> dict[str, Any] | None:
    """The last line of the run's metrics, if the run ends where the checkpoint is and the line has been written."""
    schedule = Schedule(settings.lr, settings.warmup, settings.steps, settings.minutes)
    step = saved.record["step"]
    schedule.seek(saved.record["schedule"], step, saved.record["seconds"])
    if not schedule.finished(step):
        return None
    rows = read_metrics(settings.out / METRICS)
    return next((row for row in rows if is_end(row) and row["step"] == step), None)


def show_figures(corpus: Corpus, end: dict[str, Any]) -> None:
    """Prints how well the held-out text is predicted, beside compressors, as the last line of the run's metrics has it."""
    print(f"\nheld-out text, {sum(map(len, corpus.held_out)):,} bytes     bits per byte")
    for name, bits in {f"this model, step {end['step']}": end["held_out_bits_per_byte"], **end["compressors"]}.items():
        print(f"  {name:<28} {bits:.3f}")


class Trainer:
    """A run from its start, or from a checkpoint, to its end."""

    def __init__(
        self,
        settings: Settings,
        corpus: Corpus,
        device: torch.device,
        metrics: Metrics,
        saved: Checkpoint | None,
    ):
        self.settings, self.corpus, self.device, self.metrics = settings, corpus, device, metrics
        torch.manual_seed(settings.seed)
        self.model = Megalodon(settings.config).to(device).train()
        self.optimizer = adamw(self.model, lr=settings.lr, weight_decay=settings.weight_decay)
        self.optimizer_threads = optimizer_threads(self.model)
        documents = encoded(corpus.train, settings.tokenizer)
        self.bytes_per_token = sum(map(len, corpus.train)) / sum(map(len, documents))
        self.batches = Batches(
            documents, settings.batch, settings.length, start=settings.tokenizer.start, context=settings.context,
            seed=settings.seed,
        )  # fmt: skip
        self.reader = Reader(self.model, carries=settings.context == "streamed")
        self.schedule = Schedule(settings.lr, settings.warmup, settings.steps, settings.minutes)
        self.autocast = precision(device, settings.dtype)
        self.step, self.saved_step = 0, -1
        self.spent = 0.0  # seconds before this process
        if saved:
            self._restore(saved)
        self.started = self.paced_at = time.monotonic()
        self.paced_step = self.step

    def run(self) -> int:
        settings, corpus = self.settings, self.corpus
        print(
            f"{settings.out}: {self.model.num_parameters():,} parameters; "
            f"{sum(map(len, corpus.train)):,} bytes in {len(corpus.train)} documents to learn from, "
            f"{sum(map(len, corpus.held_out)):,} in {len(corpus.held_out)} held out",
            flush=True,
        )
        if note := dropped(settings.tokenizer, excerpt(corpus.held_out, LOOK)):
            print(note, flush=True)
        self._save()
        begun = {"step": self.step, "seconds": self.spent}
        with StopSignals() as signals, Progress(begun, settings.steps, self.schedule.budget) as progress:
            while not self.schedule.finished(self.step) and not signals.received:
                row = self.train_step()
                progress.show(row)
                due = self._checkpoint_due()
                if due:
                    self._set_pace()
                if self.step % settings.eval_every == 0 or self.schedule.finished(self.step):
                    progress.held_out = self._look()
                if due:
                    self._save()
            self._save()
        if signals.received:
            self._draw({})
            print(
                f"stopped after step {self.step}; continue with: "
                f"python -m megalodon_ops train --out {shlex.quote(str(settings.out))} --resume"
            )
            return 128 + signals.received
        self._finish()
        return 0

    def train_step(self) -> dict[str, Any]:
        begin = time.monotonic()
        batch = self.batches.next()
        assert batch is not None, "training batches never end"
        lr = self.schedule.apply(self.optimizer, self.step)
        with self.autocast:
            loss = self.reader.loss(batch)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        if not math.isfinite(loss.item()):
            raise CommandError(f"the loss is {loss.item()} at step {self.step + 1}; a lower --lr may help")
        with threads(self.optimizer_threads):
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        row = {
            "step": self.step,
            "loss": loss.item(),
            "bits_per_byte": loss.item() / math.log(2) / self.bytes_per_token,
            "learning_rate": lr,
            "gradient_norm": norm.item(),
            "tokens": self.step * self.settings.batch * self.settings.length,
            "seconds": round(self._seconds(), 3),
            "tokens_per_second": round(batch.tokens.numel() / (time.monotonic() - begin)),
        }
        self.metrics.write(**row)
        return row

    def _look(self) -> float:
        """Bits per byte of a part of the held-out text."""
        bits = self._held_out_bits(excerpt(self.corpus.held_out, LOOK))
        self.metrics.write(step=self.step, held_out_bits_per_byte=bits)
        return bits

    def _held_out_bits(self, documents: list[bytes]) -> float:
        return bits_per_byte(self.model, self.settings.tokenizer, documents, *LOOK_SHAPE, self.autocast)

    def _finish(self) -> None:
        """Writes and shows the figures of all held-out text and of compressors; the picture; a sample."""
        documents = self.corpus.held_out
        bits = self._held_out_bits(documents)
        compressors = compressed_bits(documents)
        end = {"step": self.step, "final": True, "held_out_bits_per_byte": bits, "compressors": compressors}
        self.metrics.write(**end)
        self._draw(compressors)
        show_figures(self.corpus, end)
        unit = 1 << 20 if sys.platform == "darwin" else 1 << 10  # units of ru_maxrss in a MiB
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
        print(f"{self._seconds():.0f} s, peak memory {peak:,.0f} MiB; curve and checkpoint in {self.settings.out}")
        show_sample(self.model, self.settings.tokenizer, documents, self.settings.seed, self.autocast)

    def _seconds(self) -> float:
        return self.spent + time.monotonic() - self.started

    def _checkpoint_due(self) -> bool:
        step, every = self.step, self.settings.checkpoint_every
        early = self.schedule.budget is not None and FIRST_PACE <= step < every and step & (step - 1) == 0
        return step % every == 0 or early

    def _set_pace(self) -> None:
        now = time.monotonic()
        if self.step - self.paced_step < FIRST_PACE:  # too few steps to tell
            return
        self.schedule.set_pace(self.step, self._seconds(), (now - self.paced_at) / (self.step - self.paced_step))
        self.paced_at, self.paced_step = now, self.step

    def _save(self) -> None:
        if self.saved_step == self.step:
            return
        record = {
            "options": self.settings.record(),
            "data": {"fingerprint": self.corpus.fingerprint, "position": self.batches.position()},
            "schedule": self.schedule.position(),
            "seconds": self._seconds(),
        }
        save_checkpoint(
            self.settings.out, self.step, self.model, optimizer=self.optimizer, state=self.reader.rows(),
            tokenizer=self.settings.tokenizer, record=record,
        )  # fmt: skip
        self.saved_step = self.step

    def _restore(self, saved: Checkpoint) -> None:
        record = saved.record
        saved.load_weights(self.model)
        saved.load_optimizer(self.optimizer, self.model)
        self.reader.seek(None if saved.state is None else saved.state.to(self.device))
        try:
            self.batches.seek(record["data"]["position"])
        except ValueError as error:
            raise CommandError(f"--resume {saved.folder}: {error}") from error
        self.step = self.saved_step = saved.step
        self.spent = record["seconds"]
        self.schedule.seek(record["schedule"], self.step, self.spent)
        saved.restore_random(self.device)

    def _draw(self, compressors: dict[str, float]) -> None:
        draw_metrics(self.settings.out / "loss_curve.png", read_metrics(self.metrics.path), compressors)


def excerpt(documents: list[bytes], size: int) -> list[bytes]:
    """The first documents, up to `size` bytes in all."""
    taken, left = [], size
    for document in documents:
        if not left:
            break
        taken.append(document[:left])
        left -= len(taken[-1])
    return taken


def dropped(tokenizer: Tokenizer, documents: list[bytes]) -> str:
    """What the user is told where a tokenizer does not give documents back as they were."""
    if tokenizer.byte_level:
        return ""
    documents = [_without_a_cut_letter(document) for document in documents]
    encoded = zip(documents, tokenizer.encode_batch(documents), strict=True)
    changed = sum(tokenizer.decode(ids) != document for document, ids in encoded)
    if not changed:
        return ""
    return (
        f"the tokenizer drops or changes a part of {changed} of {len(documents)} held-out documents: bits per byte are of "
        "what it keeps, over the bytes of the whole text"
    )


def _without_a_cut_letter(text: bytes) -> bytes:
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")  # keeps back what may be a part of a letter
    return decoder.decode(text).encode(errors="surrogateescape")


def encoded(documents: list[bytes], tokenizer: Tokenizer) -> Sequence[Document]:
    """The documents' ids, those of bytes as the bytes themselves; documents of which a tokenizer leaves nothing go."""
    if tokenizer.byte_level:
        return documents
    with tqdm(total=sum(map(len, documents)), unit="B", unit_scale=True, desc="encoding", leave=False, delay=1) as bar:

        def read() -> Iterator[bytes]:
            for document in documents:
                yield document
                bar.update(len(document))

        found = [ids for ids in tokenizer.encode_batch(read()) if len(ids)]
    if not found:
        raise CommandError("--tokenizer: makes no token of the text")
    return found
