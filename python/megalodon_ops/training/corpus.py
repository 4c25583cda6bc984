"""Training documents and held-out documents."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy

from ..ops.common.checks import describe

HELD_OUT_FRACTION = 0.05


class Corpus(NamedTuple):
    train: Sequence[bytes] | Parts
    """Training documents: texts, or the ids of :class:`Shards`"""
    held_out: list[bytes]
    fingerprint: str
    """sha256 of the documents, independent of file names and order"""
    num_bytes: int
    """Bytes of the training text"""


@dataclass(eq=False)
class Parts(Sequence):
    """Documents of a collection, or parts of them, read on access."""

    document: Callable[[int], Any]
    """Document number -> document"""
    numbers: numpy.ndarray
    """(N,) document of each part"""
    lengths: numpy.ndarray
    """(N,) length of each part"""
    starts: numpy.ndarray | None = None
    """(N,) offset of each part in its document; None: 0"""

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Any:
        start = 0 if self.starts is None else int(self.starts[index])
        return self.document(int(self.numbers[index]))[start : start + int(self.lengths[index])]


def hold_out(documents: Iterable[bytes], validation: Iterable[bytes] | None = None) -> Corpus:
    """Hold out a twentieth of the bytes, in whole documents; duplicates are removed.

    Documents are held out in the order of their hash, as long as they fit. If they fill less than half of the
    twentieth, the end of the longest document is held out, too.

    Args:
        validation: documents to hold out instead; all others are training documents.

    Raises:
        ValueError: less than 2 bytes; no training document that is not in `validation`, or none to hold out.

    Example:
        >>> from megalodon_ops.training import hold_out
        >>> corpus = hold_out([bytes(range(100)), bytes(range(100, 200)), b"short"])
        >>> [len(document) for document in corpus.train], [len(document) for document in corpus.held_out]
        ([100, 100], [5])
    """
    texts = _checked("documents", documents)
    sizes = numpy.array([len(text) for text in texts], numpy.int64)
    corpus = split(texts.__getitem__, _keys(texts), sizes, sizes, bytes, validation=validation)
    return corpus._replace(train=list(corpus.train))


def _checked(name: str, documents: Iterable[bytes]) -> list[bytes]:
    """Return the documents that are not empty."""
    texts = [document for document in documents if document]
    for document in texts:
        if not isinstance(document, bytes):
            raise TypeError(f"hold_out: `{name}` must be of bytes, got {describe(document)}; encode text.")
    return texts


def _keys(texts: Sequence[bytes]) -> numpy.ndarray:
    return numpy.array([key_of(hashlib.sha256(text)) for text in texts], numpy.uint64)


def key_of(digest: Any) -> int:
    """Return a document's sort key: the first 8 bytes of its text's sha256, big-endian."""
    return int.from_bytes(digest.digest()[:8], "big")


def split(
    document: Callable[[int], Any],
    keys: numpy.ndarray,
    sizes: numpy.ndarray,
    lengths: numpy.ndarray,
    text_of: Callable[[Any], bytes],
    max_held_out: int | None = None,
    validation: Iterable[bytes] | None = None,
) -> Corpus:
    """Hold out `validation`, or a twentieth of the text and at most `max_held_out` bytes, as :func:`hold_out` does.

    Args:
        document: document number -> bytes or ids.
        keys: (N,) sort key of each document.
        sizes: (N,) bytes of its text.
        lengths: (N,) its length in bytes or ids.
        text_of: bytes or ids -> text.
    """
    numbers = numpy.unique(keys, return_index=True)[1]  # sorted by key, without duplicates
    if validation is not None:
        texts = _checked("validation", validation)
        held_keys, firsts = numpy.unique(_keys(texts), return_index=True)
        numbers = numbers[~numpy.isin(keys[numbers], held_keys)]
        if not len(numbers) or not texts:
            raise ValueError(
                "hold_out: there must be a document in `validation`, and one in `documents` that is not in it, got "
                f"{len(texts)} and {len(numbers)}."
            )
        fingerprint = hashlib.sha256(keys[numbers].tobytes() + b"held out" + held_keys.tobytes()).hexdigest()
        train = Parts(document, numbers, lengths[numbers])
        return Corpus(train, [texts[first] for first in firsts], fingerprint, int(sizes[numbers].sum()))
    fingerprint = hashlib.sha256(keys[numbers].tobytes()).hexdigest()
    sizes, lengths = sizes[numbers], lengths[numbers]
    goal = max(1, int(HELD_OUT_FRACTION * int(sizes.sum())))  # bytes
    if max_held_out is not None:
        goal = min(goal, max_held_out)
    left = goal
    held = numpy.zeros(len(sizes), bool)
    candidates = numpy.arange(len(sizes))
    while len(candidates := candidates[sizes[candidates] <= left]):  # in each turn, the longest run that fits
        count = int(numpy.searchsorted(numpy.cumsum(sizes[candidates]), left, side="right"))
        held[candidates[:count]] = True
        left -= int(sizes[candidates[:count]].sum())
        candidates = candidates[count:]
    held_out = [text_of(document(number)) for number in numbers[held].tolist()]
    numbers, sizes, lengths = numbers[~held], sizes[~held], lengths[~held]
    train, num_bytes = Parts(document, numbers, lengths), int(sizes.sum())
    if left > goal / 2 and len(train):
        longest = int(sizes.argmax())
        size, ids = int(sizes[longest]), train[longest]
        lengths[longest] = len(ids) * (size - left) // size  # the same share of its ids as of its text
        held_out.append(text_of(ids[lengths[longest] :]))
        num_bytes -= len(held_out[-1])
    if not len(train) or not lengths.all():
        raise ValueError("hold_out: `documents` must have at least 2 bytes, one to learn and one to hold out.")
    return Corpus(train, held_out, fingerprint, num_bytes)
