"""Documents to learn from, and documents to tell how well the model does on others."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import NamedTuple

from ..ops.values import described

HELD_OUT_FRACTION = 0.05


class Corpus(NamedTuple):
    train: list[bytes]
    held_out: list[bytes]
    fingerprint: str
    """sha256 of the documents of both parts, whatever the files are called and in whatever order they came"""


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
        raise TypeError(f"hold_out: `documents` must be a list of documents, got {described(documents)}; put it in a list.")
    unique = {hashlib.sha256(document).digest(): document for document in map(_checked, documents) if document}
    total = sum(map(len, unique.values()))
    if total < 2:
        raise ValueError(
            f"hold_out: `documents` must have at least 2 bytes, one to learn and one to hold out, got {total}."
        )
    goal = max(1, int(HELD_OUT_FRACTION * total))

    train: list[bytes] = []
    held_out: list[bytes] = []
    held = 0
    for key in sorted(unique):
        fits = held + len(unique[key]) <= goal
        held += len(unique[key]) if fits else 0
        (held_out if fits else train).append(unique[key])
    if held < goal / 2:
        longest = max(range(len(train)), key=lambda i: len(train[i]))
        cut = len(train[longest]) - (goal - held)
        held_out.append(train[longest][cut:])
        train[longest] = train[longest][:cut]

    fingerprint = hashlib.sha256(b"".join(sorted(unique)))
    return Corpus(train, held_out, fingerprint.hexdigest())


def _checked(document: object) -> bytes:
    if not isinstance(document, bytes):
        raise TypeError(f"hold_out: `documents` must be of bytes, got {described(document)}; encode text.")
    return document
