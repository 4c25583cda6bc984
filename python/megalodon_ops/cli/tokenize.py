"""`tokenize`: encode text or JSON lines into shards of tokens; after a kill, the same command continues."""

import hashlib
import os
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from megalodon_ops.cli.console import bytes_bar
from megalodon_ops.cli.data import find_files
from megalodon_ops.cli.documents import Unit, documents_of, reasons, split_files, total_size
from megalodon_ops.cli.errors import CommandError
from megalodon_ops.cli.lock import folder_lock
from megalodon_ops.cli.models import read_tokenizer
from megalodon_ops.cli.options import Tokenize
from megalodon_ops.tokenizers import ByteTokenizer, Tokenizer
from megalodon_ops.training.shards import INDEX, Index, Shards, is_tokens, write_shard


def run(options: Tokenize) -> int:
    out = options.out
    tokenizer = ByteTokenizer() if options.tokenizer is None else read_tokenizer(options.tokenizer)
    with folder_lock(out):
        files = find_files(options.data, options)
        made_of = _sources_hash(files, options)
        units = split_files(files, options.shard_size << 20)
        shards = [None] * len(units)
        index = _open_index(out, Index(format=3, tokenizer=tokenizer.fingerprint, made_of=made_of, shards=shards))
        _make_shards(index, units, tokenizer, options)
        if _sources_hash(files, options) != made_of:
            raise CommandError("a file was changed while it was read; remove the folder, and give the command again")
        skipped = sum((Counter(shard.skipped) for shard in index.shards), Counter())
        if not any(shard.documents for shard in index.shards):
            for path in (*out.glob("shard-*.npy"), *out.glob("tokenizer*"), out / INDEX):
                path.unlink()
            raise CommandError(f"no document in these files: {reasons(skipped) or 'they are blank'}")
    shards = Shards(out)
    documents = f"{shards.num_documents:,} document{'s' * (shards.num_documents != 1)}"
    text = f"{documents}, {shards.num_bytes:,} bytes, {shards.num_tokens:,} tokens"
    per_token = f"{shards.num_bytes / shards.num_tokens:.3f} bytes a token"
    print(f"{out}: {text} in {shards.num_shards} shard{'s' * (shards.num_shards != 1)}: {per_token}")
    if skipped:
        print(f"skipped: {reasons(skipped)}")
    print(f"train with it: megalodon-ops train --data {shlex.quote(str(out))}")
    return 0


def _sources_hash(files: Sequence[Path], options: Tokenize) -> str:
    """Return a sha256 of the files' paths, sizes and modification times, and of the flags for reading them."""
    facts = [(os.path.abspath(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    text = repr((facts, options.field, options.encoding, options.shard_size))
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


def _open_index(folder: Path, wanted: Index) -> Index:
    """Return the folder's index; raise unless the folder is empty or was begun with the same input."""
    if is_tokens(folder):
        index = Index.read(folder)
        if (index.tokenizer, index.made_of) == (wanted.tokenizer, wanted.made_of):
            return index
        fault = "was begun with other files, flags or another tokenizer, or a file was changed since"
        raise CommandError(f"--out {folder}: {fault}; remove the folder, or name another")
    others = sorted(other.name for other in folder.iterdir() if other.name[0] != ".")
    if others:
        raise CommandError(f"--out {folder}: holds other files, such as {others[0]}; name another folder")
    wanted.write(folder)
    return wanted


def _make_shards(index: Index, units: Sequence[Unit], tokenizer: Tokenizer, options: Tokenize) -> None:
    """Write the shards that the index lacks."""
    missing = [number for number, shard in enumerate(index.shards) if shard is None]
    if not missing:
        return
    tokenizer.save(options.out)
    total = total_size(units)
    done = total - total_size(units[number] for number in missing)
    with bytes_bar(total, initial=done, desc="tokenizing") as bar:
        for number in missing:
            skipped: Counter[str] = Counter()
            documents = documents_of(units[number], options, skipped)
            index.shards[number] = write_shard(options.out, number, tokenizer, documents, skipped)
            index.write(options.out)
            bar.update(total_size([units[number]]))
