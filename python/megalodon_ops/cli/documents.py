"""Documents of files of any size, and how the files are divided into units of work that are done one by one.

A file of text is a document; in a file whose name ends in .jsonl or .ndjson, each line is a JSON object, one field of
which is a document. How files are divided depends on their sizes alone, and what a unit holds on its part of the files
alone: units may be done in any order, by any number of processes, again and again.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from megalodon_ops.cli.errors import CommandError
from megalodon_ops.ops.values import shown

LONGEST_LINE = 64 << 20
"""Bytes of a line of JSON that is read, which takes memory for the whole line"""
READ = 1 << 20
"""Bytes that are read at once"""


class Part(NamedTuple):
    """A file of text, or the lines of JSON that begin at bytes `begin` to `end` of a file."""

    path: str
    begin: int
    end: int


Unit = list[Part]


def is_lines(path: str | Path) -> bool:
    return str(path).endswith((".jsonl", ".ndjson"))


def divided(files: Sequence[Path], size: int) -> list[Unit]:
    """The files in units of about `size` bytes; a file of text stays whole, lines of JSON are divided."""
    units: list[Unit] = []
    open_unit: Unit = []
    room = size
    for path in files:
        length = path.stat().st_size
        step = size if is_lines(path) else length
        for begin in range(0, length, step):
            part = Part(str(path), begin, min(begin + step, length))
            open_unit.append(part)
            room -= part.end - part.begin
            if room <= 0:
                units.append(open_unit)
                open_unit, room = [], size
    return [*units, open_unit] if open_unit else units


def documents_of(
    unit: Unit, field: str, skipped: Counter[str], read: Callable[[int], object]
) -> Iterator[Iterable[bytes]]:
    """The documents of a unit, each in pieces of text that are to be taken before the next document.

    What is no document is counted in `skipped` by the reason; `read` is called with the bytes that were read.
    """
    for part in unit:
        if is_lines(part.path):
            for text in _texts(part, field, skipped, read):
                yield [text]
        else:
            yield _pieces(part, read)


def _pieces(part: Part, read: Callable[[int], object]) -> Iterator[bytes]:
    left = part.end
    with open(part.path, "rb") as file:
        while left:
            piece = file.read(min(READ, left))
            if not piece:
                raise CommandError(f"{part.path}: the file became shorter while it was read")
            left -= len(piece)
            read(len(piece))
            yield piece


def _texts(part: Part, field: str, skipped: Counter[str], read: Callable[[int], object]) -> Iterator[bytes]:
    with open(part.path, "rb") as file:
        if part.begin:  # a line that begins before is the part's before
            file.seek(part.begin - 1)
            _skip_line(file)
        told = part.begin
        while (begin := file.tell()) < part.end:
            line = file.readline(LONGEST_LINE + 1)
            if not line:
                raise CommandError(f"{part.path}: the file became shorter while it was read")
            if len(line) > LONGEST_LINE and not line.endswith(b"\n"):
                _skip_line(file)
                line, text = b"", "lines too long"
            else:
                text = _text(line if begin else line.removeprefix(b"\xef\xbb\xbf"), field)
            now = min(file.tell(), part.end)
            read(now - told)
            told = now
            if isinstance(text, bytes):
                yield text
            elif text:
                skipped[text] += 1
        read(part.end - told)


def _skip_line(file: BinaryIO) -> None:
    while (piece := file.readline(READ)) and not piece.endswith(b"\n"):
        pass


def _text(line: bytes, field: str) -> bytes | str | None:
    """The document in a line or, as a str, why there is none; None for a blank line."""
    if not line.strip():
        return None
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError):
        return "lines without a JSON object"
    if not isinstance(row, dict):
        return "lines without a JSON object"
    text = row.get(field)
    if not isinstance(text, str):
        return f"lines without a text {shown(field)}"
    if not text:
        return "empty documents"
    try:
        return text.encode()
    except UnicodeEncodeError:  # a half of a surrogate pair, which JSON can escape
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


def total_size(units: Iterable[Unit]) -> int:
    return sum(part.end - part.begin for unit in units for part in unit)


def facts_of(files: Iterable[Path]) -> Iterator[str]:
    """What tells whether the files are still those of before: their paths, sizes and times of change."""
    for path in files:
        found = path.stat()
        yield f"{os.path.abspath(path)}\t{found.st_size}\t{found.st_mtime_ns}\n"
