"""Read documents from files, which are divided into units, one for each shard.

A text file is a document. A file of another kind, by the end of its name, holds a document in a field of each entry:

    .jsonl, .ndjson    lines, each a JSON object
    .json              a list of JSON objects or texts; a file without a list is a text
    .csv, .tsv         rows, under a row of the columns' names
    .parquet           rows

All but .parquet may be compressed, as .gz or .zst. The division depends only on file sizes and row groups. A unit's
documents depend only on its bytes, so units may be read in any order.
"""

import bisect
import codecs
import csv
import gzip
import importlib
import io
import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from megalodon_ops import extras
from megalodon_ops.cli.options import TextOptions
from megalodon_ops.storage.files import opened
from megalodon_ops.ops.common.checks import short_text

LINES = (".jsonl", ".ndjson")
LIST = ".json"
TABLES = (".csv", ".tsv")
PARQUET = ".parquet"
KINDS = (*LINES, LIST, *TABLES, PARQUET)
"""Ends of the names of files with a document in a field of each entry"""
COMPRESSED = (".gz", ".zst")
csv.field_size_limit(2**31 - 1)  # characters of a document
READ_BYTES = 1 << 20
"""Bytes read at a time"""
READ_ROWS = 64
"""Rows of a table decoded at a time"""


class Span(NamedTuple):
    """A whole file, the JSON lines that begin in the file's bytes [begin, end), or a row group.

    For a row group, `begin` and `end` count the uncompressed bytes of the file's row groups.
    """

    path: Path
    begin: int
    end: int


Unit = list[Span]


def kind_of(path: Path) -> str:
    """Return the end of a file's name, without that of a compression."""
    return Path(path.stem if path.suffix in COMPRESSED else path.name).suffix.lower()


def holds_documents(path: Path) -> bool:
    """Return True if each entry of a file may hold a document, False for a text."""
    if kind_of(path) != LIST:
        return kind_of(path) in KINDS
    with content(path) as file:
        return file.read(READ_BYTES).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["


def is_plain(path: Path, how: TextOptions) -> bool:
    """Return True if a file's bytes are the document."""
    return not (how.encoding or path.suffix in COMPRESSED or holds_documents(path))


@contextmanager
def content(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading, decompressed; a truncated file raises an error at its end."""
    with opened(path) as file:
        if path.suffix == ".zst":
            has_zstd = sys.version_info >= (3, 14)
            zstd = importlib.import_module("compression.zstd") if has_zstd else extras.load("backports.zstd", "data")
            window = zstd.DecompressionParameter.window_log_max
            _, largest = window.bounds()
            file = zstd.open(file, options={window: largest})
        try:
            yield gzip.open(file) if path.suffix == ".gz" else file
        except UnicodeDecodeError as error:
            raise ValueError(f"{error}; name its encoding with --encoding") from error


def read_pieces(file: BinaryIO) -> Iterator[bytes]:
    while piece := file.read(READ_BYTES):
        yield piece


def split_files(files: Sequence[Path], size: int) -> list[Unit]:
    """Divide files into units of about `size` bytes; text, compressed files and row groups stay whole."""
    units: list[Unit] = []
    room = 0  # in the last unit
    for path in files:
        for begin, end in itertools.pairwise(_bounds(path, size)):
            if begin == end:  # a row group without rows
                continue
            if room <= 0:
                units.append([])
                room = size
            units[-1].append(Span(path, begin, end))
            room -= end - begin
    return units


def _bounds(path: Path, size: int) -> list[int]:
    """Return the bounds of a file's spans."""
    if kind_of(path) == PARQUET:
        with opened(path) as file:
            return _row_groups(_table(file))
    length = path.stat().st_size
    is_divided = path.suffix in LINES  # False for .jsonl.gz
    return [*range(0, length, size if is_divided else length), length]


def _table(file: BinaryIO) -> Any:
    """Open a .parquet file without loading its rows."""
    return extras.load("pyarrow.parquet", "data").ParquetFile(file, buffer_size=READ_BYTES, pre_buffer=False)


def _row_groups(table: Any) -> list[int]:
    """Return the bounds of a table's row groups, in uncompressed bytes."""
    groups = (table.metadata.row_group(number) for number in range(table.num_row_groups))
    return [0, *itertools.accumulate(group.total_byte_size for group in groups)]


def total_size(units: Iterable[Unit]) -> int:
    return sum(span.end - span.begin for unit in units for span in unit)


def documents_of(unit: Unit, how: TextOptions, skipped: Counter[str]) -> Iterator[Iterable[bytes]]:
    """Yield the documents of a unit, each in pieces of text, to be read before the next document.

    Entries without a document are counted in `skipped`, by reason.
    """
    for span in unit:
        if not holds_documents(span.path):
            yield _pieces(span.path, how.encoding)
            continue
        for name, text in _entries(span, how):
            if isinstance(text, bytes) and text:
                yield [text]
            elif text == b"":
                skipped["empty documents"] += 1
            else:
                skipped[f"{name} without a text {short_text(how.field)}"] += 1


def read_documents(files: Sequence[Path], how: TextOptions, skipped: Counter[str]) -> Iterator[bytes]:
    """Yield the whole documents of files; `skipped` as in :func:`documents_of`."""
    for unit in split_files(files, sys.maxsize):
        yield from (b"".join(pieces) for pieces in documents_of(unit, how, skipped))


def reasons(skipped: Counter[str]) -> str:
    """Describe the skipped lines and rows; return "" if there are none."""
    return ", ".join(f"{reason} ({count:,})" for reason, count in sorted(skipped.items()))


def _pieces(path: Path, encoding: str | None) -> Iterator[bytes]:
    """Yield a text, as UTF-8 if its encoding is given."""
    with content(path) as file:
        pieces = read_pieces(file)
        yield from (text.encode() for text in codecs.iterdecode(pieces, encoding)) if encoding else pieces


def _entries(span: Span, how: TextOptions) -> Iterator[tuple[str, Any]]:
    """Yield the entries of a span: their name in plural, and the document as bytes."""
    kind = kind_of(span.path)
    if kind in LINES:
        yield from (("lines", _text(_json(line), how.field)) for line in _lines(span))
    elif kind == LIST:
        with content(span.path) as file:
            entries = _json(file.read())
        for entry in entries if isinstance(entries, list) else [None]:  # a damaged list counts as one entry
            yield "entries", _text({how.field: entry} if isinstance(entry, str) else entry, how.field)
    elif kind in TABLES:
        with content(span.path) as file:
            lines = io.TextIOWrapper(file, how.encoding or "utf-8-sig", newline="")
            first = lines.readline()
            delimiter = max(",;\t|", key=first.count)  # the one that the names' row has most often
            rows = csv.DictReader(itertools.chain([first], lines), delimiter=delimiter)
            name = _rows_name(rows.fieldnames or (), how.field)
            yield from ((name, _text(row, how.field)) for row in rows)
    else:
        yield from _rows(span, how.field)


def _rows_name(names: Sequence[str], field: str) -> str:
    return "rows" if field in names else f"rows of {', '.join(map(str, names))}"


def _lines(span: Span) -> Iterator[bytes]:
    """Yield the lines of a span, without blank ones."""
    is_compressed = span.path.suffix in COMPRESSED
    with content(span.path) as file:
        if span.begin:  # skip the rest of the previous span's last line, or its newline alone
            file.seek(span.begin - 1)
            file.readline()
        while (is_compressed or file.tell() < span.end) and (line := file.readline()):
            if line.strip():
                yield line


def _rows(span: Span, field: str) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a row group, as :func:`_entries`."""
    with opened(span.path) as file:
        table = _table(file)
        group = bisect.bisect_right(_row_groups(table), span.begin) - 1
        name = _rows_name(table.schema_arrow.names, field)
        if name != "rows":
            yield from [(name, None)] * table.metadata.row_group(group).num_rows
            return
        for batch in table.iter_batches(READ_ROWS, row_groups=[group], columns=[field], use_threads=False):
            for text in batch.column(0).to_pylist():
                yield name, text.encode() if isinstance(text, str) else text


def _json(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _text(entry: Any, field: str) -> bytes | None:
    """Return the document of an entry, or None."""
    text = entry.get(field) if isinstance(entry, dict) else None
    if isinstance(text, str):  # JSON can escape half of a surrogate pair, which becomes U+FFFD
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
    return None
