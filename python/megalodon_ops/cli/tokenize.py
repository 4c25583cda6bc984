"""`tokenize`: text or lines of JSON to tokens in shards, by several processes; killed, and given again, it goes on."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shlex
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megalodon_ops.cli.data import find_files, standard_library
from megalodon_ops.cli.documents import Unit, divided, documents_of, size_of
from megalodon_ops.cli.errors import CommandError
from megalodon_ops.cli.lock import locked
from megalodon_ops.cli.models import read_tokenizer
from megalodon_ops.cli.options import Tokenize
from megalodon_ops.model.files import flush
from megalodon_ops.tokenizers import ByteTokenizer, Tokenizer
from megalodon_ops.training.shards import INDEX, Index, Shard, Shards, is_tokens, write_shard


def run(options: Tokenize) -> int:
    out, globs = options.out, options.glob
    if options.check:
        return _check(options)
    if globs and not options.files:
        raise CommandError("--glob: chooses among the files of folders, and none is named")
    tokenizer = ByteTokenizer() if options.tokenizer is None else read_tokenizer(options.tokenizer)
    with locked(out):
        files = find_files(options.files, globs, flag="") if options.files else standard_library()
        made_of = _made_of(files, options)
        units = divided(files, options.shard_size << 20)
        index = _begun(out, Index(2, tokenizer.fingerprint, made_of, [None] * len(units)))
        _make_shards(index, units, tokenizer, options)
        if _made_of(files, options) != made_of:
            raise CommandError("a file was changed while it was read; remove the folder, and give the command again")
        skipped = sum((Counter(shard.skipped) for shard in index.shards), Counter())
        if not any(shard.documents for shard in index.shards):
            for path in (*out.glob("shard-*.npy"), *out.glob("tokenizer*"), out / INDEX):
                path.unlink()
            raise CommandError(f"no document in these files; {_listed(skipped) or 'they are blank'}")
    print(f"{out}: {_counts(Shards(out))}")
    if skipped:
        print(_listed(skipped))
    print(f"train with it: python -m megalodon_ops train --data {shlex.quote(str(out))}")
    return 0


def _check(options: Tokenize) -> int:
    """Compares a folder with its index, all tokens among it."""
    if options.files:
        raise CommandError("--check: reads the folder --out alone; leave the files out")
    shards = Shards(options.out)
    with tqdm(total=shards.num_tokens, unit=" tokens", unit_scale=True, desc="checking", leave=False, delay=1) as bar:
        shards.verify(bar.update)
    print(f"{options.out}: as it was written; {_counts(shards)}")
    return 0


def _made_of(files: Sequence[Path], options: Tokenize) -> str:
    """A sha256 of the files' paths, sizes and times of change, and of the flags that say how they are read."""
    facts = [(os.path.abspath(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    text = repr((facts, options.field, options.shard_size))
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


def _begun(folder: Path, wanted: Index) -> Index:
    """The index of the folder, which is empty, or was begun with the same."""
    if is_tokens(folder):
        index = Index.read(folder)
        if (index.tokenizer, index.made_of) == (wanted.tokenizer, wanted.made_of):
            return index
        begun = "was begun with other files, flags or another tokenizer, or a file was changed since"
        raise CommandError(f"--out {folder}: {begun}; remove the folder, or name another")
    others = sorted(other.name for other in folder.iterdir() if other.name[0] != ".")
    if others:
        raise CommandError(f"--out {folder}: holds other files, such as {others[0]}; name another folder")
    wanted.write(folder)
    return wanted


def _make_shards(index: Index, units: Sequence[Unit], tokenizer: Tokenizer, options: Tokenize) -> None:
    """Makes the shards that the index lacks; several at once in processes of their own."""
    left = {number: units[number] for number, shard in enumerate(index.shards) if shard is None}
    if not left:
        return
    tokenizer.save(options.out)
    for path in options.out.glob("tokenizer*"):
        flush(path)
    workers = min(options.workers or len(os.sched_getaffinity(0)), len(left))
    total = size_of(units)
    with tqdm(
        total=total, initial=total - size_of(left.values()), unit="B", unit_scale=True, leave=False, desc="tokenizing",
        mininterval=0.5 if sys.stderr.isatty() else 10,
    ) as bar:  # fmt: skip
        if workers > 1:
            made = _in_processes(workers, left, options, bar)
        else:
            made = ((i, _make_shard(options.out, i, left[i], tokenizer, options.field, bar.update)) for i in left)
        for number, shard in made:
            index.shards[number] = shard
            index.write(options.out)


def _make_shard(
    folder: Path, number: int, unit: Unit, tokenizer: Tokenizer, field: str, read: Callable[[int], object]
) -> Shard:
    skipped: Counter[str] = Counter()
    return write_shard(folder, number, tokenizer, documents_of(unit, field, skipped, read), skipped)


def _in_processes(workers: int, units: dict[int, Unit], options: Tokenize, bar: tqdm) -> Iterator[tuple[int, Shard]]:
    """Makes shards in new processes, which end when this process does, however it ends."""
    context = multiprocessing.get_context("spawn")
    read, begun = context.Value("q", 0), bar.n
    parent, alive = context.Pipe(duplex=False)
    with ProcessPoolExecutor(workers, context, _start, (options.out, options.field, read, parent)) as pool:
        try:
            running = {pool.submit(_work, number, unit): number for number, unit in units.items()}
            while running:
                done, _ = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
                bar.update(begun + read.value - bar.n)
                for future in done:
                    yield running.pop(future), future.result()
        except BaseException as error:
            alive.close()  # the processes end at once
            if isinstance(error, BrokenProcessPool):
                raise CommandError(
                    "a process was killed, maybe for its memory; the same command with fewer --workers goes on"
                ) from error
            raise


_worker: dict[str, Any] = {}
"""What a process of the pool is to know"""


def _start(folder: Path, field: str, read: Any, parent: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the first ends the others
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there are as many processes as cores
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    _worker.update(folder=folder, field=field, read=read, tokenizer=read_tokenizer(folder))


def _end_with(parent: Any) -> None:
    """Ends this process once the other end of the pipe is closed, which is so when its process is gone."""
    parent.poll(None)
    os._exit(1)


def _work(number: int, unit: Unit) -> Shard:
    def advance(size: int) -> None:
        with _worker["read"].get_lock():
            _worker["read"].value += size

    return _make_shard(_worker["folder"], number, unit, _worker["tokenizer"], _worker["field"], advance)


def _counts(shards: Shards) -> str:
    documents, count = shards.num_documents, shards.num_shards
    return (
        f"{documents:,} document{'s' * (documents != 1)}, {shards.num_bytes:,} bytes, {shards.num_tokens:,} tokens in "
        f"{count} shard{'s' * (count != 1)}: {shards.num_bytes / shards.num_tokens:.3f} bytes a token"
    )


def _listed(skipped: Counter[str]) -> str:
    listed = ", ".join(f"{reason} ({count:,})" for reason, count in sorted(skipped.items()))
    return f"skipped: {listed}" if listed else ""
