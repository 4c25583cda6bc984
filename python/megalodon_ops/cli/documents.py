"""Documents of files of any size, and how the files are divided into units, each of which becomes a shard.

A file of text is a document; in a file whose name ends in .jsonl or .ndjson, each line is a JSON object, one field of
which is a document. How files are divided depends on their sizes alone, and the documents of a unit on its bytes alone:
units may be read in any order, again and again.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from megalodon_ops.files import opened
from megalodon_ops.ops.common.checks import shown

OF_LINES = (".jsonl", ".ndjson")
READ = 1 << 20
"""Bytes that are read at once"""


class Span(NamedTuple):
    """A file of text, or the lines of JSON that begin at bytes `begin` to `end` of a file."""

    path: Path
    begin: int
    end: int


Unit = list[Span]


def divided(files: Sequence[Path], size: int) -> list[Unit]:
    """The files in units of about `size` bytes; a file of text stays whole, lines of JSON are divided."""
    units: list[Unit] = []
    room = 0
    for path in files:
        length = path.stat().st_size
        step = size if path.name.endswith(OF_LINES) else length
        for begin in range(0, length, step):
            if room <= 0:
                units.append([])
                room = size
            span = Span(path, begin, min(begin + step, length))
            units[-1].append(span)
            room -= span.end - span.begin
    return units


def size_of(units: Iterable[Unit]) -> int:
    return sum(span.end - span.begin for unit in units for span in unit)


def documents_of(unit: Unit, field: str, skipped: Counter[str]) -> Iterator[Iterable[bytes]]:
    """The documents of a unit, each in pieces of text that are to be taken before the next document.

    Lines that hold no document are counted in `skipped` by the reason.
    """
    for span in unit:
        if span.path.name.endswith(OF_LINES):
            yield from ([text] for text in _texts(span, field, skipped))
        else:
            yield _pieces(span)


def _pieces(span: Span) -> Iterator[bytes]:
    with opened(span.path) as file:
        while piece := file.read(READ):
            yield piece


def _texts(span: Span, field: str, skipped: Counter[str]) -> Iterator[bytes]:
    with opened(span.path) as file:
        if span.begin:  # a line that begins before belongs to the span before
            file.seek(span.begin - 1)
            file.readline()
        while file.tell() < span.end and (line := file.readline()):
            if line.strip():
                text = _text(line, field)
                if isinstance(text, bytes):
                    yield text
                else:
                    skipped[text] += 1


def _text(line: bytes, field: str) -> bytes | str:
    """The document in a line or, as a str, why there is none."""
    try:
        text = json.loads(line)[field]
    except (ValueError, KeyError, TypeError, RecursionError):
        text = None
    if not isinstance(text, str):
        return f"lines without a text {shown(field)}"
    if not text:
        return "empty documents"
    # JSON can escape half of a surrogate pair, which becomes U+FFFD
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
