"""`train`: a model of bytes or tokens, from text to a checkpoint, a loss curve and samples; by one process or several.

The function `run` is the run, from top to bottom; what it calls stands below it, in the order of the calls.
"""

from __future__ import annotations

import codecs
import math
import resource
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from megalodon_ops import Megalodon, MegalodonConfig
from megalodon_ops.cli.console import Progress, StopSignals
from megalodon_ops.cli.data import load_data
from megalodon_ops.cli.errors import CommandError
from megalodon_ops.cli.evaluate import compressed_bits, nats_and_bytes
from megalodon_ops.cli.flags import Mesh, flag_of
from megalodon_ops.cli.generate import show_sample
from megalodon_ops.cli.lock import locked
from megalodon_ops.cli.models import precision, usable_device
from megalodon_ops.cli.options import Train
from megalodon_ops.cli.processes import Processes, is_one_of_several, joined
from megalodon_ops.cli.settings import begun, resumed, run_folder
from megalodon_ops.errors import FileError
from megalodon_ops.ops.memory import check_fits
from megalodon_ops.tokenizers import Tokenizer
from megalodon_ops.training import (
    Batches, Checkpoint, Corpus, Metrics, Muon, Reader, Saver, Schedule, adamw, load_checkpoint, optimizer_threads,
    read_metrics, threads,
)  # fmt: skip
from megalodon_ops.training.batches import Document
from megalodon_ops.training.checkpoint import has_checkpoint, reader_of, seed_of_reader
from megalodon_ops.training.corpus import Parts
from megalodon_ops.training.curve import draw_metrics
from megalodon_ops.training.metrics import is_end
from megalodon_ops.training.sample import HeldOutSample

METRICS, CURVE = "metrics.jsonl", "loss_curve.png"
EVALUATED = (8, 2048)
"""Rows and length of the batches of held-out text at the end of a run"""
TRIED_DOCUMENTS, TRIED = 16, 1 << 12
"""Held-out documents, and bytes of each, that tell before the run whether the tokenizer gives text back"""
OPTIMIZERS = {"muon": Muon, "adamw": adamw}
FIRST_PACE = 8
"""Fewest steps that tell how long a step takes"""


def run(options: Train) -> int:
    with joined(options.mesh, options.timeout) as processes, ExitStack() as stack:
        # What to do, and in which folder: a new run, or one that goes on.
        out = run_folder(options, is_one_of_several())
        if processes.first:
            stack.enter_context(locked(out))
        saved = newest_checkpoint(options, out, processes)
        options, config, tokenizer = begun(options, out) if saved is None else resumed(options, out, saved)
        processes.check_same({flag_of(name): value for name, value in {**config.to_dict(), **options.record()}.items()})
        device = usable_device(options.device)
        if processes.size > 1:
            from megalodon_ops.distributed import make_mesh

            sizes = options.mesh or Mesh(f"data={processes.size}")
            check_shares(options, config, sizes)
            processes.mesh = make_mesh(sizes, device_type=device.type, timeout=options.timeout)
        check_memory(options, config, processes.size)

        # The text, and what is held out of it.
        corpus = load_data(options.data, options.glob)
        processes.check_same({"the text": corpus.fingerprint})
        if saved and corpus.fingerprint != saved.record["data"]["fingerprint"]:
            raise CommandError("--resume: the text is not the one this run was started with; start another run")

        # The model, its optimizer, the batches and the learning rate's way.
        schedule = Schedule(options.lr, options.warmup, options.steps, options.minutes)
        step, spent = 0, 0.0
        if saved:
            step, spent = saved.step, saved.record["seconds"]
            schedule.seek(saved.record["schedule"], step, spent)
            if end := recorded_end(out, schedule, step):
                print(f"{out}: finished after step {step}; it goes on with a larger --steps or --minutes")
                show_figures(corpus, end)
                return 0
        torch.manual_seed(options.seed)
        model = new_model(config, device, processes)
        number, readers = (0, 1) if processes.mesh is None else reader_of(processes.mesh)
        if processes.size > 1:  # from here on, each process draws numbers of its own
            torch.manual_seed(seed_of_reader(torch.get_rng_state(), number, readers))
        optimizer = OPTIMIZERS[options.optimizer](model, lr=options.lr, weight_decay=options.weight_decay)
        share = options.batch // processes.extent("data")
        first = share * processes.place("data")
        batches = Batches(
            encoded(corpus.train, tokenizer), range(first, first + share), options.length, batch=options.batch,
            start=tokenizer.start, context=options.context, seed=options.seed, context_length=options.context_length,
        )  # fmt: skip
        reader = Reader(
            model, carries=options.context == "streamed", rank=processes.place("chunk"), ranks=processes.extent("chunk")
        )
        if saved:
            saved.load_weights(model)
            saved.load_optimizer(optimizer, model)
            state = saved.state_of(processes.mesh)
            reader.seek(None if state is None else state.to(device))
            batches.seek(saved.record["data"]["position"])
            saved.restore_random(device, reader=number, readers=readers)

        if processes.first:
            print(what_begins(out, options, model, corpus, batches, processes), flush=True)
            if note := dropped(tokenizer, corpus.held_out):
                print(note, flush=True)

        # The loop.
        metrics = stack.enter_context(Metrics(out / METRICS, step)) if processes.first else None
        autocast = precision(device, options.dtype)
        saver, saved_step = Saver(out, processes.mesh), step if saved else None
        bytes_per_token = corpus.num_bytes / int(batches.lengths.sum(dtype="int64"))
        sample = HeldOutSample(corpus.held_out, tokenizer, max(1, round(config.chunk_size * bytes_per_token)))
        begin = paced_at = time.monotonic()
        begin, paced_step = begin - spent, step

        def save() -> None:
            nonlocal saved_step
            if saved_step != step:
                record = {
                    "options": options.record(),
                    "data": {"fingerprint": corpus.fingerprint, "position": batches.position()},
                    "schedule": schedule.position(),
                    "seconds": time.monotonic() - begin,
                }
                saver.save(step, model, optimizer=optimizer, state=reader.rows(), tokenizer=tokenizer, record=record)
                saved_step = step

        save()
        with (
            StopSignals(processes.size > 1) as signals,
            Progress({"step": step, "seconds": spent}, options.steps, schedule.budget) as progress,
        ):
            while not (stopped := processes.largest(signals.received)) and not schedule.finished(step):
                step_begin = time.monotonic()
                batch = batches.next()
                rate = schedule.apply(optimizer, step)
                with autocast:
                    loss = reader.loss(batch)
                loss.backward()
                norm = whole(nn.utils.clip_grad_norm_(model.parameters(), options.clip)).item()
                if not math.isfinite(loss.item()):  # that of all processes
                    raise CommandError(f"the loss is {loss.item()} at step {step + 1}; a lower --lr may help")
                with threads(optimizer_threads(model)):
                    optimizer.step()
                optimizer.zero_grad()
                step += 1
                now = time.monotonic()
                tokens, bits = options.batch * options.length, loss.item() / math.log(2) / bytes_per_token
                row = {
                    "step": step, "loss": loss.item(), "bits_per_byte": bits, "learning_rate": rate, "gradient_norm": norm,
                    "tokens": step * tokens, "seconds": round(now - begin, 3),
                    "tokens_per_second": round(tokens / (now - step_begin)),
                }  # fmt: skip
                if metrics is not None:
                    metrics.write(**row)
                progress.show(row)

                # Before a checkpoint, a run of given minutes draws the schedule's line anew, by the first process's clock.
                due = is_checkpoint_due(step, options.checkpoint_every, schedule)
                if due and schedule.budget is not None and step - paced_step >= FIRST_PACE:
                    pace = (now - paced_at) / (step - paced_step)
                    schedule.set_pace(step, *processes.tell((now - begin, pace)))
                    paced_at, paced_step = now, step
                if step % options.eval_every == 0 or schedule.finished(step):
                    with progress.doing("looking at held-out text"), autocast:
                        own = sample.nats_and_bytes(model.alone(), processes.rank, processes.size)
                    progress.held_out = bits_per_byte(processes.gather(own))
                    if metrics is not None:
                        metrics.write(step=step, held_out_bits_per_byte=progress.held_out)
                if due:
                    save()
            save()
            with progress.doing("writing the checkpoint"):
                saver.wait()

        # The end: how well all held-out text is predicted, beside compressors, and what the model writes.
        if stopped:
            if processes.first:
                draw_metrics(out / CURVE, read_metrics(out / METRICS))
            print(
                f"stopped after step {step}; continue with: "
                f"python -m megalodon_ops train --out {shlex.quote(str(out))} --resume"
            )
            return 128 + stopped
        alone = model.alone()
        own = shared_out(corpus.held_out, processes)
        with tqdm(
            total=sum(map(len, own)), unit="B", unit_scale=True, desc="evaluating held-out text", leave=False, delay=1
        ) as bar:
            measured = nats_and_bytes(alone, tokenizer, own, *EVALUATED, autocast, bar.update)
        bits = bits_per_byte(processes.gather(measured))
        if processes.first:
            compressors = compressed_bits(corpus.held_out)
            end = {"step": step, "final": True, "held_out_bits_per_byte": bits, "compressors": compressors}
            metrics.write(**end)
            draw_metrics(out / CURVE, read_metrics(out / METRICS), compressors)
            show_figures(corpus, end)
            unit = 1 << 20 if sys.platform == "darwin" else 1 << 10  # units of ru_maxrss in a MiB
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
            print(f"{time.monotonic() - begin:.0f} s, peak memory {peak:,.0f} MiB; curve and checkpoint in {out}")
            show_sample(alone, tokenizer, corpus.held_out, options.seed, autocast)
        return 0


def newest_checkpoint(options: Train, out: Path, processes: Processes) -> Checkpoint | None:
    """That of the run to go on with: one to resume, or one that processes have begun which torchrun starts again.

    The first process looks for damage, and tells the others which checkpoint is whole.
    """
    found = processes.tell(has_checkpoint(out))
    if not options.resume and processes.size == 1 and found:
        raise CommandError(f"--out {out}: holds a run already; continue it with --resume, or name another folder")
    if not options.resume and not found:
        return None
    try:
        saved = load_checkpoint(out) if processes.first else None
        folder = processes.tell(saved.folder if saved else None)
        return saved or load_checkpoint(folder, verify=False)
    except (FileError, FileNotFoundError) as error:
        raise CommandError(f"--resume {error}") from error


def check_shares(options: Train, config: MegalodonConfig, sizes: Mesh) -> None:
    """Raises where the mesh cannot share a batch."""
    data, chunk = sizes.get("data", 1), sizes.get("chunk", 1)
    if options.batch % data:
        raise CommandError(f"--batch {options.batch}: must be a multiple of the mesh's data={data}")
    rows = options.batch // data
    if rows % chunk and rows * options.length < chunk * config.chunk_size:
        held = f"{rows} row{'s' * (rows > 1)} of {options.length} tokens"
        raise CommandError(
            f"--length {options.length}: the mesh's chunk={chunk} shares {held}, which must be at least {chunk} chunks of "
            f"{config.chunk_size}, or a multiple of {chunk} rows"
        )
    if ":" in options.device:
        raise CommandError(f"--device {options.device}: each of several processes takes a GPU of its own; say cuda")


def check_memory(options: Train, config: MegalodonConfig, processes: int) -> None:
    """Refuses, before anything is allocated, a run whose parameters, activations and states alone do not fit in memory."""
    complex_numbers, weights_gradients_and_moments, token_target_and_activations = 2, 4, 4 + config.num_layers
    numbers = weights_gradients_and_moments * config.num_parameters()
    numbers += token_target_and_activations * options.batch * options.length * config.model_dim
    numbers += complex_numbers * options.batch * config.num_layers * config.model_dim * config.cema_ndim
    try:
        check_fits(numbers * torch.float32.itemsize // processes, f"training {config.num_parameters():,} parameters")
    except ValueError as error:
        raise CommandError(f"{error}; make --dim, --layers, --cema-ndim, --batch or --length smaller") from error


def recorded_end(out: Path, schedule: Schedule, step: int) -> dict[str, Any] | None:
    """The last line of the run's metrics, if the run ends at this step and the line has been written."""
    if not schedule.finished(step):
        return None
    return next((row for row in read_metrics(out / METRICS) if is_end(row) and row["step"] == step), None)


def show_figures(corpus: Corpus, end: dict[str, Any]) -> None:
    """Prints how well the held-out text is predicted, beside compressors, as the last line of the run's metrics has it."""
    print(f"\nheld-out text, {sum(map(len, corpus.held_out)):,} bytes     bits per byte")
    for name, bits in {f"this model, step {end['step']}": end["held_out_bits_per_byte"], **end["compressors"]}.items():
        print(f"  {name:<28} {bits:.3f}")


def new_model(config: MegalodonConfig, device: torch.device, processes: Processes) -> Megalodon:
    """A new model, the same whether one process has it or several share it."""
    if processes.size == 1:
        return Megalodon(config).to(device).train()
    from megalodon_ops.distributed import parallelize

    with torch.device("meta"):
        model = Megalodon(config)
    try:
        return parallelize(model, processes.mesh).train()
    except (ValueError, ImportError) as error:
        raise CommandError(str(error)) from error


def what_begins(
    out: Path, options: Train, model: Megalodon, corpus: Corpus, batches: Batches, processes: Processes
) -> str:
    lengths = batches.lengths
    cut = len(lengths) > len(corpus.train)
    parts = f" ({len(lengths):,} parts of at most {lengths.max():,} tokens)" if cut else ""
    mesh = options.mesh or f"data={processes.size}"
    number = f"{processes.size} processes, {mesh}; " if processes.size > 1 else ""
    return (
        f"{out}: {number}{model.num_parameters():,} parameters; "
        f"{corpus.num_bytes:,} bytes in {len(corpus.train)} documents to learn from{parts}, "
        f"{sum(map(len, corpus.held_out)):,} in {len(corpus.held_out)} held out"
    )


def is_checkpoint_due(step: int, every: int, schedule: Schedule) -> bool:
    early = schedule.budget is not None and FIRST_PACE <= step < every and step & (step - 1) == 0
    return step % every == 0 or early


def whole(norm: torch.Tensor) -> torch.Tensor:
    """The norm of all gradients, of what `clip_grad_norm_` returns in each process."""
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def shared_out(documents: Sequence[bytes], processes: Processes) -> list[bytes]:
    """The documents that this process evaluates: the longest go round first, each to the process with the least so far."""
    loads, own = [0] * processes.size, []
    for document in sorted(documents, key=len, reverse=True):
        rank = loads.index(min(loads))
        loads[rank] += len(document)
        if rank == processes.rank:
            own.append(document)
    return own


def bits_per_byte(of_processes: Sequence[tuple[float, float]]) -> float:
    """Of the nats and bytes of all processes."""
    nats, num_bytes = zip(*of_processes, strict=True)
    return math.fsum(nats) / math.log(2) / math.fsum(num_bytes)


def dropped(tokenizer: Tokenizer, documents: Sequence[bytes]) -> str:
    """What the user is told where a tokenizer does not give text back as it was; the beginnings of documents are tried."""
    texts = [_without_a_cut_letter(document[:TRIED]) for document in documents[:TRIED_DOCUMENTS]]
    changed = sum(tokenizer.decode(ids) != text for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True))
    if tokenizer.byte_level or not changed:
        return ""
    return (
        f"the tokenizer drops or changes a part of {changed} of {len(texts)} held-out documents: bits per byte are of "
        "what it keeps, over the bytes of the whole text"
    )


def _without_a_cut_letter(text: bytes) -> bytes:
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")  # keeps back what may be a part of a letter
    return decoder.decode(text).encode(errors="surrogateescape")


def encoded(documents: Sequence[bytes] | Parts, tokenizer: Tokenizer) -> Sequence[Document]:
    """The documents' ids, those of bytes as the bytes themselves; documents of which a tokenizer leaves nothing go."""
    if tokenizer.byte_level or isinstance(documents, Parts):
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
