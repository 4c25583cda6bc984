"""Batches of next-token predictions: documents laid end to end in rows, with `cu_seqlens` telling them apart.

A document is a sequence of ids: of bytes, or of a tokenizer's tokens. The id `start` opens every document, so that its
first token is predicted too:

    document    b"def f"                 row      START 'd' 'e' 'f' ' ' | START 'i' 'm' ...
    inputs      START 'd' 'e' 'f' ' '    targets   'd'  'e' 'f' ' ' 'f' |  'i'  'm' 'p' ...

A batch of R rows of L tokens is one packed row (1, R*L): no padding, and no state passes from document to document.

Several processes share a batch by its rows. Each counts how far all rows are, which takes the documents' lengths alone,
and reads the text of its own rows. So a position is that of the whole batch, equal in every process, and a run goes on
from it in any number of processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy
import torch
from torch import Tensor

from ..ops.values import check_integer, check_size, described, is_whole, shown

START = 256
"""The id that opens a document of bytes"""


class Document(Protocol):
    """Bytes, an array or a tensor of integers, or what reads one piece by piece, such as `numpy.memmap`."""

    def __len__(self) -> int: ...
    def __getitem__(self, part: slice) -> Any: ...


class Batch(NamedTuple):
    """T tokens in S sequences of R rows."""

    tokens: Tensor
    """(1, T) int64"""
    targets: Tensor
    """(1, T) int64, the token after each token"""
    cu_seqlens: Tensor
    """(S + 1,) int64"""
    carry: Tensor
    """(S,) int64, which of the R rows of the batch before has the state that the sequence goes on from, -1 where it starts afresh"""
    last: Tensor
    """(R,) int64, the sequence at each row's end, whose state the next batch may carry on; -1 for a row without text"""


class Batches:
    """Endless batches of shuffled documents or, with `seed=None`, one pass over them in order of length, longest first.

    context "streamed": each row reads a document to its end, over as many batches as it takes, carrying its state.
    context "packed":   one reader fills row after row; a document cut at a row's end goes on without its past.

    Documents without tokens are left out. :meth:`position` and :meth:`seek` go on later, with equal documents.

    Args:
        documents: bytes, arrays or tensors of ids, or what reads them piece by piece, such as :class:`Shards`. A sequence
            with an array `lengths` of its documents' lengths is asked for a document only when a row reads it.
        rows: how many rows a batch has; or, as a range, those of its `batch` rows that this process reads.
        length: tokens in a row.
        batch: the rows of the whole batch, where `rows` is a range of them.
        context_length: cut a document of more tokens into the fewest equal parts that have no more; each part is then a
            document like the others, so that a batch shares fewer documents with the batches before it. Whatever the
            length, a document longer than a row, and than a row's share of all tokens, is cut as well, so that the rows of
            a few books read different text. None: no document is cut.

    A process whose rows are out of text while other rows are not gets a batch of no tokens; this takes `seed=None`.

    Example:
        >>> from megalodon_ops.training import Batches
        >>> documents = [b"to be or not to be", b"that is"]
        >>> batches = Batches(documents, rows=2, length=8, seed=0)
        >>> batch = next(iter(batches))
        >>> batch.tokens.shape, batch.cu_seqlens.tolist(), batch.carry.tolist()
        (torch.Size([1, 16]), [0, 8, 15, 16], [-1, -1, -1])
        >>> second = Batches(documents, rows=range(1, 2), batch=2, length=8, seed=0)  # in another process
        >>> bool((next(iter(second)).tokens == batch.tokens[:, 8:]).all()), second.position() == batches.position()
        (True, True)
    """

    def __init__(
        self,
        documents: Sequence[Document],
        rows: int | range,
        length: int,
        *,
        batch: int | None = None,
        start: int = START,
        context: str = "streamed",
        seed: int | None = 0,
        context_length: int | None = None,
    ):
        self.batch, self.rows = _check_rows(rows, batch)
        self.length = check_size("Batches", "length", length)
        self.start = check_integer("Batches", "start", start, "the id that opens a document, at least 0", 0)
        if not isinstance(context, str) or context not in ("streamed", "packed"):
            raise ValueError(f'Batches: `context` must be "streamed" or "packed", got {shown(context)}.')
        if seed is not None:
            seed = check_integer("Batches", "seed", seed, "an integer of at least 0, or None", 0)
        if isinstance(documents, (str, bytes)) or not isinstance(documents, Sequence):
            raise TypeError(f"Batches: `documents` must be a list of documents, got {described(documents)}.")
        self.documents, self.lengths = _with_tokens(documents)
        self.seed, self.streamed = seed, context == "streamed"
        if context_length is not None:
            self._cut(check_integer("Batches", "context_length", context_length, "a positive integer, or None", 1))
        self.taken = 0
        self.readers: list[tuple[int, int]] = [(-1, 0)] * (self.batch if self.streamed else 1)  # (document, offset)
        self._order: tuple[int, numpy.ndarray] = (-1, numpy.empty(0, numpy.uint32))

    def _cut(self, context_length: int) -> None:
        share = max(self.length, -(-int(self.lengths.sum(dtype="int64")) // self.batch))
        longest = min(context_length, share)
        if self.lengths.max() > longest:
            self.documents = _Parts(self.documents, self.lengths, longest)
            self.lengths = self.documents.lengths

    def position(self) -> dict[str, Any]:
        """Where the next batch goes on, as JSON: that of all rows, whichever this process reads."""
        return {"taken": self.taken, "readers": [list(reader) for reader in self.readers]}

    def seek(self, position: dict[str, Any]) -> None:
        """Goes on at a position of batches of equal documents, length, context and seed, and as many rows in all."""
        taken, readers = position.get("taken"), position.get("readers")
        if not is_whole(taken, 0) or not isinstance(readers, list) or len(readers) != len(self.readers):
            raise ValueError(f"Batches.seek: `position` must be one of {len(self.readers)} readers, got {position}.")
        for document, offset in readers:
            if document >= len(self.lengths) or (document >= 0 and offset >= self.lengths[document]):
                raise ValueError(
                    f"Batches.seek: `position` must be inside the documents, got token {offset} of document {document}."
                )
        self.taken = taken
        self.readers = [(document, offset) for document, offset in readers]

    def __iter__(self) -> Iterator[Batch]:
        while (batch := self.next()) is not None:
            yield batch

    def next(self) -> Batch | None:
        """The next batch; None when a single pass is over."""
        pieces = [self._pieces(row) for row in range(self.batch)]
        if not any(pieces):
            return None
        mine = [pieces[row] for row in self.rows]
        size = sum(stop - offset for row in mine for _, offset, stop in row)
        tokens, targets = numpy.empty(size, numpy.int64), numpy.empty(size, numpy.int64)
        bounds: list[int] = [0]
        carry: list[int] = []
        last: list[int] = []
        for row, row_pieces in enumerate(mine):
            for index, offset, stop in row_pieces:
                before, text = self._read(index, offset, stop)
                begin, end = bounds[-1], bounds[-1] + len(text)
                tokens[begin] = before
                tokens[begin + 1 : end] = text[:-1]
                targets[begin:end] = text
                bounds.append(end)
                carry.append(row if self.streamed and offset else -1)
            last.append(len(carry) - 1 if row_pieces else -1)
        return Batch(
            torch.from_numpy(tokens)[None],
            torch.from_numpy(targets)[None],
            torch.tensor(bounds),
            torch.tensor(carry, dtype=torch.int64),
            torch.tensor(last),
        )

    def _pieces(self, row: int) -> list[tuple[int, int, int]]:
        """What the row reads next, (document, first token, end), up to `length` tokens; its reader moves on."""
        reader, room = row if self.streamed else 0, self.length
        found: list[tuple[int, int, int]] = []
        while room:
            index, offset = self.readers[reader]
            if index < 0:
                if not self._left():
                    break
                index = self._take()
            stop = min(offset + room, int(self.lengths[index]))
            self.readers[reader] = (index, stop) if stop < self.lengths[index] else (-1, 0)
            found.append((index, offset, stop))
            room -= stop - offset
        return found

    def _read(self, index: int, offset: int, stop: int) -> tuple[int, numpy.ndarray]:
        """The token before a piece of a document, and the piece."""
        piece = self.documents[index][max(offset - 1, 0) : stop]
        text = numpy.frombuffer(piece, numpy.uint8) if isinstance(piece, (bytes, bytearray)) else numpy.asarray(piece)
        return (int(text[0]), text[1:]) if offset else (self.start, text)

    def _left(self) -> bool:
        return self.seed is not None or self.taken < len(self.lengths)

    def _take(self) -> int:
        epoch, place = divmod(self.taken, len(self.lengths))
        if self._order[0] != epoch:
            self._order = (epoch, self._shuffled(epoch))
        self.taken += 1
        return int(self._order[1][place])

    def _shuffled(self, epoch: int) -> numpy.ndarray:
        """The documents of an epoch in the order in which they are taken, 4 bytes a document."""
        if self.seed is None:
            keys = -self.lengths.astype(numpy.int64)
        else:
            keys = _hashes(f"{self.seed} {epoch} ".encode(), len(self.lengths))
        order = numpy.argsort(keys, kind="stable")
        return order.astype(numpy.uint32) if len(order) <= 1 << 32 else order


class _Part:
    """Tokens of a document from `start` on."""

    def __init__(self, document: Document, start: int, length: int):
        self.document, self.start, self.length = document, start, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, part: slice) -> Any:
        return self.document[self.start + part.start : self.start + part.stop]


class _Parts(Sequence[Document]):
    """Documents, those of more than `longest` tokens in the fewest equal parts that are not longer."""

    def __init__(self, documents: Sequence[Document], lengths: numpy.ndarray, longest: int):
        self.documents = documents
        lengths = lengths.astype(numpy.int64)
        counts = -(-lengths // longest)
        self.numbers = numpy.repeat(numpy.arange(len(lengths)), counts)
        place = numpy.arange(len(self.numbers)) - numpy.repeat(counts.cumsum() - counts, counts)
        whole, count = lengths[self.numbers], counts[self.numbers]
        self.starts = place * whole // count
        self.lengths = (place + 1) * whole // count - self.starts

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: Any) -> Any:
        return _Part(self.documents[int(self.numbers[index])], int(self.starts[index]), int(self.lengths[index]))


def _hashes(begin: bytes, count: int) -> numpy.ndarray:
    """(count,) numbers that sort documents into an order that outlives versions, which no library's generator promises."""
    keys, block = numpy.empty(count, numpy.uint64), 4096
    for first in range(0, count, block):
        digests = [hashlib.sha256(begin + b"%d" % i).digest()[:8] for i in range(first, min(first + block, count))]
        keys[first : first + block] = numpy.frombuffer(b"".join(digests), ">u8")
    return keys


def _check_rows(rows: int | range, batch: int | None) -> tuple[int, range]:
    """The rows of the whole batch, and those of them to read."""
    if not isinstance(rows, range):
        rows = range(check_size("Batches", "rows", rows))
        if batch is not None and batch != len(rows):
            raise ValueError(
                "Batches: `batch` must be left out where `rows` is a number; `rows` may be a range of them."
            )
        return len(rows), rows
    if batch is None:
        raise ValueError(f"Batches: `batch` must say how many rows there are in all, as `rows` is {rows}.")
    batch = check_size("Batches", "batch", batch)
    if not (len(rows) and rows.step == 1 and 0 <= rows.start and rows.stop <= batch):
        raise ValueError(f"Batches: `rows` must be neighbouring rows of the {batch} of a batch, got {rows}.")
    return batch, rows


def _with_tokens(documents: Sequence[Document]) -> tuple[Sequence[Document], numpy.ndarray]:
    """The documents that have tokens, and their lengths."""
    lengths = getattr(documents, "lengths", None)
    if lengths is None:
        if any(isinstance(document, str) for document in documents):
            raise TypeError("Batches: `documents` must be of bytes or of ids, got a str; encode it.")
        documents = [document for document in documents if len(document)]
        lengths = numpy.fromiter(map(len, documents), numpy.int64, len(documents))
    if not len(lengths):
        raise ValueError("Batches: `documents` must hold a token, got none.")
    if not lengths.all():
        raise ValueError("Batches: `documents.lengths` must be of documents that have tokens, got a length of 0.")
    return documents, lengths
