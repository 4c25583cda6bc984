"""Documents to learn from, and documents to tell how well the model does on others."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy

from ..ops.common.checks import described

HELD_OUT_FRACTION = 0.05


class Corpus(NamedTuple):
    train: Sequence[bytes] | Parts
    """Documents to learn from: texts, or the ids of :class:`Shards`"""
    held_out: list[bytes]
    fingerprint: str
    """sha256 of what tells the documents apart, whatever the files are called and in whatever order they came"""
    num_bytes: int
    """Of the text to learn from"""


@dataclass(eq=False)
class Parts(Sequence):
    """Documents of a collection, or parts of them, each of which is read when it is asked for."""

    document: Callable[[int], Any]
    """Gives the document of a number"""
    numbers: numpy.ndarray
    """(N,) of the documents"""
    lengths: numpy.ndarray
    """(N,) of the parts"""
    starts: numpy.ndarray | None = None
    """(N,) where the parts begin in the documents; None: where the documents do"""

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Any:
        start = 0 if self.starts is None else int(self.starts[index])
        return self.document(int(self.numbers[index]))[start : start + int(self.lengths[index])]


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
    texts = [document for document in documents if document]
    for document in texts:
        if not isinstance(document, bytes):
            raise TypeError(f"hold_out: `documents` must be of bytes, got {described(document)}; encode text.")
    keys = numpy.array([key_of(hashlib.sha256(text)) for text in texts], numpy.uint64)
    sizes = numpy.array([len(text) for text in texts], numpy.int64)
    corpus = split(texts.__getitem__, keys, sizes, sizes, bytes)
    return corpus._replace(train=list(corpus.train))


def key_of(digest: Any) -> int:
    """The key of a document whose text has this sha256, which decides its place: the first 8 bytes as a big-endian number."""
    return int.from_bytes(digest.digest()[:8], "big")


def split(
    document: Callable[[int], Any],
    keys: numpy.ndarray,
    sizes: numpy.ndarray,
    lengths: numpy.ndarray,
    text_of: Callable[[Any], bytes],
    most: int | None = None,
) -> Corpus:
    """Holds out a twentieth of the text, and at most `most` bytes, as :func:`hold_out` does, of any documents.

    Args:
        document: gives the bytes or ids of the document of a number.
        keys, sizes, lengths: (N,) of each document, its key, the bytes of its text and the length of what `document` gives.
        text_of: gives the text of bytes or ids.
    """
    numbers = numpy.unique(keys, return_index=True)[1]  # in the order of their keys, without copies
    fingerprint = hashlib.sha256(keys[numbers].tobytes()).hexdigest()
    sizes, lengths = sizes[numbers], lengths[numbers]
    goal = max(1, int(HELD_OUT_FRACTION * int(sizes.sum())))
    goal = room = goal if most is None else min(goal, most)
    held = numpy.zeros(len(sizes), bool)
    left = numpy.arange(len(sizes))
    while len(left := left[sizes[left] <= room]):  # as many at once as fit one after another
        count = int(numpy.searchsorted(numpy.cumsum(sizes[left]), room, side="right"))
        held[left[:count]] = True
        room -= int(sizes[left[:count]].sum())
        left = left[count:]
    held_out = [text_of(document(number)) for number in numbers[held].tolist()]
    numbers, sizes, lengths = numbers[~held], sizes[~held], lengths[~held]
    train, num_bytes = Parts(document, numbers, lengths), int(sizes.sum())
    if room > goal / 2 and len(train):
        longest = int(sizes.argmax())
        size, ids = int(sizes[longest]), train[longest]
        lengths[longest] = len(ids) * (size - room) // size  # as large a share of its ids as of its text
        held_out.append(text_of(ids[lengths[longest] :]))
        num_bytes -= len(held_out[-1])
    if not len(train) or not lengths.all():
        raise ValueError("hold_out: `documents` must have at least 2 bytes, one to learn and one to hold out.")
    return Corpus(train, held_out, fingerprint, num_bytes)
