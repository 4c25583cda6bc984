"""Batches for next-token prediction: documents end to end in rows, separated by `cu_seqlens`.

A document is a sequence of ids, of bytes or tokens. The id `start` precedes every document, so that its first token is
predicted, too; its last target is the id `end`, so that a model learns where documents end. One id may be both:

    document    b"def f"                     row      START 'd' 'e' 'f' ' ' 'f' | START 'i' 'm' ...
    inputs      START 'd' 'e' 'f' ' ' 'f'    targets   'd'  'e' 'f' ' ' 'f' END |  'i'  'm' 'p' ...

A batch of R rows of L tokens is one packed row (1, R*L), without padding. No state passes from document to document.

Processes share a batch by rows. Each tracks the position of all rows, from the documents' lengths alone, but reads only
the text of its own rows. So positions are equal in all processes, and a run may resume in any number of processes.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, NamedTuple, Protocol

import msgspec
import numpy
import torch
from torch import Tensor

from .corpus import Parts
from ..ops.common.checks import check_integer, check_size, describe, short_text

START = 256
"""The id before a document of bytes"""


class Document(Protocol):
    """Bytes, an array or tensor of integers, or a lazy sequence such as `numpy.memmap`."""

    def __len__(self) -> int: ...
    def __getitem__(self, where: slice) -> Any: ...


class Batch(NamedTuple):
    """T tokens in S sequences of R rows."""

    tokens: Tensor
    """(1, T) int64"""
    targets: Tensor
    """(1, T) int64, the token after each token"""
    cu_seqlens: Tensor
    """(S + 1,) int64"""
    carry: Tensor
    """(S,) int64, row of the previous batch whose end state is the sequence's initial state; -1: a fresh state"""
    last: Tensor
    """(R,) int64, the last sequence of each row, whose state the next batch may carry; -1: a row without text"""


class Batches:
    """Endless batches of shuffled documents or, with `seed=None`, one pass over them, longest first.

    context "streamed": each row reads a document to its end, over several batches, and carries its state.
    context "packed":   one reader fills row after row; a document cut at a row's end continues without its past.

    Args:
        documents: bytes, arrays or tensors of ids, or a lazy sequence of them with an array `lengths`, such as the
            documents of :class:`Shards`. Empty documents are skipped.
        rows: number of rows in a batch; or, as a range, the rows of `batch` that this process reads. With `seed=None`,
            a process whose rows have no more text gets batches without tokens until all rows have ended.
        length: tokens in a row.
        batch: number of rows of the whole batch, if `rows` is a range.
        start: the id before a document.
        end: the id after a document, which is never an input. "start": the id `start`, as with bytes. None: no id.
        context_length: maximum targets of a document; longer ones are cut into the fewest equal parts, which are then
            shuffled as documents. Only the last part has the end. The value is limited to the number of all targets
            divided by the number of rows, or to `length` if that is larger. So the rows of a batch read different text
            even if there are only a few books. None: no document is cut.

    Attributes:
        lengths: (N,) int64, targets of each document or part, including its end.

    Raises:
        ValueError, TypeError: an argument is wrong, or a document holds anything but ids.

    Example:
        >>> from megalodon_ops.training import Batches
        >>> documents = [b"to be or not to be", b"that is"]
        >>> batches = Batches(documents, rows=2, length=8, seed=0)
        >>> batch = next(iter(batches))
        >>> batch.tokens.shape, batch.cu_seqlens.tolist(), batch.carry.tolist()
        (torch.Size([1, 16]), [0, 8, 16], [-1, -1])
        >>> batch.targets[0, 8:].tolist() == [*b"that is", 256]
        True
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
        end: int | Literal["start"] | None = "start",
        context: str = "streamed",
        seed: int | None = 0,
        context_length: int | None = None,
    ):
        self.batch, self.rows = _check_rows(rows, batch)
        self.length = check_size("Batches", "length", length)
        self.start = check_integer("Batches", "start", start, "an id, an integer of at least 0", 0)
        self.end = self.start if end == "start" else end
        if self.end is not None:
            check_integer("Batches", "end", self.end, 'an id, an integer of at least 0, "start" or None', 0)
        if context not in ("streamed", "packed"):
            raise ValueError(f'Batches: `context` must be "streamed" or "packed", got {short_text(context)}.')
        self.seed, self.streamed = seed, context == "streamed"
        ends = self.end is not None
        self.documents, self.lengths = _with_tokens(documents)
        self.lengths = self.lengths + ends
        if context_length is not None:
            check_integer("Batches", "context_length", context_length, "a positive integer, or None", 1)
            share = -(-int(self.lengths.sum()) // self.batch)
            longest = max(min(context_length, max(self.length, share)), 1 + ends)  # room for an id before the end
            if self.lengths.max() > longest:
                self.documents = _cut(self.documents, self.lengths, longest)
                self.lengths = self.documents.lengths
        self.taken = 0  # documents that rows have begun, in all epochs
        self.readers: list[tuple[int, int]] = [(-1, 0)] * (self.batch if self.streamed else 1)  # (document, offset)
        self._epoch, self._order = -1, numpy.empty(0, numpy.int64)

    def position(self) -> dict[str, Any]:
        """Return the position of all rows before the next batch, as JSON."""
        return {"taken": self.taken, "readers": [list(reader) for reader in self.readers]}

    def seek(self, position: dict[str, Any]) -> None:
        """Continue at the `position` of batches with equal documents, length, context, seed and total rows."""
        stored = msgspec.convert(position, BatchesPosition)
        lengths = [self.lengths[number] if number < len(self.lengths) else 0 for number, _ in stored.readers]
        inside = (number < 0 or 0 <= at < length for (number, at), length in zip(stored.readers, lengths, strict=True))
        if len(stored.readers) != len(self.readers) or not all(inside):
            raise ValueError(
                "Batches.seek: `position` must have as many rows as these batches, and offsets inside these documents."
            )
        self.taken, self.readers = stored.taken, stored.readers

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.next, None)  # until there is none

    def next(self) -> Batch | None:
        """Return the next batch; None after a single pass."""
        pieces = [self._pieces(row) for row in range(self.batch)]
        if not any(pieces):
            return None
        tokens: list[Any] = [[]]  # parts, of which numpy needs at least one
        targets: list[Any] = [[]]
        bounds, carry, last = [0], [], []
        for row, number in enumerate(self.rows):
            for document, offset, stop in pieces[number]:
                before, text = self._read(document, offset, stop)
                tokens += [[before], text[:-1]]
                targets.append(text)
                bounds.append(bounds[-1] + len(text))
                carry.append(row if self.streamed and offset else -1)
            last.append(len(carry) - 1 if pieces[number] else -1)
        return Batch(
            tokens=_packed(tokens),
            targets=_packed(targets),
            cu_seqlens=torch.tensor(bounds),
            carry=torch.tensor(carry, dtype=torch.int64),
            last=torch.tensor(last),
        )

    def _pieces(self, row: int) -> list[tuple[int, int, int]]:
        """Advance a row by up to `length` tokens; return its pieces as (document, first token, end)."""
        reader = row if self.streamed else 0
        room = self.length
        pieces: list[tuple[int, int, int]] = []
        while room:
            document, offset = self.readers[reader]
            if document < 0:
                if self.seed is None and self.taken == len(self.lengths):
                    break
                document = self._take()
            stop = min(offset + room, int(self.lengths[document]))
            self.readers[reader] = (document, stop) if stop < self.lengths[document] else (-1, 0)
            pieces.append((document, offset, stop))
            room -= stop - offset
        return pieces

    def _read(self, document: int, offset: int, stop: int) -> tuple[int, numpy.ndarray]:
        """Return the token before a piece of a document, and the piece."""
        first = max(offset - 1, 0)
        ids = numpy.asarray(_ids(self.documents[document][first:stop]))
        if ids.dtype.kind not in "iu" or ids.min() < 0:
            kind = "text; encode it" if ids.dtype.kind == "U" else ids.dtype
            got = ids.min() if ids.dtype.kind in "iu" else kind
            raise ValueError(f"Batches: `documents` must be of bytes or ids, integers of at least 0, got {got}.")
        if len(ids) < stop - first:  # the piece's last target is the id `end`
            ids = numpy.append(ids, self.end)
        return (int(ids[0]), ids[1:]) if offset else (self.start, ids)

    def _take(self) -> int:
        """Return the next document of the epoch."""
        epoch, index = divmod(self.taken, len(self.lengths))
        if self._epoch != epoch:
            self._epoch, self._order = epoch, self._shuffled(epoch)
        self.taken += 1
        return int(self._order[index])

    def _shuffled(self, epoch: int) -> numpy.ndarray:
        """Return the order of documents in an epoch, the same in every version of NumPy and of this package."""
        keys = -self.lengths
        if self.seed is not None:
            texts = (b"%d %d %d" % (self.seed, epoch, number) for number in range(len(keys)))
            first8 = (int.from_bytes(hashlib.sha256(text).digest()[:8], "big") for text in texts)
            keys = numpy.fromiter(first8, numpy.uint64, len(keys))
        return numpy.argsort(keys, kind="stable")


class BatchesPosition(msgspec.Struct):
    """The fields of `Batches.position`."""

    taken: Annotated[int, msgspec.Meta(ge=0)]
    readers: list[tuple[int, int]]


def _cut(documents: Sequence[Document], lengths: numpy.ndarray, longest: int) -> Parts:
    """Cut documents of more than `longest` targets into the fewest equal parts."""
    counts = -(-lengths // longest)
    numbers = numpy.repeat(numpy.arange(len(lengths)), counts)
    part = numpy.arange(len(numbers)) - numpy.repeat(counts.cumsum() - counts, counts)
    whole, count = lengths[numbers], counts[numbers]
    starts = part * whole // count
    sizes = (part + 1) * whole // count - starts
    return Parts(lambda number: _ids(documents[number]), numbers=numbers, lengths=sizes, starts=starts)


def _packed(parts: list[Any]) -> Tensor:
    """Return ids, in parts, as (1, T) int64."""
    return torch.from_numpy(numpy.concatenate(parts, dtype=numpy.int64, casting="unsafe"))[None]


def _ids(document: Document) -> Document:
    """Return bytes as an array, to slice without copies."""
    return numpy.frombuffer(document, numpy.uint8) if isinstance(document, (bytes, bytearray)) else document


def _check_rows(rows: int | range, batch: int | None) -> tuple[int, range]:
    """Return the number of rows of the whole batch, and the rows to read."""
    if not isinstance(rows, range):
        rows = range(check_size("Batches", "rows", rows))
        return len(rows), rows
    batch = check_size("Batches", "batch", batch)
    if not (len(rows) and rows.step == 1 and 0 <= rows.start and rows.stop <= batch):
        raise ValueError(f"Batches: `rows` must be consecutive rows of the {batch} in a batch, got {rows}.")
    return batch, rows


def _with_tokens(documents: Sequence[Document]) -> tuple[Sequence[Document], numpy.ndarray]:
    """Return the documents that have tokens, and their lengths."""
    if isinstance(documents, (str, bytes)) or not isinstance(documents, Sequence):
        raise TypeError(f"Batches: `documents` must be a list of documents, got {describe(documents)}.")
    lengths = getattr(documents, "lengths", None)
    if lengths is None:
        documents = [document for document in documents if len(document)]
        lengths = numpy.array([len(document) for document in documents])
    if not len(lengths):
        raise ValueError("Batches: `documents` must hold a token, got none.")
    return documents, lengths.astype(numpy.int64)
