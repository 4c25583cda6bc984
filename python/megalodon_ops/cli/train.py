"""`train`: a model of bytes or tokens, from text to a checkpoint, a loss curve and samples; by one process or several.

The function `run` is the run, from top to bottom; what it calls stands below it, in the order of the calls.
"""

from __future__ import annotations

import hashlib
import json
import math
import shlex
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import matplotlib.figure  # noqa: F401 - the end of a run draws: a package that is missing is told at the beginning
import torch
from torch import nn
from tqdm import tqdm

from megalodon_ops import Megalodon, MegalodonConfig, MegalodonState
from megalodon_ops.cli.console import Progress, StopSignals
from megalodon_ops.cli.data import load_data
from megalodon_ops.cli.errors import CommandError
from megalodon_ops.cli.evaluate import as_documents, compressed_bits
from megalodon_ops.cli.flags import Mesh, flag_of
from megalodon_ops.cli.generate import show_sample
from megalodon_ops.cli.lock import locked
from megalodon_ops.cli.models import precision, usable_device
from megalodon_ops.cli.options import Train
from megalodon_ops.cli.processes import Processes, is_one_of_several, joined
from megalodon_ops.cli.settings import begun, resumed, run_folder, with_config
from megalodon_ops.files import FileError, write_whole
from megalodon_ops.evaluation import evaluate
from megalodon_ops.model.model_state import layout
from megalodon_ops.ops.common.memory import check_fits
from megalodon_ops.tokenizers import Tokenizer
from megalodon_ops.training import Batches, Checkpoint, Corpus, Metrics, Muon, Reader, Saver, Schedule, adamw
from megalodon_ops.training import load_checkpoint, optimizer_threads, read_metrics, threads
from megalodon_ops.training.batches import Document
from megalodon_ops.training.run_checkpoint import checkpoints_of
from megalodon_ops.training.corpus import Parts
from megalodon_ops.training.curve import draw_metrics
from megalodon_ops.training.reader import parts
from megalodon_ops.training.record import RECORD

METRICS, CURVE, OPTIONS = "metrics.jsonl", "loss_curve.png", "options.json"
LOOKED_AT = (64, 2048)
"""Stretches of held-out text that a run looks at while it goes, and bytes of each"""
OPTIMIZERS = {"muon": Muon, "adamw": adamw}
PEAK_TFLOPS = {
    "NVIDIA A100-SXM4-40GB": (312, 19.5), "NVIDIA A100-PCIE-40GB": (312, 19.5), "NVIDIA A100-SXM4-80GB": (312, 19.5),
    "NVIDIA A100 80GB PCIe": (312, 19.5), "NVIDIA H100 80GB HBM3": (989.5, 67), "NVIDIA H200": (989.5, 67),
    "NVIDIA B200": (2250, 80),
}  # fmt: skip
"""Dense peak in bfloat16, and in float32 without TF32, by CUDA's name of the device; docs/training.md names the sources"""
FIRST_PACE = 8
"""Fewest steps that tell how long a step takes"""


def run(options: Train) -> int:
    options = with_config(options)
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
        at_peak = tokens_at_peak(options, config, device, processes.size)
        log = Metrics
        if options.tensorboard:
            from megalodon_ops.cli.events import Events as log

        # The text, and what is held out of it.
        corpus = load_data(options.data, options.glob, quiet=saved is not None)
        processes.check_same({"the text": corpus.fingerprint})
        if saved and corpus.fingerprint != saved.record["data"]["fingerprint"]:
            raise CommandError("--resume: the text is not the one this run was started with; start another run")

        # The model, its optimizer, the batches and the learning rate's way.
        schedule = Schedule(options.lr, options.warmup, options.steps, options.minutes)
        step, spent = 0, 0.0
        if saved:
            step, spent = saved.step, saved.record["seconds"]
            schedule.seek(saved.record["schedule"], step, spent)
            if schedule.finished(step):
                print(f"{out}: finished after step {step}; it goes on with a larger --steps or --minutes")
        torch.manual_seed(options.seed)
        model = new_model(config, device, processes)
        optimizer = OPTIMIZERS[options.optimizer](model, lr=options.lr, weight_decay=options.weight_decay)
        rows = options.batch * options.accumulate  # of a step
        share = rows // processes.extent("data")
        first = share * processes.place("data")
        batches = Batches(
            encoded(corpus.train, tokenizer),
            range(first, first + share),
            options.length,
            batch=rows,
            start=tokenizer.start,
            end=config.eos_token_id,
            seed=options.seed,
            context_length=options.context_length,
        )
        of_chunk = dict(rank=processes.place("chunk"), ranks=processes.extent("chunk"))
        readers = [Reader(model, **of_chunk) for _ in range(options.accumulate)]  # each carries its rows on
        if saved:
            saved.load_weights(model)
            saved.load_optimizer(optimizer, model)
            if (state := saved.state_of(processes.mesh)) is not None:
                for number, reader in enumerate(readers):
                    reader.seek(state[number * share // len(readers) : (number + 1) * share // len(readers)].to(device))
                del state  # of which the readers have copies
            try:
                batches.seek(saved.record["data"]["position"])
            except ValueError as error:
                raise FileError(f"{saved.folder / RECORD}: {error}") from error

        if processes.first:
            given = {name: value for name, value in options.record().items() if value is not None}
            write_whole(out / OPTIONS, json.dumps(given, indent=1).encode() + b"\n")
            print(what_begins(out, options, model, corpus, batches, processes), flush=True)

        # The loop.
        metrics = stack.enter_context(log(out / METRICS, step)) if processes.first else None
        autocast = precision(device, options.dtype)
        saver, saved_step = Saver(out, processes.mesh), step if saved else None
        bytes_per_token = corpus.num_bytes / int(batches.lengths.sum(dtype="int64"))
        sample = sample_of(corpus.held_out)
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
                carried = [state for state in (reader.rows() for reader in readers) if state is not None]
                state = MegalodonState.cat(carried) if carried else None
                saver.save(step, model, optimizer=optimizer, state=state, tokenizer=tokenizer, record=record)
                saved_step = step

        save()
        with (
            StopSignals(processes.size > 1) as signals,
            Progress({"step": step, "seconds": spent}, options.steps, schedule.budget) as progress,
        ):
            while not (stopped := max(processes.gather(signals.received))) and not schedule.finished(step):
                step_begin = time.monotonic()
                rate = schedule.apply(optimizer, step)
                torch.manual_seed(seed_of_dropout(options.seed, step, processes))
                losses = []
                for reader, batch in zip(readers, parts(batches.next(), len(readers)), strict=True):
                    with autocast:
                        loss = reader.loss(batch) / len(readers)
                    loss.backward()
                    losses.append(loss.detach())
                norm = whole(nn.utils.clip_grad_norm_(model.parameters(), options.clip)).item()
                loss = sum(losses).item()  # that of all processes
                if not math.isfinite(loss):
                    raise CommandError(f"the loss is {loss} at step {step + 1}; a lower --lr may help")
                with threads(optimizer_threads(model)):
                    optimizer.step()
                optimizer.zero_grad()
                step += 1
                now = time.monotonic()
                tokens = rows * options.length
                row = {
                    "step": step,
                    "loss": loss,
                    "bits_per_byte": loss / math.log(2) / bytes_per_token,
                    "learning_rate": rate,
                    "gradient_norm": norm,
                    "tokens": step * tokens,
                    "seconds": round(now - begin, 3),
                    "tokens_per_second": round(tokens / (now - step_begin)),
                }
                if at_peak is not None:
                    row["mfu"] = round(tokens / (now - step_begin) / at_peak, 4)
                if metrics is not None:
                    metrics.write(**row)
                progress.show(row)

                # Before a checkpoint, a run of given minutes draws the schedule's line anew, by the first process's clock.
                due = is_checkpoint_due(step, options.checkpoint_every, schedule)
                if due and schedule.budget is not None and step - paced_step >= FIRST_PACE:
                    pace = (now - paced_at) / (step - paced_step)
                    schedule.set_pace(step, *processes.broadcast((now - begin, pace)))
                    paced_at, paced_step = now, step
                if step % options.eval_every == 0 or schedule.finished(step):
                    with progress.doing("looking at held-out text"):
                        progress.held_out = bits_per_byte(model.alone(), tokenizer, sample, autocast, processes)
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
        alone, size = model.alone(), sum(map(len, corpus.held_out))
        with tqdm(
            total=size // processes.size,
            unit="B",
            unit_scale=True,
            desc="evaluating held-out text",
            leave=False,
            delay=1,
        ) as bar:
            bits = bits_per_byte(alone, tokenizer, corpus.held_out, autocast, processes, bar.update)
        if processes.first:
            print(f"\nheld-out text, {size:,} bytes     bits per byte\n  {f'this model, step {step}':<28} {bits:.3f}")
            try:
                compressors = compressed_bits(corpus.held_out)
            except MemoryError:
                compressors = {}
                print("  compressors are left out: too little memory")
            for name, figure in compressors.items():
                print(f"  {name:<28} {figure:.3f}")
            metrics.write(step=step, final=True, held_out_bits_per_byte=bits, compressors=compressors)
            draw_metrics(out / CURVE, read_metrics(out / METRICS), compressors)
            print(f"{time.monotonic() - begin:.0f} s; curve and checkpoint in {out}")
            show_sample(alone, tokenizer, corpus.held_out, options.seed, autocast)
        return 0


def newest_checkpoint(options: Train, out: Path, processes: Processes) -> Checkpoint | None:
    """That of the run to go on with: one to resume, or one that processes have begun which torchrun starts again.

    The first process looks for damage, and tells the others which checkpoint is whole.
    """
    found = processes.broadcast(bool(checkpoints_of(out)))
    if not options.resume and processes.size == 1 and found:
        raise CommandError(f"--out {out}: holds a run already; continue it with --resume, or name another folder")
    if not options.resume and not found:
        return None
    try:
        saved = load_checkpoint(out) if processes.first else None
        folder = processes.broadcast(saved.folder if saved else None)
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
        raise CommandError(
            f"--length {options.length}: the mesh's chunk={chunk} shares {rows} x {options.length} tokens, which must be at "
            f"least {chunk} chunks of {config.chunk_size}, or a multiple of {chunk} rows"
        )
    if ":" in options.device:
        raise CommandError(f"--device {options.device}: each of several processes takes a GPU of its own; say cuda")


def check_memory(options: Train, config: MegalodonConfig, processes: int) -> None:
    """Refuses, before anything is allocated, a run whose parameters, activations and states alone do not fit in memory."""
    pair, weights_gradients_and_moments, token_target_and_activations = 2, 4, 4 + config.num_layers
    numbers = weights_gradients_and_moments * config.num_parameters()
    numbers += token_target_and_activations * options.batch * options.length * config.model_dim
    numbers += pair * options.accumulate * options.batch * config.num_layers * config.model_dim * config.cema_ndim
    try:
        check_fits(numbers * torch.float32.itemsize // processes, f"training {config.num_parameters():,} parameters")
    except ValueError as error:
        raise CommandError(f"{error}; make --dim, --layers, --cema-ndim, --batch or --length smaller") from error


def tokens_at_peak(options: Train, config: MegalodonConfig, device: torch.device, processes: int) -> float | None:
    """Tokens a second that would take all that the devices can do, in full chunks; None where their peak is not known."""
    peaks = PEAK_TFLOPS.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if options.peak_tflops is None and peaks is None:
        return None
    from megalodon_ops.distributed.measure import measure

    peak = 1e12 * (options.peak_tflops or peaks[options.dtype == "float32"])
    pieces = measure(config, 1, config.chunk_size, on_cpu=device.type == "cpu")
    block, end = (sum(piece.operations.values()) for piece in pieces)
    return peak * processes * config.chunk_size / (config.num_layers * block + end)


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
    rows, dtype = options.batch * options.accumulate, getattr(torch, options.dtype)
    states = sum(math.prod(shape) * kind.itemsize for _, kind, shape in layout(model.config, rows, dtype))
    return (
        f"{out}: {number}{model.num_parameters():,} parameters; "
        f"{corpus.num_bytes:,} bytes in {len(corpus.train)} documents to learn from{parts}, "
        f"{sum(map(len, corpus.held_out)):,} in {len(corpus.held_out)} held out\n"
        f"a checkpoint has, beside model and optimizer, {states / 1e6:,.1f} MB of the {rows:,} rows' states; the newest two stay"
    )


def seed_of_dropout(seed: int, step: int, processes: Processes) -> int:
    """A seed that depends on nothing but the run's, the step, and the part of the batch that this process reads."""
    text = f"{seed} {step} {processes.place('data')} {processes.place('chunk')}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


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


def sample_of(documents: Sequence[bytes]) -> list[bytes]:
    """Stretches at equal distances through all of the documents, laid end to end; of little text, all of it."""
    count, size = LOOKED_AT
    text = b"".join(documents)
    if len(text) <= count * size:
        return list(documents)
    begins = (number * len(text) // count for number in range(count))
    return [text[begin : begin + size] for begin in begins]


def bits_per_byte(
    model: Megalodon,
    tokenizer: Tokenizer,
    documents: Sequence[bytes],
    autocast: AbstractContextManager,
    processes: Processes,
    read: Callable[[int], object] = lambda _: None,
) -> float:
    """How well the model predicts documents, each token of one from all before it; the processes share the documents."""
    nats, own = 0.0, as_documents(shared_out(documents, processes), tokenizer, read)
    if own:
        with autocast:
            nats = evaluate(model, own)[0].nats
    return math.fsum(processes.gather(nats)) / math.log(2) / sum(map(len, documents))


def encoded(documents: Sequence[bytes] | Parts, tokenizer: Tokenizer) -> Sequence[Document]:
    """The documents' ids, those of bytes as the bytes themselves; documents of which a tokenizer leaves nothing go."""
    if tokenizer.byte_level or isinstance(documents, Parts):
        return documents
    read = tqdm(documents, unit=" documents", desc="encoding", leave=False, delay=1)
    found = [ids for ids in tokenizer.encode_batch(read) if len(ids)]
    if not found:
        raise CommandError("--tokenizer: makes no token of the text")
    return found
