"""Batches of next-byte predictions: documents laid end to end in rows, with `cu_seqlens` telling them apart.

Tokens are bytes 0..255 and START, which opens every document, so that its first byte is predicted too:

    document    b"def f"                 row      START 'd' 'e' 'f' ' ' | START 'i' 'm' ...
    inputs      START 'd' 'e' 'f' ' '    targets   'd'  'e' 'f' ' ' 'f' |  'i'  'm' 'p' ...

A batch of R rows of L tokens is one packed row (1, R*L): no padding, and no state passes from document to document.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy
import torch
from torch import Tensor

from megalodon_ops.cli.errors import CommandError

START = 256
VOCABULARY = 257


class Document(Protocol):
    def __len__(self) -> int: ...
    def __getitem__(self, part: slice) -> bytes: ...


class Batch(NamedTuple):
    """T tokens in S sequences."""

    tokens: Tensor
    """(1, T) int64"""
    targets: Tensor
    """(1, T) int64, each the byte after its token"""
    cu_seqlens: Tensor
    """(S + 1,) int64"""
    carry: Tensor
    """(S,) int64, the row of the batch before whose state the sequence continues, -1 where it starts afresh"""
    last: Tensor
    """(R,) int64, the sequence at each row's end, whose state the next batch may carry on; -1 for a row without text"""


class Batches:
    """Endless batches of shuffled documents or, with `seed=None`, one pass over them in order of length, longest first.

    context "streamed": each row reads a document to its end, over as many batches as it takes, carrying its state.
    context "packed":   one reader fills row after row; a document cut at a row's end goes on without its past.
    """

    def __init__(self, documents: Sequence[Document], rows: int, length: int, *, context: str, seed: int | None):
        self.documents, self.rows, self.length, self.seed = documents, rows, length, seed
        self.streamed = context == "streamed"
        self.taken = 0
        self.readers: list[tuple[int, int]] = [(-1, 0)] * (rows if self.streamed else 1)  # (document, offset)
        self._order: tuple[int, list[int]] = (-1, [])

    def position(self) -> dict:
        return {"taken": self.taken, "readers": [list(reader) for reader in self.readers]}

    def seek(self, position: dict) -> None:
        self.taken = position["taken"]
        self.readers = [(document, offset) for document, offset in position["readers"]]
        for document, offset in self.readers:
            if document >= len(self.documents) or (document >= 0 and offset >= len(self.documents[document])):
                raise CommandError(f"the checkpoint goes on in document {document} at byte {offset}, where no text is")

    def next(self) -> Batch | None:
        """The next batch; None when a single pass is over."""
        tokens = numpy.empty(self.rows * self.length, numpy.int64)
        targets = numpy.empty_like(tokens)
        bounds: list[int] = [0]
        carry: list[int] = []
        last: list[int] = []
        for row in range(self.rows):
            end = bounds[-1] + self.length
            first = len(carry)
            while bounds[-1] < end and (piece := self._read(row, end - bounds[-1])) is not None:
                offset, before, text = piece
                start, stop = bounds[-1], bounds[-1] + len(text)
                tokens[start] = before
                tokens[start + 1 : stop] = text[:-1]
                targets[start:stop] = text
                bounds.append(stop)
                carry.append(row if self.streamed and offset else -1)
            last.append(len(carry) - 1 if len(carry) > first else -1)
        if not carry:
            return None
        return Batch(
            torch.from_numpy(tokens[: bounds[-1]])[None],
            torch.from_numpy(targets[: bounds[-1]])[None],
            torch.tensor(bounds),
            torch.tensor(carry),
            torch.tensor(last),
        )

    def _read(self, row: int, room: int) -> tuple[int, int, numpy.ndarray] | None:
        """At most `room` bytes of the row's document: (where they start in it, the token before them, the bytes)."""
        reader = row if self.streamed else 0
        index, offset = self.readers[reader]
        if index < 0:
            if not self._left():
                return None
            index = self._take()
        document = self.documents[index]
        stop = min(offset + room, len(document))
        text = numpy.frombuffer(document[max(offset - 1, 0) : stop], numpy.uint8)
        self.readers[reader] = (index, stop) if stop < len(document) else (-1, 0)
        return (offset, int(text[0]), text[1:]) if offset else (0, START, text)

    def _left(self) -> bool:
        return self.seed is not None or self.taken < len(self.documents)

    def _take(self) -> int:
        epoch, place = divmod(self.taken, len(self.documents))
        if self._order[0] != epoch:
            self._order = (epoch, self._shuffled(epoch))
        self.taken += 1
        return self._order[1][place]

    def _shuffled(self, epoch: int) -> list[int]:
        if self.seed is None:
            return sorted(range(len(self.documents)), key=lambda i: -len(self.documents[i]))
        # A hash rather than a library's generator: the order must outlive versions.
        return sorted(
            range(len(self.documents)), key=lambda i: hashlib.sha256(f"{self.seed} {epoch} {i}".encode()).digest()
        )
