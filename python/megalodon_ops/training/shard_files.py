"""Folders of tokens as files: what is in them, and how they are written.

    tokens/  dataset.json                   counts, the tokenizer's fingerprint, the sha256 of each shard.json
             tokenizer.json ...             the tokenizer's files
             shard-000000/  tokens.npy      (T,) uint8, uint16 or uint32: the ids of the documents, end to end
                            documents.npy   (N, 3) uint64, a row for each document: where it ends in the shard's tokens,
                                            where in the shard's text, and its key
                            cuts.npy        (M, 2) uint64: tokens and bytes of the shard before each place inside a long
                                            document where a window of text begins
                            shard.json      counts, sha256 of these files, how many documents were skipped and why

The id that opens a document is not stored. A document's key is the first 8 bytes of the sha256 of its text, as a
big-endian number. `dataset.json` is written last: a folder that has one is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy

from .record import checksum_of
from .schema import SHA256, Rule, check_fields, list_of, matching, one_of, whole
from .. import _C
from ..errors import FileError
from ..model.files import file_sha256, flush, read_json, write_folder_atomically, write_whole
from ..tokenizers import Tokenizer

FORMAT = 1
"""Counts the changes of the folder's content; folders of another format are not read"""
RECORD, SHARD_RECORD = "dataset.json", "shard.json"
PLAN = "tokenize.json"
"""What an unfinished folder is being made of"""
TOKENS, DOCUMENTS, CUTS = "tokens.npy", "documents.npy", "cuts.npy"
DTYPES = ("uint8", "uint16", "uint32")
HEADER = 128  # bytes of an .npy file before its numbers

COUNTS = {"documents": whole(0), "tokens": whole(0), "bytes": whole(0)}
_SKIPPED = Rule(
    lambda value: isinstance(value, dict) and all(whole(1).holds(count) for count in value.values()), "counts by reason"
)


NAME = matching(r"shard-\d{6,12}", "a shard's name")


def _is_listed_shard(value: Any) -> bool:
    listed = isinstance(value, dict) and value.keys() == {"name", "sha256"}
    return listed and SHA256.holds(value["sha256"]) and NAME.holds(value["name"])


SHARD = {
    **COUNTS, "skipped": _SKIPPED, "dtype": one_of(*DTYPES), "cuts": whole(0),
    "sha256": {TOKENS: SHA256, DOCUMENTS: SHA256, CUTS: SHA256},
}  # fmt: skip
DATASET = {
    "format": whole(1), "megalodon_ops": matching(".*", "a version"),
    "tokenizer": {"fingerprint": SHA256, "vocab_size": whole(1), "start": whole(0)},
    **COUNTS, "skipped": _SKIPPED, "shards": Rule(list_of(_is_listed_shard), "a list of names and sha256 sums"),
    "checksum": SHA256,
}  # fmt: skip


def is_complete(folder: Path) -> bool:
    """Whether a folder holds tokens, all of them."""
    return os.path.lexists(folder / RECORD)


def is_tokens(folder: Path) -> bool:
    """Whether a folder holds tokens, or is to hold them once it is finished."""
    return is_complete(folder) or os.path.lexists(folder / PLAN)


def shard_name(number: int) -> str:
    return f"shard-{number:06d}"


def write_shard(
    folder: Path,
    tokenizer: Tokenizer,
    documents: Iterable[Iterable[bytes]],
    skipped: Counter[str],
) -> None:
    """Encodes documents, each of which comes in pieces of text, into a shard's folder, which is whole or not there.

    Documents of which the tokenizer leaves nothing are counted in `skipped`, as is what the reader of the documents has
    counted there when they end. Memory is that of a few windows of text, and 24 bytes a document.
    """
    dtype = numpy.dtype(dtype_of(tokenizer)).newbyteorder("<")
    keys: deque[Any] = deque()
    index, cuts = array("Q"), array("Q")
    ends = [0, 0]  # tokens and bytes of the documents so far
    tokens = size = 0  # of the open document
    before = 0  # length of `cuts` when that document began
    with write_folder_atomically(folder) as draft, open(draft / TOKENS, "wb") as file:
        file.write(bytes(HEADER))
        for ids, length, is_last in tokenizer.encode_stream(_hashed(documents, keys)):
            if len(ids) and int(ids.max()) > numpy.iinfo(dtype).max:
                raise FileError(f"{folder}: the tokenizer gave the id {ids.max()}, of {tokenizer.vocab_size}")
            file.write(ids.astype(dtype).data)
            tokens, size = tokens + len(ids), size + length
            if not is_last:
                cuts.extend((ends[0] + tokens, ends[1] + size))
                continue
            key = int.from_bytes(keys.popleft().digest()[:8], "big")
            if tokens:
                ends = [ends[0] + tokens, ends[1] + size]
                index.extend((*ends, key))
            else:
                skipped["documents without tokens"] += 1
                del cuts[before:]
            tokens, size, before = 0, 0, len(cuts)
        file.seek(0)
        file.write(npy_header(dtype, (ends[0],)))
        file.close()
        for name, values, columns in ((DOCUMENTS, index, 3), (CUTS, cuts, 2)):
            with open(draft / name, "wb") as table:
                table.write(npy_header(numpy.dtype("<u8"), (len(values) // columns, columns)))
                table.write(numpy.frombuffer(values, numpy.uint64).astype("<u8").data)
        record = {
            "documents": len(index) // 3, "tokens": ends[0], "bytes": ends[1], "skipped": dict(sorted(skipped.items())),
            "dtype": dtype.name, "cuts": len(cuts) // 2,
            "sha256": {name: file_sha256(draft / name) for name in (TOKENS, DOCUMENTS, CUTS)},
        }  # fmt: skip
        (draft / SHARD_RECORD).write_text(json.dumps(record, indent=1) + "\n")


def finish(folder: Path, tokenizer: Tokenizer, names: Sequence[str]) -> None:
    """Completes a folder whose shards are all there, in the order of `names`."""
    tokenizer.save(folder)
    for path in folder.glob("tokenizer*"):
        flush(path)
    totals, skipped, shards = Counter[str](), Counter[str](), []
    for name in names:
        record = read_shard_record(folder / name)
        totals.update({count: record[count] for count in COUNTS})
        skipped.update(record["skipped"])
        shards.append({"name": name, "sha256": file_sha256(folder / name / SHARD_RECORD)})
    content = {
        "format": FORMAT, "megalodon_ops": _C.build_info()["version"],
        "tokenizer": {
            "fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size, "start": tokenizer.start,
        },
        **{count: totals[count] for count in COUNTS}, "skipped": dict(sorted(skipped.items())), "shards": shards,
    }  # fmt: skip
    write_whole(folder / RECORD, json.dumps({**content, "checksum": checksum_of(content)}, indent=1).encode() + b"\n")


def read_shard_record(folder: Path) -> dict[str, Any]:
    """The content of a shard's `shard.json`; a FileError where it is damaged."""
    path = folder / SHARD_RECORD
    try:
        record = read_json(path)
    except ValueError as error:
        raise FileError(str(error)) from error
    check(path, record, SHARD)
    return record


def dtype_of(tokenizer: Tokenizer) -> str:
    """The narrowest type of every id that follows another."""
    return next(name for name in DTYPES if tokenizer.output_size - 1 <= numpy.iinfo(name).max)


def _hashed(documents: Iterable[Iterable[bytes]], keys: deque[Any]) -> Iterator[Iterator[bytes]]:
    """The documents; a sha256 for each joins `keys`, of what has been read of its pieces."""

    def read(pieces: Iterable[bytes], digest: Any) -> Iterator[bytes]:
        for piece in pieces:
            digest.update(piece)
            yield piece

    for pieces in documents:
        keys.append(hashlib.sha256())
        yield read(pieces, keys[-1])


def npy_header(dtype: numpy.dtype, shape: tuple[int, ...]) -> bytes:
    """The head of an .npy file of version 1.0, of 128 bytes whatever the shape."""
    fields = repr({"descr": dtype.str, "fortran_order": False, "shape": shape}).encode()
    return b"\x93NUMPY\x01\x00" + (HEADER - 10).to_bytes(2, "little") + fields.ljust(HEADER - 11) + b"\n"


def mapped(path: Path, dtype: numpy.dtype, shape: tuple[int, ...]) -> numpy.ndarray:
    """The numbers of an .npy file, which must have this type and shape."""
    if not shape[0]:  # an empty file cannot be mapped
        return numpy.empty(shape, dtype)
    with open(path, "rb") as file:
        header: BinaryIO = file
        if header.read(HEADER) != npy_header(dtype, shape):
            raise FileError(f"{path}: must be an array {shape} of {dtype}, got another, or none")
    return numpy.memmap(path, dtype, "r", HEADER, shape)


def check(path: Path, record: dict[str, Any], wanted: dict[str, Any]) -> None:
    try:
        check_fields(record, wanted)
    except ValueError as error:
        raise FileError(f"{path}: {error}") from error
