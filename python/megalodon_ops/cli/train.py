"""`train`: a model of bytes or tokens, from text to a checkpoint, a loss curve and a sample; by one process or several."""

from __future__ import annotations

import argparse
import codecs
import math
import resource
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import cached_property
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from megalodon_ops import Megalodon
from megalodon_ops.cli import launch
from megalodon_ops.cli.arguments import flag_of
from megalodon_ops.cli.console import Progress, StopSignals
from megalodon_ops.cli.data import load_data
from megalodon_ops.cli.errors import CommandError
from megalodon_ops.cli.evaluate import compressed_bits, nats_and_bytes
from megalodon_ops.cli.generate import show_sample
from megalodon_ops.cli.lock import Lock
from megalodon_ops.cli.models import precision, usable_device
from megalodon_ops.cli.settings import Settings, resolve, run_folder
from megalodon_ops.cli.shares import check_shares, gathered, new_model, shared_out, whole_norm
from megalodon_ops.errors import TeamError
from megalodon_ops.model.files import remove_drafts
from megalodon_ops.ops.memory import check_fits
from megalodon_ops.tokenizers import Tokenizer
from megalodon_ops.training import (
    Batches, Checkpoint, Corpus, Metrics, Muon, Reader, Saver, Schedule, adamw, optimizer_threads, read_metrics, threads,
)  # fmt: skip
from megalodon_ops.training.batches import Batch, Document
from megalodon_ops.training.curve import draw_metrics
from megalodon_ops.training.metrics import is_end
from megalodon_ops.training.parts import seed_of_reader
from megalodon_ops.training.run_folder import has_checkpoint
from megalodon_ops.training.sample import HeldOutSample
from megalodon_ops.training.shards import ShardDocuments
from megalodon_ops.training.team import Team, telling

METRICS = "metrics.jsonl"
EVALUATED = (8, 2048)
"""Rows and length of the batches of held-out text at the end of a run"""
TRIED = 1 << 15
"""Bytes of held-out text that tell, before the run, whether the tokenizer gives it back"""
OPTIMIZERS = {"muon": Muon, "adamw": adamw}
FIRST_PACE = 8
"""Fewest steps that tell how long a step takes"""


def run(options: argparse.Namespace) -> int:
    with launch.joined(options) as team, telling(), ExitStack() as stack:
        folder = team.tell(team.in_first(launch.folder_of_run, options, run_folder))
        team.in_first(lambda: stack.enter_context(Lock(folder)))
        again = team.tell(launch.is_of_this_launch(folder) and has_checkpoint(folder))
        options.resume = again or getattr(options, "resume", False)
        settings, saved = team.together(resolve, options, folder, team)
        team.alike({flag_of(name): value for name, value in {**settings.record(), **settings.config.to_dict()}.items()})
        team.alike({"the checkpoint": None if saved is None else saved.step})
        team.in_first(launch.sign, folder)
        return _run(settings, saved, team, getattr(options, "mesh", None))


def _run(settings: Settings, saved: Checkpoint | None, team: Team, mesh: dict[str, int] | None) -> int:
    device = team.together(usable_device, settings.device)
    if team.size > 1:
        from megalodon_ops.distributed import make_mesh

        sizes = mesh or {"data": team.size}
        team.together(check_shares, settings, sizes)
        team.mesh = make_mesh(sizes, device_type=device.type, timeout=team.timeout)
    team.together(check_memory, settings, team.size)
    corpus = team.together(load_data, settings.data, settings.glob)
    team.alike({"the text": corpus.fingerprint})
    if saved and corpus.fingerprint != saved.record["data"]["fingerprint"]:
        raise TeamError("--resume: the text is not the one this run was started with; start another run")
    if saved and (end := team.tell(team.in_first(recorded_end, settings, saved))):
        print(f"{settings.out}: finished after step {end['step']}; it goes on with a larger --steps or --minutes")
        show_figures(corpus, end)
        return 0
    with ExitStack() as stack:
        step = saved.step if saved else 0
        metrics = team.in_first(lambda: stack.enter_context(Metrics(settings.out / METRICS, step)))
        return Trainer(settings, corpus, device, metrics, saved, team).run()


def check_memory(settings: Settings, processes: int = 1) -> None:
    """Refuses, before anything is allocated, a run whose parameters, activations and states alone do not fit in memory."""
    config, complex_numbers = settings.config, 2
    weights_gradients_and_moments, token_target_and_activations = 4, 4 + config.num_layers
    numbers = weights_gradients_and_moments * config.num_parameters()
    numbers += token_target_and_activations * settings.batch * settings.length * config.model_dim
    numbers += complex_numbers * settings.batch * config.num_layers * config.model_dim * config.cema_ndim
    try:
        check_fits(numbers * torch.float32.itemsize // processes, f"training {config.num_parameters():,} parameters")
    except ValueError as error:
        raise CommandError(f"{error}; make --dim, --layers, --cema-ndim, --batch or --length smaller") from error


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
    """A run from its start, or from a checkpoint, to its end; in each of its processes."""

    def __init__(
        self,
        settings: Settings,
        corpus: Corpus,
        device: torch.device,
        metrics: Metrics | None,
        saved: Checkpoint | None,
        team: Team,
    ):
        """metrics: None in all processes but the first."""
        self.settings, self.corpus, self.device, self.metrics, self.team = settings, corpus, device, metrics, team
        torch.manual_seed(settings.seed)
        self.model = new_model(settings.config, device, team)
        if team.size > 1:  # from here on, each process draws numbers of its own
            torch.manual_seed(seed_of_reader(torch.get_rng_state(), team.reader, team.readers))
        self.optimizer = OPTIMIZERS[settings.optimizer](self.model, lr=settings.lr, weight_decay=settings.weight_decay)
        self.optimizer_threads = optimizer_threads(self.model)
        documents = team.together(encoded, corpus.train, settings.tokenizer)
        share = settings.batch // team.extent("data")
        first = share * team.place("data")
        self.batches = Batches(
            documents, range(first, first + share), settings.length, batch=settings.batch, start=settings.tokenizer.start,
            context=settings.context, seed=settings.seed, context_length=settings.context_length,
        )  # fmt: skip
        self.bytes_per_token = corpus.num_bytes / int(self.batches.lengths.sum(dtype="int64"))
        self.reader = Reader(
            self.model, carries=settings.context == "streamed", part=team.place("chunk"), parts=team.extent("chunk")
        )
        self.schedule = Schedule(settings.lr, settings.warmup, settings.steps, settings.minutes)
        self.autocast = precision(device, settings.dtype)
        self.saver = Saver(settings.out, team)
        self.step, self.saved_step = 0, -1
        self.spent = 0.0  # seconds before this process
        if saved:
            team.together(self._restore, saved)
        self.started = self.paced_at = time.monotonic()
        self.paced_step = self.step

    def run(self) -> int:
        settings, corpus, team = self.settings, self.corpus, self.team
        lengths = self.batches.lengths
        cut = len(lengths) > len(corpus.train)
        parts = f" ({len(lengths):,} parts of at most {lengths.max():,} tokens)" if cut else ""
        processes = "" if team.size == 1 else f"{team.size} processes, {launch.text_of(team.sizes())}; "
        print(
            f"{settings.out}: {processes}{self.model.num_parameters():,} parameters; "
            f"{corpus.num_bytes:,} bytes in {len(corpus.train)} documents to learn from{parts}, "
            f"{sum(map(len, corpus.held_out)):,} in {len(corpus.held_out)} held out",
            flush=True,
        )
        if note := dropped(settings.tokenizer, excerpt(corpus.held_out, TRIED)):
            print(note, flush=True)
        self._save()
        begun = {"step": self.step, "seconds": self.spent}
        stopped = 0
        with StopSignals(team.size > 1) as signals, Progress(begun, settings.steps, self.schedule.budget) as progress:
            while not self.schedule.finished(self.step):
                place = self.batches.position()
                with team.mine():
                    batch = self.batches.next()
                if stopped := team.most(signals.received):
                    self.batches.seek(place)
                    break
                row = self.train_step(batch)
                progress.show(row)
                due = self._checkpoint_due()
                if due:
                    self._set_pace()
                if self.step % settings.eval_every == 0 or self.schedule.finished(self.step):
                    progress.held_out = self._look()
                if due:
                    self._save()
            self._save()
            self.saver.wait()
        if stopped:
            if team.first:
                self._draw({})
            print(
                f"stopped after step {self.step}; continue with: "
                f"python -m megalodon_ops train --out {shlex.quote(str(settings.out))} --resume"
            )
            return 128 + stopped
        self._finish()
        return 0

    def train_step(self, batch: Batch) -> dict[str, Any]:
        begin = time.monotonic()
        lr = self.schedule.apply(self.optimizer, self.step)
        with self.autocast:
            loss = self.reader.loss(batch)
        loss.backward()
        norm = whole_norm(nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip))
        if not math.isfinite(loss.item()):  # that of all processes
            raise TeamError(f"the loss is {loss.item()} at step {self.step + 1}; a lower --lr may help")
        with threads(self.optimizer_threads):
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        tokens = self.settings.batch * self.settings.length
        row = {
            "step": self.step,
            "loss": loss.item(),
            "bits_per_byte": loss.item() / math.log(2) / self.bytes_per_token,
            "learning_rate": lr,
            "gradient_norm": norm.item(),
            "tokens": self.step * tokens,
            "seconds": round(self._seconds(), 3),
            "tokens_per_second": round(tokens / (time.monotonic() - begin)),
        }
        self._note(**row)
        return row

    def _note(self, **row: Any) -> None:
        """Adds a line to the metrics, which the first process writes."""
        with self.team.mine():
            if self.metrics is not None:
                self.metrics.write(**row)

    @cached_property
    def sample(self) -> HeldOutSample:
        chunk = max(1, round(self.settings.config.chunk_size * self.bytes_per_token))
        return HeldOutSample(self.corpus.held_out, self.settings.tokenizer, chunk)

    def _look(self) -> float:
        """Bits per byte of the sample of held-out text."""
        model, team = gathered(self.model), self.team
        with self.autocast:
            own = team.together(self.sample.nats_and_bytes, model, team.rank, team.size)
        bits = self._bits_per_byte(own)
        self._note(step=self.step, held_out_bits_per_byte=bits)
        return bits

    def _held_out_bits(self, model: Megalodon) -> float:
        """Bits per byte of all held-out text, each document predicted from its beginning on."""
        share = shared_out(self.corpus.held_out, self.team)
        own = self.team.together(nats_and_bytes, model, self.settings.tokenizer, share, *EVALUATED, self.autocast)
        return self._bits_per_byte(own)

    def _bits_per_byte(self, own: tuple[float, float]) -> float:
        """Of the nats and bytes of all processes."""
        nats, num_bytes = zip(*self.team.gather(own), strict=True)
        return math.fsum(nats) / math.log(2) / math.fsum(num_bytes)

    def _finish(self) -> None:
        """Writes and shows the figures of all held-out text and of compressors; the picture; a sample."""
        documents = self.corpus.held_out
        model = gathered(self.model)
        bits = self._held_out_bits(model)
        if not self.team.first:
            return
        compressors = compressed_bits(documents)
        end = {"step": self.step, "final": True, "held_out_bits_per_byte": bits, "compressors": compressors}
        self.metrics.write(**end)
        self._draw(compressors)
        show_figures(self.corpus, end)
        unit = 1 << 20 if sys.platform == "darwin" else 1 << 10  # units of ru_maxrss in a MiB
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
        print(f"{self._seconds():.0f} s, peak memory {peak:,.0f} MiB; curve and checkpoint in {self.settings.out}")
        show_sample(model, self.settings.tokenizer, documents, self.settings.seed, self.autocast)

    def _seconds(self) -> float:
        return self.spent + time.monotonic() - self.started

    def _checkpoint_due(self) -> bool:
        step, every = self.step, self.settings.checkpoint_every
        early = self.schedule.budget is not None and FIRST_PACE <= step < every and step & (step - 1) == 0
        return step % every == 0 or early

    def _set_pace(self) -> None:
        """Draws the schedule's line anew, by the clock of the first process."""
        now, steps = time.monotonic(), self.step - self.paced_step
        if self.schedule.budget is None or steps < FIRST_PACE:  # too few steps to tell
            return
        self.schedule.set_pace(self.step, *self.team.tell((self._seconds(), (now - self.paced_at) / steps)))
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
        self.saver.save(
            self.step, self.model, optimizer=self.optimizer, state=self.reader.rows(), tokenizer=self.settings.tokenizer,
            record=record,
        )  # fmt: skip
        self.saved_step = self.step

    def _restore(self, saved: Checkpoint) -> None:
        record = saved.record
        saved.load_weights(self.model)
        saved.load_optimizer(self.optimizer, self.model)
        state = saved.state_of(self.team.mesh)
        self.reader.seek(None if state is None else state.to(self.device))
        try:
            self.batches.seek(record["data"]["position"])
        except ValueError as error:
            raise CommandError(f"--resume {saved.folder}: {error}") from error
        self.step = self.saved_step = saved.step
        self.spent = record["seconds"]
        self.schedule.seek(record["schedule"], self.step, self.spent)
        saved.restore_random(self.device, reader=self.team.reader, readers=self.team.readers)
        if self.team.first:
            remove_drafts(saved.folder.parent, "step-*")

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


def encoded(documents: Sequence[bytes] | ShardDocuments, tokenizer: Tokenizer) -> Sequence[Document]:
    """The documents' ids, those of bytes as the bytes themselves; documents of which a tokenizer leaves nothing go."""
    if tokenizer.byte_level or isinstance(documents, ShardDocuments):
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
