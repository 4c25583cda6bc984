"""Tokenized documents in memory-mapped files: the folder that `megalodon-ops tokenize` writes.

`dataset.json` lists a shard once its files are on the disk; a folder that lists all is complete; see docs/data.md.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

import msgspec
import numpy

from .corpus import Corpus, key_of, split
from ..storage.files import FileError, as_path, opened, reading, write_atomically, write_whole
from ..tokenizers import Tokenizer, load_tokenizer

INDEX = "dataset.json"
MAX_HELD_OUT_BYTES = 8 << 20
"""Maximum number of bytes of text to hold out"""
MAX_OPEN_SHARDS = 128
"""Maximum number of shards that are mapped at a time, with two open files each"""
TOKENS, BYTES, KEYS = 0, 1, 2
"""Columns of a table of documents: the shard's tokens and bytes up to each document's end, and the document's key"""
Count = Annotated[int, msgspec.Meta(ge=0)]
Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class Shard(msgspec.Struct, forbid_unknown_fields=True):
    documents: Count
    tokens: Count
    bytes: Count
    """Bytes of the documents' text"""
    skipped: dict[str, Count]
    """Number of lines or documents that were left out, by reason"""


class Index(msgspec.Struct, forbid_unknown_fields=True):
    """The content of `dataset.json`."""

    format: Literal[3]
    """Version of the folder's content; folders of other versions are not read"""
    tokenizer: Sha256
    """The tokenizer's fingerprint"""
    made_of: Sha256
    """Hash of the files of text, and of the flags that say how they are read"""
    shards: list[Shard | None]
    """None: not written yet"""

    @staticmethod
    def read(folder: Path) -> Index:
        with opened(folder / INDEX) as file:
            return msgspec.json.decode(file.read(), type=Index)

    def write(self, folder: Path) -> None:
        write_whole(folder / INDEX, msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n")


class Shards:
    """A folder of tokens, written by `megalodon-ops tokenize`.

    The constructor compares dtypes and sizes of all files with the index; it raises a FileError or FileNotFoundError.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from megalodon_ops.cli import main
        >>> from megalodon_ops.training import Batches, Shards
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     text = Path(folder, "text.txt")
        ...     size = text.write_text("to be or not to be, that is the question\\n" * 50)
        ...     code = main(["tokenize", str(text), "--out", folder + "/tokens"])  # doctest: +ELLIPSIS
        ...     shards = Shards(folder + "/tokens")
        ...     corpus = shards.hold_out()
        ...     batches = Batches(corpus.train, rows=2, length=16, start=shards.tokenizer.start)
        ...     batch = batches.next()
        /...: 1 document, 2,050 bytes, 2,050 tokens in 1 shard: 1.000 bytes a token
        train with it: megalodon-ops train --data /...
        >>> shards.num_tokens, corpus.num_bytes, len(corpus.held_out[0]), batch.tokens.shape
        (2050, 1948, 102, torch.Size([1, 32]))
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = as_path("Shards", "folder", folder)
        index = Index.read(self.folder)
        self._shards = [shard for shard in index.shards if shard is not None]
        if len(self._shards) < len(index.shards):
            raise FileError(f"{self.folder}: is incomplete; run the command `tokenize` again to continue it")
        self.tokenizer = load_tokenizer(self.folder)
        if self.tokenizer.fingerprint != index.tokenizer:
            raise FileError(f"{self.folder}: its tokenizer is not the one that made the tokens")
        self.num_shards = len(self._shards)
        self.num_documents = sum(shard.documents for shard in self._shards)
        self.num_tokens = sum(shard.tokens for shard in self._shards)
        self.num_bytes = sum(shard.bytes for shard in self._shards)
        """Bytes of the documents' text"""
        for number in range(self.num_shards):
            self._open(number)
        self._open_cached = lru_cache(MAX_OPEN_SHARDS)(self._open)
        self._first = numpy.cumsum([0, *(shard.documents for shard in self._shards)])  # documents before each shard

    def document(self, number: int) -> numpy.ndarray:
        """Return the ids of a document, memory-mapped."""
        shard = int(numpy.searchsorted(self._first, number, side="right")) - 1
        tokens, table = self._open_cached(shard)
        row = number - int(self._first[shard])
        begin = int(table[row - 1, TOKENS]) if row else 0
        return tokens[begin : int(table[row, TOKENS])]

    def hold_out(self, validation: Iterable[bytes] | None = None) -> Corpus:
        """Hold out a twentieth of the text, and at most 8 MiB, as :func:`hold_out` does; duplicates are removed.

        Training documents are ids, read on access; held-out documents are text. If the end of the longest document is
        held out, the document's tokens are divided in the proportion wanted for its text.
        """
        keys, sizes, lengths = self._column(KEYS), self._lengths(BYTES), self._lengths(TOKENS)
        with reading(self.folder):
            corpus = split(self.document, keys, sizes, lengths, self._text, MAX_HELD_OUT_BYTES, validation)
        both = self.tokenizer.fingerprint + corpus.fingerprint
        return corpus._replace(fingerprint=hashlib.sha256(both.encode()).hexdigest())

    def _open(self, number: int) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Map the tokens of a shard, and its table of documents."""
        shard = self._shards[number]
        tokens_path, documents_path = shard_paths(self.folder, number)
        tokens = _map_array(tokens_path, dtype_of(self.tokenizer), (shard.tokens,))
        table = _map_array(documents_path, numpy.dtype("<u8"), (shard.documents, 3))
        if shard.documents and table[-1, :KEYS].tolist() != [shard.tokens, shard.bytes]:
            raise FileError(f"{documents_path}: must end where the shard does; it was changed after it was written")
        return tokens, table

    def _column(self, column: int) -> numpy.ndarray:
        """Return a column (N,) of the tables of all shards."""
        tables = (self._open_cached(number)[1] for number in range(self.num_shards))
        return numpy.concatenate([numpy.empty(0, numpy.uint64), *(table[:, column] for table in tables)])

    def _lengths(self, column: int) -> numpy.ndarray:
        """Return the number (N,) of tokens, or of bytes of text, of each document."""
        lengths = [numpy.empty(0, numpy.int64)]
        for number in range(self.num_shards):
            lengths.append(numpy.diff(self._open_cached(number)[1][:, column].astype(numpy.int64), prepend=0))
            if (lengths[-1] < 1).any():
                raise FileError(f"{shard_paths(self.folder, number)[1]}: the ends of documents must increase")
        return numpy.concatenate(lengths)

    def _text(self, ids: numpy.ndarray) -> bytes:
        return ids.tobytes() if self.tokenizer.byte_level else self.tokenizer.decode(ids.tolist())


def is_tokens(folder: Path) -> bool:
    """Return True if a folder holds tokens, complete or not."""
    return (folder / INDEX).is_file()


def shard_paths(folder: Path, number: int) -> tuple[Path, Path]:
    return folder / f"shard-{number:06d}.tokens.npy", folder / f"shard-{number:06d}.documents.npy"


def dtype_of(tokenizer: Tokenizer) -> numpy.dtype:
    """Return the narrowest dtype that holds the ids of text."""
    last = tokenizer.vocab_size - 1
    return numpy.min_scalar_type(last - (last == tokenizer.start)).newbyteorder("<")


def write_shard(
    folder: Path, number: int, tokenizer: Tokenizer, documents: Iterable[Iterable[bytes]], skipped: Counter[str]
) -> Shard:
    """Encode documents, each given in pieces of text, into a shard's files, atomically.

    Documents without tokens are counted in `skipped`. The memory needed is a few windows, and 24 bytes per document.
    """
    tokens_path, documents_path = shard_paths(folder, number)
    with write_atomically(tokens_path) as draft, open(draft, "wb") as file:
        table, tokens, size = _write_tokens(file, tokenizer, documents, skipped)
    with write_atomically(documents_path) as draft, open(draft, "wb") as file:
        numpy.save(file, table)
    return Shard(len(table), tokens, size, dict(sorted(skipped.items())))


def _write_tokens(
    file: BinaryIO, tokenizer: Tokenizer, documents: Iterable[Iterable[bytes]], skipped: Counter[str]
) -> tuple[numpy.ndarray, int, int]:
    """Write the file of tokens; return the table of documents, and the total numbers of tokens and bytes."""

    def write_header(length: int) -> None:  # of constant size
        fields = {"descr": dtype.str, "fortran_order": False, "shape": (length,)}
        numpy.lib.format.write_array_header_1_0(file, fields)

    def hashed(pieces: Iterable[bytes]) -> Iterator[bytes]:
        digests.append(digest := hashlib.sha256())
        for piece in pieces:
            digest.update(piece)
            yield piece

    dtype = dtype_of(tokenizer)
    digests: deque[Any] = deque()  # of the documents being read
    table = array("Q")
    tokens = size = before = 0  # totals so far; `before`: tokens before the current document
    write_header(0)
    for ids, length, is_last in tokenizer.encode_stream(map(hashed, documents)):
        file.write(ids.astype(dtype).data)
        tokens, size = tokens + len(ids), size + length
        if is_last:
            key = key_of(digests.popleft())
            if tokens > before:
                table.extend((tokens, size, key))
            else:
                skipped["documents without tokens"] += 1
                size = table[-2] if table else 0
            before = tokens
    file.seek(0)
    write_header(tokens)
    return numpy.array(table, "<u8").reshape(-1, 3), tokens, size


def _map_array(path: Path, dtype: numpy.dtype, shape: tuple[int, ...]) -> numpy.ndarray:
    """Map an .npy file, which must have this dtype and shape."""
    with opened(path):
        array = numpy.lib.format.open_memmap(path, mode="r")
        if array.dtype != dtype or array.shape != shape:
            raise ValueError(f"must hold {shape} numbers of {dtype}, got {array.shape} of {array.dtype}")
    return array
