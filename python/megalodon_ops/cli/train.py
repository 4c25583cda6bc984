"""`train`: train a model of bytes or tokens on text; write checkpoints, a loss curve and samples."""

import dataclasses
import hashlib
import json
import math
import os
import shlex
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import matplotlib.figure  # noqa: F401 - needed at the end; fail early if it is missing
import torch
from torch import nn

from megalodon_ops import Megalodon, MegalodonConfig, MegalodonState
from megalodon_ops.cli.console import Progress, StopSignals, bytes_bar, work_bar
from megalodon_ops.cli.data import load_data
from megalodon_ops.cli.errors import CommandError
from megalodon_ops.cli.evaluate import compressed_bits
from megalodon_ops.cli.flags import Mesh, flag_of
from megalodon_ops.cli.generate import show_sample
from megalodon_ops.cli.held_out import Best, best_of_run, bits_per_byte, eval_sample
from megalodon_ops.cli.lock import folder_lock
from megalodon_ops.cli.models import precision, read, usable_device
from megalodon_ops.cli.options import CURVE, METRICS, Train
from megalodon_ops.cli.processes import Processes, process_group
from megalodon_ops.cli.settings import new_run, resumed_run, run_folder, with_config
from megalodon_ops.storage.files import FileError, write_whole
from megalodon_ops.model.model_state import layout
from megalodon_ops.storage.weights import set_whole
from megalodon_ops.ops.common.memory import available_memory
from megalodon_ops.tokenizers import Tokenizer
from megalodon_ops.torchrun import is_distributed
from megalodon_ops.training import Batches, Checkpoint, Corpus, Metrics, Muon, Reader, Saver, Schedule, adamw
from megalodon_ops.training import load_checkpoint, optimizer_threads, read_metrics, threads
from megalodon_ops.training.batches import Document
from megalodon_ops.training.run_checkpoint import BEST, checkpoints_of
from megalodon_ops.training.corpus import Parts
from megalodon_ops.training.curve import draw_metrics
from megalodon_ops.training.reader import split_batch
from megalodon_ops.training.record import RECORD

OPTIONS = "options.json"
OPTIMIZERS = {"muon": Muon, "adamw": adamw}
PEAK_TFLOPS = {
    **{f"NVIDIA A100{kind}": (312, 19.5) for kind in ("-SXM4-40GB", "-PCIE-40GB", "-SXM4-80GB", " 80GB PCIe")},
    **dict.fromkeys(("NVIDIA H100 80GB HBM3", "NVIDIA H200"), (989.5, 67)),
    "NVIDIA B200": (2250, 80),
}
"""Dense peaks in TFLOP/s, of bfloat16 and of float32 without TF32, by device name; docs/training.md has the sources"""
MIN_TIMED_STEPS = 8
"""Minimum number of steps for an estimate of a step's time"""


def run(options: Train) -> int:
    options = with_config(options)
    with process_group(options.mesh, options.timeout) as processes, ExitStack() as stack:
        # The folder and the settings, of a new or a resumed run.
        out = run_folder(options, is_distributed())
        if processes.is_rank0:
            stack.enter_context(folder_lock(out))
        saved = newest_checkpoint(options, out, processes)
        best = processes.broadcast(best_of_run(out) if processes.is_rank0 else None)
        settings = new_run(options, out) if saved is None else resumed_run(options, out, saved)
        options, config, tokenizer, initial = settings
        processes.check_same({flag_of(name): value for name, value in {**config.to_dict(), **options.record()}.items()})
        device = usable_device(options.device)
        if processes.size > 1:
            from megalodon_ops.distributed import make_mesh

            sizes = options.mesh or Mesh(f"data={processes.size}")
            check_shares(options, config, sizes)
            processes.mesh = make_mesh(sizes, device_type=device.type, timeout=options.timeout)
        check_memory(options, config, device, processes.size)
        peak_tokens_per_second = tokens_at_peak(options, config, device, processes.size)
        log = Metrics
        if options.tensorboard:
            from megalodon_ops.cli.events import Events as log

        # The training text and the held-out text.
        corpus = load_data(options, quiet=saved is not None)
        processes.check_same({"the text": corpus.fingerprint})
        if saved and corpus.fingerprint != saved.record["data"]["fingerprint"]:
            raise CommandError("--resume: the text is not the one this run was started with; start another run")

        # The model, its optimizer, the batches and the schedule.
        schedule = Schedule(options.lr, options.warmup, options.steps, options.minutes)
        step, elapsed = 0, 0.0
        if saved:
            step, elapsed = saved.step, saved.record["seconds"]
            schedule.seek(saved.record["schedule"], step, elapsed)
            if schedule.finished(step):  # only the end follows: the loop takes no step
                print(f"{out}: finished after step {step}; continue it with a larger --steps or --minutes")
        torch.manual_seed(options.seed)
        model = new_model(config, device, processes)
        if initial is not None:
            weights = dict(initial.named_parameters())
            for name, parameter in model.named_parameters():
                set_whole(parameter, weights[name])
            del weights, initial
        optimizer = OPTIMIZERS[options.optimizer](model, lr=options.lr, weight_decay=options.weight_decay)
        rows = options.batch * options.accumulate  # per step
        data_rank, num_data_ranks = processes.place("data")
        share = rows // num_data_ranks
        own_rows = range(data_rank * share, (data_rank + 1) * share)
        order = dict(batch=rows, seed=options.seed, context_length=options.context_length)
        added_tokens = dict(start=tokenizer.start, end=config.eos_token_id)
        batches = Batches(encode(corpus.train, tokenizer), own_rows, options.length, **order, **added_tokens)
        chunk_rank, num_chunk_ranks = processes.place("chunk")
        # Each reader carries the states of its rows.
        readers = [Reader(model, rank=chunk_rank, ranks=num_chunk_ranks) for _ in range(options.accumulate)]
        if saved:
            saved.load_weights(model)
            saved.load_optimizer(optimizer, model)
            if (state := saved.state_of(processes.mesh)) is not None:
                size = share // len(readers)
                for number, reader in enumerate(readers):
                    reader.seek(state[number * size : (number + 1) * size].to(device))
                del state  # the readers have copies
            try:
                batches.seek(saved.record["data"]["position"])
            except ValueError as error:
                raise FileError(f"{saved.folder / RECORD}: {error}") from error

        if processes.is_rank0:
            set_options = {name: value for name, value in options.record().items() if value is not None}
            write_whole(out / OPTIONS, json.dumps(set_options, indent=1).encode() + b"\n")
            print(summary(out, options, model, corpus, batches, processes), flush=True)

        # The loop.
        metrics = stack.enter_context(log(out / METRICS, step)) if processes.is_rank0 else None
        autocast = precision(device, options.dtype)
        saver = Saver(out, processes.mesh)
        saved_step = step if saved else None
        bytes_per_token = corpus.num_bytes / int(batches.lengths.sum(dtype="int64"))
        sample = eval_sample(corpus.held_out)
        timing_start, timing_start_step = time.monotonic(), step  # for the next estimate of a step's time
        begin, next_drawing = timing_start - elapsed, 0.0

        def record() -> dict[str, Any]:
            return {
                "options": options.record(),
                "data": {"fingerprint": corpus.fingerprint, "position": batches.position()},
                "schedule": schedule.position(),
                "seconds": time.monotonic() - begin,
            }

        def save() -> None:
            nonlocal saved_step, next_drawing
            if saved_step != step:
                row_states = [state for state in (reader.rows() for reader in readers) if state is not None]
                state = MegalodonState.cat(row_states) if row_states else None
                saver.save(step, model, optimizer=optimizer, state=state, tokenizer=tokenizer, record=record())
                saved_step = step
                if step and metrics is not None and (begin_drawing := time.monotonic()) >= next_drawing:
                    draw_metrics(out / CURVE, read_metrics(out / METRICS))
                    next_drawing = begin_drawing + 20 * (time.monotonic() - begin_drawing)  # at most 5 % of the time

        save()
        with (
            StopSignals(processes.size > 1) as signals,
            Progress({"step": step, "seconds": elapsed}, options.steps, schedule.budget) as progress,
        ):
            while not (stopped := max(processes.gather(signals.received))) and not schedule.finished(step):
                step_begin = time.monotonic()
                rate = schedule.apply(optimizer, step)
                torch.manual_seed(seed_of_dropout(options.seed, step, processes))
                losses = []
                for reader, batch in zip(readers, split_batch(batches.next(), len(readers)), strict=True):
                    with autocast:
                        loss = reader.loss(batch) / len(readers)
                    loss.backward()
                    losses.append(loss.detach())
                norm = nn.utils.clip_grad_norm_(model.parameters(), options.clip)
                norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()
                loss = sum(losses).item()  # of the whole batch on all processes, like the norm
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
                if peak_tokens_per_second is not None:
                    row["mfu"] = round(tokens / (now - step_begin) / peak_tokens_per_second, 4)
                if metrics is not None:
                    metrics.write(**row)
                progress.show(row)

                # Before a checkpoint, fit the schedule of a timed run to rank 0's clock. The first fit sets the run's
                # end, so checkpoints come early, too: at powers of two until the first regular one.
                is_early = schedule.budget is not None and MIN_TIMED_STEPS <= step < options.checkpoint_every
                is_due = step % options.checkpoint_every == 0 or (is_early and step & (step - 1) == 0)
                if is_due and schedule.budget is not None and step - timing_start_step >= MIN_TIMED_STEPS:
                    pace = (now - timing_start) / (step - timing_start_step)  # seconds per step
                    schedule.set_pace(step, *processes.broadcast((now - begin, pace)))
                    timing_start, timing_start_step = now, step
                if step % options.eval_every == 0 or schedule.finished(step):
                    with progress.describe("evaluating held-out text"):
                        unsharded = model.alone()  # every rank has all parameters; kept only for the evaluation
                        progress.held_out = bits_per_byte(unsharded, tokenizer, sample, autocast, processes)
                        del unsharded
                    if metrics is not None:
                        metrics.write(step=step, held_out_bits_per_byte=progress.held_out)
                    if progress.held_out < best.bits_per_byte:
                        best = Best(progress.held_out, step)
                        evaluated = {**record(), "held_out_bits_per_byte": best.bits_per_byte}
                        saver.save(step, model, tokenizer=tokenizer, record=evaluated, best=True)
                if is_due:
                    save()
            save()
            with progress.describe("writing the checkpoint"):
                saver.wait()

        # The end: bits per byte of the model and of compressors on all held-out text, and samples.
        if stopped:
            if processes.is_rank0:
                draw_metrics(out / CURVE, read_metrics(out / METRICS))
            resume = f"megalodon-ops train --out {shlex.quote(str(out))} --resume"
            print(f"stopped after step {step}; continue with: {resume}")
            return 128 + stopped
        unsharded = model.alone()
        size = sum(map(len, corpus.held_out))
        with bytes_bar(size // processes.size, desc="evaluating held-out text", delay=1) as bar:
            bits = bits_per_byte(unsharded, tokenizer, corpus.held_out, autocast, processes, bar.update)
        if processes.is_rank0:
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
            if best.step:
                figure = f"step {best.step}, {best.bits_per_byte:.3f} bits per byte"
                fix = f"load it with --checkpoint {shlex.quote(str(out / BEST))}"
                print(f"best on the sample of held-out text: {figure}; {fix}")
            show_sample(unsharded, tokenizer, corpus.held_out, options.seed, autocast)
        return 0


def newest_checkpoint(options: Train, out: Path, processes: Processes) -> Checkpoint | None:
    """Return the newest checkpoint of a run that is resumed, or restarted by torchrun; else None.

    Rank 0 verifies the checkpoints, and broadcasts the folder of the newest complete one.
    """
    has_checkpoints = processes.broadcast(bool(checkpoints_of(out)))
    may_be_restarted = processes.size > 1  # by torchrun, which repeats the command without --resume
    if not options.resume and not may_be_restarted and has_checkpoints:
        raise CommandError(f"--out {out}: holds a run already; continue it with --resume, or name another folder")
    if not options.resume and not has_checkpoints:
        return None
    saved = read("--resume", load_checkpoint, out) if processes.is_rank0 else None
    folder = processes.broadcast(saved.folder if saved else None)
    return saved or read("--resume", load_checkpoint, folder, verify=False)


def check_shares(options: Train, config: MegalodonConfig, sizes: Mesh) -> None:
    """Raise if the mesh cannot split a batch."""
    data, chunk = sizes.get("data", 1), sizes.get("chunk", 1)
    if options.batch % data:
        raise CommandError(f"--batch {options.batch}: must be a multiple of the mesh's data={data}")
    rows = options.batch // data
    if rows % chunk and rows * options.length < chunk * config.chunk_size:
        fix = f"give at least {chunk} chunks of {config.chunk_size} tokens, or a multiple of {chunk} rows"
        fault = f"the mesh's chunk={chunk} cannot split {rows} x {options.length} tokens"
        raise CommandError(f"--length {options.length}: {fault}; {fix}")
    if ":" in options.device:
        raise CommandError(f"--device {options.device}: each process takes its own GPU; use cuda")


def check_memory(options: Train, config: MegalodonConfig, device: torch.device, processes: int) -> None:
    """Refuse, before any allocation, a run whose step exceeds the memory; name the flags that make it fit."""
    is_cpu = device.type == "cpu"
    rows = math.ceil(options.batch / processes)  # of this process
    memory = available_memory() if is_cpu else torch.cuda.mem_get_info(device)[0]
    if is_cpu:  # which all processes of this machine share
        memory //= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    one_layer = layout(dataclasses.replace(config, num_layers=1), 1, torch.float32)
    row_states = config.num_layers * sum(math.prod(shape) * kind.itemsize for _, kind, shape in one_layer)
    states = row_states * rows * (options.accumulate + 1)  # of each accumulated batch, and the new ones of a batch
    parameter_bytes = torch.float32.itemsize * config.num_parameters() // processes
    room = memory - states
    if options.optimizer == "muon":
        room += parameter_bytes  # a plan counts two moments, Muon has one
    size = 4 * parameter_bytes  # parameters, gradients and two moments
    fix = "make --dim, --layers, --batch or --length smaller"
    # A generous estimate of the activations. If it does not fit, a plan decides, which takes a second.
    widths = 8 * config.model_dim + 4 * (config.z_dim + config.value_dim + config.ffn_hidden_dim)
    if size + 8 * rows * options.length * config.num_layers * widths < room:
        return
    if size < room:
        from megalodon_ops.cli.sizes import fitting_flags
        from megalodon_ops.distributed.plan import Plan, plan

        def costs(config: MegalodonConfig, batch: int) -> Plan:
            kind = dict(device=device.type, dtype=getattr(torch, options.dtype), autocast=options.dtype != "float32")
            return plan(config, {"data": processes}, context=options.length, batch=batch * processes, **kind)

        if (size := costs(config, rows).bytes) <= room:
            return
        flags = fitting_flags(config, costs, rows, room, options.accumulate, processes)
        if flags != "no":
            fix = f"it fits with {flags}"
    fault = f"takes {(size + states) / 2**30:,.1f} GiB of memory, and there are {memory / 2**30:,.1f} here"
    raise CommandError(f"training {config.num_parameters():,} parameters {fault}; {fix}")


def tokens_at_peak(options: Train, config: MegalodonConfig, device: torch.device, processes: int) -> float | None:
    """Return the tokens per second of training on full chunks at the devices' peak; None if the peak is unknown."""
    peaks = PEAK_TFLOPS.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if options.peak_tflops is None and peaks is None:
        return None
    from megalodon_ops.distributed.measure import measure

    peak = 1e12 * (options.peak_tflops or peaks[options.dtype == "float32"])
    block, norm_and_loss = measure(config, rows=1, length=config.chunk_size, on_cpu=device.type == "cpu")
    operations = config.num_layers * sum(block.operations.values()) + sum(norm_and_loss.operations.values())
    return peak * processes * config.chunk_size / operations


def new_model(config: MegalodonConfig, device: torch.device, processes: Processes) -> Megalodon:
    """Create a model, with the same weights in any number of processes."""
    if processes.size == 1:
        return Megalodon(config).to(device).train()
    from megalodon_ops.distributed import parallelize

    with torch.device("meta"):
        model = Megalodon(config)
    try:
        return parallelize(model, processes.mesh).train()
    except (ValueError, ImportError) as error:
        raise CommandError(str(error)) from error


def summary(out: Path, options: Train, model: Megalodon, corpus: Corpus, batches: Batches, processes: Processes) -> str:
    lengths = batches.lengths
    is_cut = len(lengths) > len(corpus.train)
    cuts = f" ({len(lengths):,} parts of at most {lengths.max():,} tokens)" if is_cut else ""
    mesh = options.mesh or f"data={processes.size}"
    number = f"{processes.size} processes, {mesh}; " if processes.size > 1 else ""
    rows, dtype = options.batch * options.accumulate, getattr(torch, options.dtype)
    states = sum(math.prod(shape) * kind.itemsize for _, kind, shape in layout(model.config, rows, dtype))
    return (
        f"{out}: {number}{model.num_parameters():,} parameters; "
        f"{corpus.num_bytes:,} bytes in {len(corpus.train)} documents to learn from{cuts}, "
        f"{sum(map(len, corpus.held_out)):,} in {len(corpus.held_out)} held out\n"
        f"a checkpoint holds the model, the optimizer and {states / 1e6:,.1f} MB of the {rows:,} rows' states; "
        "the newest two are kept, and so is the best model"
    )


def seed_of_dropout(seed: int, step: int, processes: Processes) -> int:
    """Return a seed that depends only on the run's seed, the step and this process's part of the batch."""
    text = f"{seed} {step} {processes.place('data')[0]} {processes.place('chunk')[0]}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def encode(documents: Sequence[bytes] | Parts, tokenizer: Tokenizer) -> Sequence[Document]:
    """Return the ids of documents that have any; for a byte tokenizer or shards, return the documents themselves."""
    if tokenizer.byte_level or isinstance(documents, Parts):
        return documents
    read = work_bar(iterable=documents, unit=" documents", desc="encoding", delay=1)
    encoded = [ids for ids in tokenizer.encode_batch(read) if len(ids)]
    if not encoded:
        raise CommandError("--tokenizer: encodes the text to no tokens")
    return encoded
