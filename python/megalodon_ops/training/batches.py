"""Batches of next-token predictions: documents laid end to end in rows, with `cu_seqlens` telling them apart.

A document is a sequence of ids: of bytes, or of a tokenizer's tokens. The id `start` opens every document, so that its
first token is predicted too:

    document    b"def f"                 row      START 'd' 'e' 'f' ' ' | START 'i' 'm' ...
    inputs      START 'd' 'e' 'f' ' '    targets   'd'  'e' 'f' ' ' 'f' |  'i'  'm' 'p' ...

A batch of R rows of L tokens is one packed row (1, R*L): no padding, and no state passes from document to document.
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
    """T tokens in S sequences."""

    tokens: Tensor
    """(1, T) int64"""
    targets: Tensor
    """(1, T) int64, the token after each token"""
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

    Documents without tokens are left out. :meth:`position` and :meth:`seek` go on later, with equal documents.

    Example:
        >>> from megalodon_ops.training import Batches
        >>> batches = Batches([b"to be or not to be", b"that is"], rows=2, length=8, seed=0)
        >>> batch = next(iter(batches))
        >>> batch.tokens.shape, batch.cu_seqlens.tolist(), batch.carry.tolist()
        (torch.Size([1, 16]), [0, 8, 15, 16], [-1, -1, -1])
    """

    def __init__(
        self,
        documents: Sequence[Document],
        rows: int,
        length: int,
        *,
        start: int = START,
        context: str = "streamed",
        seed: int | None = 0,
    ):
        self.rows, self.length = check_size("Batches", "rows", rows), check_size("Batches", "length", length)
        self.start = check_integer("Batches", "start", start, "the id that opens a document, at least 0", 0)
        if not isinstance(context, str) or context not in ("streamed", "packed"):
            raise ValueError(f'Batches: `context` must be "streamed" or "packed", got {shown(context)}.')
        if seed is not None:
            seed = check_integer("Batches", "seed", seed, "an integer of at least 0, or None", 0)
        if isinstance(documents, (str, bytes)) or not isinstance(documents, Sequence):
            raise TypeError(f"Batches: `documents` must be a list of documents, got {described(documents)}.")
        if any(isinstance(document, str) for document in documents):
            raise TypeError("Batches: `documents` must be of bytes or of ids, got a str; encode it.")
        self.documents = [document for document in documents if len(document)]
        if not self.documents:
            raise ValueError("Batches: `documents` must hold a token, got none.")
        self.seed, self.streamed = seed, context == "streamed"
        self.taken = 0
        self.readers: list[tuple[int, int]] = [(-1, 0)] * (self.rows if self.streamed else 1)  # (document, offset)
        self._order: tuple[int, list[int]] = (-1, [])

    def position(self) -> dict[str, Any]:
        """Where the next batch goes on, as JSON."""
        return {"taken": self.taken, "readers": [list(reader) for reader in self.readers]}

    def seek(self, position: dict[str, Any]) -> None:
        """Goes on at a position of batches of equal documents, rows, length, context and seed."""
        taken, readers = position.get("taken"), position.get("readers")
        if not is_whole(taken, 0) or not isinstance(readers, list) or len(readers) != len(self.readers):
            raise ValueError(f"Batches.seek: `position` must be one of {len(self.readers)} readers, got {position}.")
        for document, offset in readers:
            if document >= len(self.documents) or (document >= 0 and offset >= len(self.documents[document])):
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
        """At most `room` tokens of the row's document: (where they start in it, the token before them, the tokens)."""
        reader = row if self.streamed else 0
        index, offset = self.readers[reader]
        if index < 0:
            if not self._left():
                return None
            index = self._take()
        document = self.documents[index]
        stop = min(offset + room, len(document))
        piece = document[max(offset - 1, 0) : stop]
        text = numpy.frombuffer(piece, numpy.uint8) if isinstance(piece, (bytes, bytearray)) else numpy.asarray(piece)
        self.readers[reader] = (index, stop) if stop < len(document) else (-1, 0)
        return (offset, int(text[0]), text[1:]) if offset else (0, self.start, text)

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
