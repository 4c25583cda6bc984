"""Read documents from files, divided into units, one for each shard.

A text file is a document; in a .jsonl or .ndjson file, each line is a JSON object with a document in one field. The
division depends on file sizes only, and a unit's documents on its bytes only, so units may be read in any order.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from megalodon_ops.files import opened
from megalodon_ops.ops.common.checks import short_text

LINE_SUFFIXES = (".jsonl", ".ndjson")
READ_BYTES = 1 << 20
"""Bytes read at once"""


class Span(NamedTuple):
    """A text file, or the JSON lines that begin at bytes `begin` to `end` of a file."""

    path: Path
    begin: int
    end: int


Unit = list[Span]


def split_files(files: Sequence[Path], size: int) -> list[Unit]:
    """Divide files into units of about `size` bytes; text files stay whole."""
    units: list[Unit] = []
    room = 0
    for path in files:
        length = path.stat().st_size
        step = size if path.name.endswith(LINE_SUFFIXES) else length
        for begin in range(0, length, step):
            if room <= 0:
                units.append([])
                room = size
            span = Span(path, begin, min(begin + step, length))
            units[-1].append(span)
            room -= span.end - span.begin
    return units


def total_size(units: Iterable[Unit]) -> int:
    return sum(span.end - span.begin for unit in units for span in unit)


def documents_of(unit: Unit, field: str, skipped: Counter[str]) -> Iterator[Iterable[bytes]]:
    """Yield the documents of a unit, each in pieces of text, to be read before the next document.

    Lines without a document are counted in `skipped`, by reason.
    """
    for span in unit:
        if span.path.name.endswith(LINE_SUFFIXES):
            yield from ([text] for text in _texts(span, field, skipped))
        else:
            yield _pieces(span)


def _pieces(span: Span) -> Iterator[bytes]:
    with opened(span.path) as file:
        while piece := file.read(READ_BYTES):
            yield piece


def _texts(span: Span, field: str, skipped: Counter[str]) -> Iterator[bytes]:
    with opened(span.path) as file:
        if span.begin:  # skip a line that began in the span before
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
    """Return the document of a line or, as a str, the reason why there is none."""
    try:
        text = json.loads(line)[field]
    except (ValueError, KeyError, TypeError, RecursionError):
        text = None
    if not isinstance(text, str):
        return f"lines without a text {short_text(field)}"
    if not text:
        return "empty documents"
    # JSON can escape half of a surrogate pair, which becomes U+FFFD
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
