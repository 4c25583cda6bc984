"""Documents to learn from, and documents to tell how well the model does on others."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy

if TYPE_CHECKING:
    from .shards import ShardDocuments

from ..ops.values import described

HELD_OUT_FRACTION = 0.05


class Corpus(NamedTuple):
    train: Sequence[bytes] | ShardDocuments
    """Documents to learn from: texts, or the ids of :class:`Shards`"""
    held_out: list[bytes]
    fingerprint: str
    """sha256 of the documents of both parts, whatever the files are called and in whatever order they came; that of Shards"""

    @property
    def num_bytes(self) -> int:
        """Bytes of the text to learn from."""
        known = getattr(self.train, "num_bytes", None)
        return sum(map(len, self.train)) if known is None else known


def hold_out(documents: Iterable[bytes]) -> Corpus:
    """Holds out a twentieth of the bytes by whole documents; of identical documents one is kept.

    Documents are taken in the order of their hash while they fit. Where documents are too few or too long to fill half
    of the twentieth, the end of the longest one is held out too.

    Example:
        >>> from megalodon_ops.training import hold_out
        >>> corpus = hold_out([bytes(range(100)), bytes(range(100, 200)), b"short"])
        >>> [len(document) for document in corpus.train], [len(document) for document in corpus.held_out]
        ([100, 100], [5])
    """
    if isinstance(documents, (bytes, str)):
        raise TypeError(
            f"hold_out: `documents` must be a list of documents, got {described(documents)}; put it in a list."
        )
    unique = {hashlib.sha256(document).digest(): document for document in map(_checked, documents) if document}
    total = sum(map(len, unique.values()))
    if total < 2:
        raise ValueError(
            f"hold_out: `documents` must have at least 2 bytes, one to learn and one to hold out, got {total}."
        )
    goal = max(1, int(HELD_OUT_FRACTION * total))

    texts = [unique[key] for key in sorted(unique)]
    fits = taken_while_they_fit(numpy.fromiter(map(len, texts), numpy.int64, len(texts)), goal)
    train = [text for text, held in zip(texts, fits, strict=True) if not held]
    held_out = [text for text, held in zip(texts, fits, strict=True) if held]
    left = goal - sum(map(len, held_out))
    if left > goal / 2:
        longest = max(range(len(train)), key=lambda i: len(train[i]))
        cut = len(train[longest]) - left
        held_out.append(train[longest][cut:])
        train[longest] = train[longest][:cut]

    fingerprint = hashlib.sha256(b"".join(sorted(unique)))
    return Corpus(train, held_out, fingerprint.hexdigest())


def _checked(document: object) -> bytes:
    if not isinstance(document, bytes):
        raise TypeError(f"hold_out: `documents` must be of bytes, got {described(document)}; encode text.")
    return document


def taken_while_they_fit(sizes: numpy.ndarray, room: int) -> numpy.ndarray:
    """(N,) bool: which of N sizes are taken by one who goes through them in order and takes each that still fits."""
    taken = numpy.zeros(len(sizes), bool)
    left = numpy.arange(len(sizes))
    while len(left := left[sizes[left] <= room]):
        count = int(numpy.searchsorted(numpy.cumsum(sizes[left]), room, side="right"))
        taken[left[:count]] = True
        room -= int(sizes[left[:count]].sum())
        left = left[count:]
    return taken
