"""Documents as tokens in files that are memory-mapped: the folder that `python -m megalodon_ops tokenize` writes.

shard_files.py says what is in the folder. A shard takes no memory beyond the pages that are being read, which are the
system's cache. :class:`Shards` holds 12 bytes a document.
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy

from .corpus import HELD_OUT_FRACTION, Corpus, taken_while_they_fit
from .record import checksum_of
from .shard_files import (
    COUNTS, CUTS, DATASET, DOCUMENTS, FORMAT, HEADER, RECORD, SHARD_RECORD, TOKENS, check, is_complete, is_tokens,
    mapped, read_shard_record,
)  # fmt: skip
from ..errors import FileError
from ..model.checkpoint import as_path
from ..model.files import file_sha256, file_size, read_json
from ..ops.values import shown
from ..tokenizers import Tokenizer, load_tokenizer

MOST_HELD_OUT = 8 << 20
"""Bytes of text that are held out at most, whose loss is to be computed now and then"""
_OPEN = 64  # shards whose tokens are mapped at once


class Shards:
    """A folder of tokens that `python -m megalodon_ops tokenize` has written, checked when it is opened.

    Sizes of all files and the content of all but the tokens are compared with the records; :meth:`verify` reads the
    tokens, too. Raises a FileError of one line, or a FileNotFoundError.

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
        train with it: python -m megalodon_ops train --data /...
        >>> shards.num_tokens, corpus.num_bytes, len(corpus.held_out[0]), batch.tokens.shape
        (2050, 1948, 102, torch.Size([1, 32]))
    """

    tokenizer: Tokenizer
    num_documents: int
    num_tokens: int
    num_bytes: int
    """Of the documents' text"""
    num_shards: int
    skipped: dict[str, int]
    """How many lines or documents of the files are not there, by reason"""
    fingerprint: str
    """sha256 of the tokenizer's fingerprint and the documents' keys in their order, however shards divide them"""

    def __init__(self, folder: str | os.PathLike):
        self.folder = as_path("Shards", "folder", folder)
        path = self.folder / RECORD
        if not is_complete(self.folder):
            if is_tokens(self.folder):
                raise FileError(f"{self.folder}: is not finished; run the command `tokenize` again, which goes on")
            raise FileNotFoundError(f"{path}: no such file; the command `tokenize` makes a folder of tokens")
        try:
            record = read_json(path)
        except ValueError as error:
            raise FileError(str(error)) from error
        if record.get("format") != FORMAT:
            raise FileError(f"{path}: its format is {shown(record.get('format'))}, and this version reads {FORMAT}")
        check(path, record, DATASET)
        if checksum_of({name: value for name, value in record.items() if name != "checksum"}) != record["checksum"]:
            raise FileError(f"{path}: was changed after it was written: its checksum is another")
        self.tokenizer = load_tokenizer(self.folder)
        if self.tokenizer.fingerprint != record["tokenizer"]["fingerprint"]:
            raise FileError(f"{self.folder}: its tokenizer is not the one that made the tokens")
        self.num_documents, self.num_tokens, self.num_bytes = (record[count] for count in COUNTS)
        self.num_shards, self.skipped = len(record["shards"]), record["skipped"]
        self._names = [shard["name"] for shard in record["shards"]]
        self._shards = [self._open_shard(shard["name"], shard["sha256"]) for shard in record["shards"]]
        for count, total in zip(COUNTS, (self.num_documents, self.num_tokens, self.num_bytes), strict=True):
            if sum(shard[count] for shard in self._shards) != total:
                raise FileError(f"{path}: `{count}` must be the sum of the shards', got {total}")
        self._first = numpy.cumsum([0, *(shard["documents"] for shard in self._shards)])  # documents before each shard
        self._indices: list[numpy.ndarray] = [self._open_index(i) for i in range(len(self._shards))]
        self._maps: OrderedDict[int, numpy.ndarray] = OrderedDict()
        digest = hashlib.sha256(self.tokenizer.fingerprint.encode())
        for index in self._indices:
            digest.update(numpy.ascontiguousarray(index[:, 2]))
        self.fingerprint = digest.hexdigest()

    def document(self, number: int) -> numpy.ndarray:
        """The ids of a document, memory-mapped."""
        shard = int(numpy.searchsorted(self._first, number, side="right")) - 1
        index, row = self._indices[shard], number - int(self._first[shard])
        return self._tokens(shard)[int(index[row - 1, 0]) if row else 0 : int(index[row, 0])]

    def hold_out(self) -> Corpus:
        """Holds out a twentieth of the text, of at most 8 MiB, as :func:`hold_out` does of text; of copies one is kept.

        The documents to learn from are ids, read when they are asked for; those held out are text. Where the end of a
        long document is held out, it is cut between two tokens.
        """
        numbers, sizes = self._distinct()
        total = int(sizes.sum())
        if total < 2:
            raise FileError(f"{self.folder}: must hold 2 bytes of text, one to learn and one to hold out, got {total}")
        goal = max(1, min(int(HELD_OUT_FRACTION * total), MOST_HELD_OUT))
        held = taken_while_they_fit(sizes, goal)
        held_out = [self._text(self.document(int(number))) for number in numbers[held]]
        left = goal - int(sizes[held].sum())
        numbers, sizes = numbers[~held], sizes[~held]
        documents = ShardDocuments(self, numbers, total - goal + left)
        if left > goal / 2:
            longest = int(sizes.argmax())
            if documents.lengths[longest] < 2:
                raise FileError(f"{self.folder}: must hold a second token, one to learn and one to hold out")
            tokens = self._tokens_of(int(numbers[longest]), int(sizes[longest]) - left)
            held_out.append(self._text(documents[longest][tokens:]))
            documents.lengths[longest] = tokens
            documents.num_bytes -= len(held_out[-1])
        return Corpus(documents, held_out, self.fingerprint)

    def verify(self, read: Callable[[int], object] = lambda _: None) -> None:
        """Reads all tokens and compares them with their sha256; `read` is called with the bytes that were read."""
        for name, shard in zip(self._names, self._shards, strict=True):
            path = self.folder / name / TOKENS
            if file_sha256(path, read) != shard["sha256"][TOKENS]:
                raise FileError(f"{path}: was changed after it was written: its checksum is another")

    def _open_shard(self, name: str, sha256: str) -> dict[str, Any]:
        folder = self.folder / name
        record = read_shard_record(folder)
        if file_sha256(folder / SHARD_RECORD) != sha256:
            raise FileError(f"{folder / SHARD_RECORD}: was changed after it was written: its checksum is another")
        width = numpy.dtype(record["dtype"]).itemsize
        sizes = {TOKENS: record["tokens"] * width, DOCUMENTS: record["documents"] * 24, CUTS: record["cuts"] * 16}
        for file, size in sizes.items():
            try:
                found = file_size(folder / file)
            except ValueError as error:
                raise FileError(str(error)) from error
            if found != HEADER + size:
                raise FileError(f"{folder / file}: has {found} bytes instead of {HEADER + size}")
        for file in (DOCUMENTS, CUTS):
            if file_sha256(folder / file) != record["sha256"][file]:
                raise FileError(f"{folder / file}: was changed after it was written: its checksum is another")
        return record

    def _open_index(self, shard: int) -> numpy.ndarray:
        path, record = self.folder / self._names[shard] / DOCUMENTS, self._shards[shard]
        index = mapped(path, numpy.dtype("<u8"), (record["documents"], 3))
        if len(index) and not (
            (index[:, :2] > numpy.vstack([numpy.zeros((1, 2), numpy.uint64), index[:-1, :2]])).all()
            and index[-1, :2].tolist() == [record["tokens"], record["bytes"]]
        ):
            raise FileError(f"{path}: documents must end one after another, the last with the shard")
        return index

    def _tokens(self, shard: int) -> numpy.ndarray:
        if shard in self._maps:
            self._maps.move_to_end(shard)
            return self._maps[shard]
        record = self._shards[shard]
        dtype = numpy.dtype(record["dtype"]).newbyteorder("<")
        self._maps[shard] = mapped(self.folder / self._names[shard] / TOKENS, dtype, (record["tokens"],))
        if len(self._maps) > _OPEN:
            self._maps.popitem(last=False)
        return self._maps[shard]

    def lengths(self, numbers: numpy.ndarray | None = None, column: int = 0) -> numpy.ndarray:
        """(N,) how many tokens (column 0) or bytes of text (1) documents have, all or those of `numbers`."""
        ends = (index[:, column].astype(numpy.int64) for index in self._indices)
        lengths = [numpy.diff(end, prepend=0) for end in ends]
        whole = numpy.concatenate(lengths) if lengths else numpy.empty(0, numpy.int64)
        return whole if numbers is None else whole[numbers]

    def _distinct(self) -> tuple[numpy.ndarray, numpy.ndarray]:
        """The numbers of documents without copies, in the order of their keys, and the bytes of their text."""
        keys = numpy.concatenate([numpy.empty(0, numpy.uint64), *(index[:, 2] for index in self._indices)])
        order = numpy.argsort(keys, kind="stable")
        ordered = keys[order]
        first = numpy.ones(len(keys), bool)
        first[1:] = ordered[1:] != ordered[:-1]
        numbers = _compact(order[first])
        return numbers, self.lengths(numbers, 1)

    def _text(self, ids: numpy.ndarray) -> bytes:
        return ids.astype(numpy.uint8).tobytes() if self.tokenizer.byte_level else self.tokenizer.decode(ids.tolist())

    def _tokens_of(self, number: int, size: int) -> int:
        """How many tokens of a document make its first `size` bytes of text, or a part of a token less."""
        if self.tokenizer.byte_level:
            return size
        shard = int(numpy.searchsorted(self._first, number, side="right")) - 1
        index, row = self._indices[shard], number - int(self._first[shard])
        begin = index[row - 1, :2].astype(numpy.int64) if row else numpy.zeros(2, numpy.int64)
        cuts = mapped(self.folder / self._names[shard] / CUTS, numpy.dtype("<u8"), (self._shards[shard]["cuts"], 2))
        before = int(numpy.searchsorted(cuts[:, 1], int(begin[1]) + size, side="right"))
        window = cuts[before - 1].astype(numpy.int64) if before else begin
        window = (window if window[1] > begin[1] else begin) - begin
        tokens, read = int(window[0]), int(window[1])
        ids = self.document(number)
        for text in self.tokenizer.text_of(ids[tokens:].tolist() if len(ids) - tokens < 1 << 17 else ids[tokens:]):
            read += len(text)
            if read > size:
                break
            tokens += 1
        return min(max(tokens, 1), len(ids) - 1)


class ShardDocuments(Sequence):
    """Documents of shards to learn from: arrays of ids that are mapped when they are read."""

    def __init__(self, shards: Shards, numbers: numpy.ndarray, num_bytes: int):
        self._shards, self._numbers = shards, numbers
        self.lengths = _compact(shards.lengths(numbers))
        """(N,) tokens of each document"""
        self.num_bytes = num_bytes
        """Of the documents' text"""

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._shards.document(int(self._numbers[index]))[: int(self.lengths[index])]


def _compact(numbers: numpy.ndarray) -> numpy.ndarray:
    """The numbers in 4 bytes each, if they fit."""
    return numbers.astype(numpy.uint32) if not len(numbers) or int(numbers.max()) < 1 << 32 else numbers
