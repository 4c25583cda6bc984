"""`tokenize`: text or lines of JSON to tokens in shards, by several processes; goes on where a killed one has stopped."""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import shlex
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megalodon_ops.cli.data import find_files, standard_library
from megalodon_ops.cli.documents import Unit, divided, documents_of, facts_of, total_size
from megalodon_ops.cli.errors import CommandError
from megalodon_ops.cli.lock import Lock
from megalodon_ops.cli.models import read_tokenizer
from megalodon_ops.errors import FileError
from megalodon_ops.model.files import read_json, remove_drafts, write_whole
from megalodon_ops.tokenizers import ByteTokenizer, Tokenizer
from megalodon_ops.training.shard_files import PLAN, finish, is_complete, read_shard_record, shard_name, write_shard
from megalodon_ops.training.shards import Shards


def run(options: argparse.Namespace) -> int:
    if options.check:
        return _check(options)
    tokenizer = ByteTokenizer() if options.tokenizer is None else read_tokenizer(options.tokenizer)
    files, globs = options.files or None, getattr(options, "glob", None)
    if globs and not files:
        raise CommandError("--glob: chooses among the files of folders, and none is named")
    with Lock(options.out) as lock:
        found = find_files(files, globs, flag="") if files else standard_library()
        units = divided(found, options.shard_size << 20)
        _begin(lock.folder, _plan(options, tokenizer, found))
        if not is_complete(lock.folder):
            _make_shards(lock.folder, units, tokenizer, options)
            _complete(lock.folder, units, tokenizer)
        (lock.folder / PLAN).unlink()
    print("\n".join(_report(options.out)))
    return 0


def _check(options: argparse.Namespace) -> int:
    """Compares a folder with its records, all tokens among it."""
    if options.files:
        raise CommandError("--check: reads the folder --out alone; leave the files out")
    shards = Shards(options.out)
    with tqdm(unit="B", unit_scale=True, desc="checking", leave=False, delay=1) as bar:
        shards.verify(bar.update)
    print(f"{options.out}: as it was written; {_counts(shards)}")
    return 0


def _plan(options: argparse.Namespace, tokenizer: Tokenizer, files: Sequence[Path]) -> dict[str, Any]:
    digest = hashlib.sha256()
    for fact in facts_of(files):
        digest.update(fact.encode(errors="surrogateescape"))
    return {
        "--tokenizer": tokenizer.fingerprint, "--shard-size": options.shard_size, "--field": options.field,
        "files": digest.hexdigest(),
    }  # fmt: skip


def _begin(folder: Path, plan: dict[str, Any]) -> None:
    """Raises unless the folder is empty, or is being made of the same."""
    path = folder / PLAN
    if not path.exists():
        if is_complete(folder):
            raise CommandError(f"--out {folder}: holds tokens already; name another folder")
        others = sorted(other.name for other in folder.iterdir() if other.name != "lock" and other.name[0] != ".")
        if others:
            raise CommandError(f"--out {folder}: holds other files, such as {others[0]}; name another folder")
        write_whole(path, json.dumps(plan, indent=1).encode() + b"\n")
        return
    try:
        before = read_json(path)
    except ValueError as error:
        raise CommandError(f"--out {error}; remove the folder, or name another") from error
    for name, value in plan.items():
        if before.get(name) != value:
            what = "of other files, or some were changed since" if name == "files" else f"with another {name}"
            raise CommandError(
                f"--out {folder}: was begun {what}; give what it was begun with, or remove the folder, or name another"
            )


def _make_shards(folder: Path, units: Sequence[Unit], tokenizer: Tokenizer, options: argparse.Namespace) -> None:
    """Makes the shards that are not there; several at once in processes of their own."""
    remove_drafts(folder, "shard-*")
    left = []
    for number in range(len(units)):
        try:
            read_shard_record(folder / shard_name(number))
        except FileNotFoundError:
            left.append(number)
        except FileError:  # not written by this program, or damaged since
            shutil.rmtree(folder / shard_name(number), ignore_errors=True)
            left.append(number)
    workers = min(options.workers or len(os.sched_getaffinity(0)), len(left))
    with tqdm(
        total=total_size(units), initial=total_size(units) - total_size(units[i] for i in left), unit="B",
        unit_scale=True, mininterval=0.5, leave=False, desc="tokenizing",
    ) as bar:  # fmt: skip
        if not bar.fp.isatty():
            bar.mininterval = 10
        if workers < 2:
            for number in left:
                _make_shard(folder, number, units[number], tokenizer, options.field, bar.update)
        elif left:
            _in_processes(workers, folder, {number: units[number] for number in left}, tokenizer, options.field, bar)


def _make_shard(
    folder: Path, number: int, unit: Unit, tokenizer: Tokenizer, field: str, read: Callable[[int], object]
) -> None:
    skipped: Counter[str] = Counter()
    write_shard(folder / shard_name(number), tokenizer, documents_of(unit, field, skipped, read), skipped)


def _in_processes(
    workers: int, folder: Path, units: dict[int, Unit], tokenizer: Tokenizer, field: str, bar: tqdm
) -> None:
    """Makes shards in new processes, which end when this process does, however it ends."""
    context = multiprocessing.get_context("spawn")
    read, stopped = context.Value("q", 0), context.Value("b", 0)
    tokenizer.save(folder)  # where the processes read it
    pool = ProcessPoolExecutor(workers, context, _start, (folder, field, read, stopped))
    try:
        waiting = iter(units.items())
        running = {pool.submit(_work, *item) for item, _ in zip(waiting, range(2 * workers), strict=False)}
        while running:
            done, running = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
            bar.update(read.value - (bar.n - bar.initial))
            for future in done:
                future.result()
            running |= {pool.submit(_work, *item) for item, _ in zip(waiting, done, strict=False)}
    except BrokenProcessPool as error:
        raise CommandError(
            "a process was killed, maybe for its memory; the same command with fewer --workers goes on"
        ) from error
    finally:
        stopped.value = 1
        pool.shutdown(cancel_futures=True)


class _Worker:
    """What a process of the pool is to know."""

    folder: Path
    field: str
    tokenizer: Tokenizer
    read: Any
    stopped: Any


def _start(folder: Path, field: str, read: Any, stopped: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the first ends the others
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there are as many processes as cores
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    _Worker.folder, _Worker.field, _Worker.read, _Worker.stopped = folder, field, read, stopped
    _Worker.tokenizer = read_tokenizer(folder)


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(number: int, unit: Unit) -> None:
    def advance(size: int) -> None:
        if _Worker.stopped.value:
            raise CommandError("stopped")
        with _Worker.read.get_lock():
            _Worker.read.value += size

    _make_shard(_Worker.folder, number, unit, _Worker.tokenizer, _Worker.field, advance)


def _complete(folder: Path, units: Sequence[Unit], tokenizer: Tokenizer) -> None:
    names = [shard_name(number) for number in range(len(units))]
    records = [read_shard_record(folder / name) for name in names]
    if not any(record["documents"] for record in records):
        skipped: Counter[str] = Counter()
        for record in records:
            skipped.update(record["skipped"])
        shutil.rmtree(folder)
        raise CommandError(f"no document in these files; {_skipped(skipped) or 'they are blank'}")
    finish(folder, tokenizer, names)


def _report(out: Path) -> list[str]:
    shards = Shards(out)
    lines = [f"{out}: {_counts(shards)}"]
    if shards.skipped:
        lines.append(_skipped(shards.skipped))
    return [*lines, f"train with it: python -m megalodon_ops train --data {shlex.quote(str(out))}"]


def _counts(shards: Shards) -> str:
    documents, count = shards.num_documents, shards.num_shards
    return (
        f"{documents:,} document{'s' * (documents != 1)}, {shards.num_bytes:,} bytes, {shards.num_tokens:,} tokens in "
        f"{count} shard{'s' * (count != 1)}: {shards.num_bytes / shards.num_tokens:.3f} bytes a token"
    )


def _skipped(skipped: dict[str, int]) -> str:
    listed = ", ".join(f"{reason} ({count:,})" for reason, count in sorted(skipped.items()))
    return f"skipped: {listed}" if listed else ""
