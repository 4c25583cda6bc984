"""`tokenize`: text or lines of JSON to tokens in shards; killed, and given again, it goes on."""

from __future__ import annotations

import hashlib
import os
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from megalodon_ops.cli.data import find_files
from megalodon_ops.cli.documents import Unit, divided, documents_of, size_of
from megalodon_ops.cli.errors import CommandError
from megalodon_ops.cli.lock import locked
from megalodon_ops.cli.models import read_tokenizer
from megalodon_ops.cli.options import Tokenize
from megalodon_ops.tokenizers import ByteTokenizer, Tokenizer
from megalodon_ops.training.shards import INDEX, Index, Shards, is_tokens, write_shard


def run(options: Tokenize) -> int:
    out = options.out
    tokenizer = ByteTokenizer() if options.tokenizer is None else read_tokenizer(options.tokenizer)
    with locked(out):
        files = find_files(options.files, options.glob)
        made_of = _made_of(files, options)
        units = divided(files, options.shard_size << 20)
        index = _begun(out, Index(3, tokenizer.fingerprint, made_of, [None] * len(units)))
        _make_shards(index, units, tokenizer, options)
        if _made_of(files, options) != made_of:
            raise CommandError("a file was changed while it was read; remove the folder, and give the command again")
        skipped = sum((Counter(shard.skipped) for shard in index.shards), Counter())
        said = ", ".join(f"{reason} ({count:,})" for reason, count in sorted(skipped.items()))
        if not any(shard.documents for shard in index.shards):
            for path in (*out.glob("shard-*.npy"), *out.glob("tokenizer*"), out / INDEX):
                path.unlink()
            raise CommandError(f"no document in these files; {f'skipped: {said}' if said else 'they are blank'}")
    shards = Shards(out)
    documents, count = shards.num_documents, shards.num_shards
    print(
        f"{out}: {documents:,} document{'s' * (documents != 1)}, {shards.num_bytes:,} bytes, {shards.num_tokens:,} tokens in "
        f"{count} shard{'s' * (count != 1)}: {shards.num_bytes / shards.num_tokens:.3f} bytes a token"
    )
    if said:
        print(f"skipped: {said}")
    print(f"train with it: python -m megalodon_ops train --data {shlex.quote(str(out))}")
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
    """Makes the shards that the index lacks."""
    left = [number for number, shard in enumerate(index.shards) if shard is None]
    if not left:
        return
    tokenizer.save(options.out)
    total = size_of(units)
    done = total - size_of(units[number] for number in left)
    with tqdm(total=total, initial=done, unit="B", unit_scale=True, leave=False, desc="tokenizing") as bar:
        for number in left:
            skipped: Counter[str] = Counter()
            documents = documents_of(units[number], options.field, skipped)
            index.shards[number] = write_shard(options.out, number, tokenizer, documents, skipped)
            index.write(options.out)
            bar.update(size_of([units[number]]))
