"""Read documents from files, which are divided into units, one for each shard.

A text file is a document. In a .jsonl or .ndjson file, also compressed as .gz or .zst, each line is a JSON object with a
document in one field; in a .parquet file, each row has a document in one column. The division depends only on file
sizes and row groups. A unit's documents depend only on its bytes, so units may be read in any order.
"""

from __future__ import annotations

import bisect
import gzip
import importlib
import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from megalodon_ops import extras
from megalodon_ops.storage.files import opened
from megalodon_ops.ops.common.checks import short_text

LINE_SUFFIXES = (".jsonl", ".ndjson")
COMPRESSED_SUFFIXES = tuple(name + kind for name in LINE_SUFFIXES for kind in (".gz", ".zst"))
TABLE_SUFFIX = ".parquet"
RECORD_SUFFIXES = (*LINE_SUFFIXES, *COMPRESSED_SUFFIXES, TABLE_SUFFIX)
"""Files with a document in a field of each line or row"""
READ_BYTES = 1 << 20
"""Bytes read at a time"""
READ_ROWS = 64
"""Rows of a table decoded at a time"""


class Span(NamedTuple):
    """A file, the JSON lines that begin in its bytes [begin, end), or a row group.

    For a row group, `begin` and `end` count the uncompressed bytes of the file's row groups.
    """

    path: Path
    begin: int
    end: int


Unit = list[Span]


def split_files(files: Sequence[Path], size: int) -> list[Unit]:
    """Divide files into units of about `size` bytes; text, compressed files and row groups stay whole."""
    units: list[Unit] = []
    room = 0
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
    if path.name.endswith(TABLE_SUFFIX):
        with opened(path) as file:
            return _row_groups(_table(file))
    length = path.stat().st_size
    return [*range(0, length, size if path.name.endswith(LINE_SUFFIXES) else length), length]


def _table(file: BinaryIO) -> Any:
    """Open a .parquet file, to be read in pieces."""
    return extras.load("pyarrow.parquet", "data").ParquetFile(file, buffer_size=READ_BYTES, pre_buffer=False)


def _row_groups(table: Any) -> list[int]:
    """Return the bounds of a table's row groups, in uncompressed bytes."""
    groups = (table.metadata.row_group(number) for number in range(table.num_row_groups))
    return [0, *itertools.accumulate(group.total_byte_size for group in groups)]


def total_size(units: Iterable[Unit]) -> int:
    return sum(span.end - span.begin for unit in units for span in unit)


def documents_of(unit: Unit, field: str, skipped: Counter[str]) -> Iterator[Iterable[bytes]]:
    """Yield the documents of a unit, each in pieces of text, to be read before the next document.

    Lines and rows without a document are counted in `skipped`, by reason.
    """
    for span in unit:
        if span.path.name.endswith(RECORD_SUFFIXES):
            is_table = span.path.name.endswith(TABLE_SUFFIX)
            texts = _rows(span, field) if is_table else (_text(line, field) for line in _lines(span))
            for text in texts:
                if isinstance(text, bytes) and text:
                    yield [text]
                else:
                    without = f"{'rows' if is_table else 'lines'} without a text {short_text(field)}"
                    skipped["empty documents" if text == b"" else without] += 1
        else:
            yield _pieces(span)


def read_documents(files: Sequence[Path], field: str, skipped: Counter[str]) -> Iterator[bytes]:
    """Yield the whole documents of files; `skipped` as in :func:`documents_of`."""
    for unit in split_files(files, sum(path.stat().st_size for path in files) or 1):
        yield from (b"".join(pieces) for pieces in documents_of(unit, field, skipped))


def reasons(skipped: Counter[str]) -> str:
    """Describe the skipped lines and rows; return "" if there are none."""
    return ", ".join(f"{reason} ({count:,})" for reason, count in sorted(skipped.items()))


def _pieces(span: Span) -> Iterator[bytes]:
    with opened(span.path) as file:
        while piece := file.read(READ_BYTES):
            yield piece


def _lines(span: Span) -> Iterator[bytes]:
    """Yield the lines of a span, without blank ones."""
    with opened(span.path) as file:
        if span.path.name.endswith(COMPRESSED_SUFFIXES):
            lines: Iterable[bytes] = _decompressed(span.path, file)
        else:
            if span.begin:  # skip the rest of a line that began in the previous span
                file.seek(span.begin - 1)
                file.readline()
            lines = iter(lambda: file.readline() if file.tell() < span.end else b"", b"")
        yield from (line for line in lines if line.strip())


def _decompressed(path: Path, file: BinaryIO) -> Iterable[bytes]:
    """Open a compressed file for reading; a truncated file raises an error at its end."""
    if path.suffix == ".gz":
        return gzip.open(file)
    has_zstd = sys.version_info >= (3, 14)
    zstd = importlib.import_module("compression.zstd") if has_zstd else extras.load("backports.zstd", "data")
    any_window = zstd.DecompressionParameter.window_log_max
    return zstd.open(file, options={any_window: any_window.bounds()[1]})


def _rows(span: Span, field: str) -> Iterator[Any]:
    """Yield the values in the field's column of a row group; a text as bytes."""
    with opened(span.path) as file:
        table = _table(file)
        if field not in (names := table.schema_arrow.names):
            raise ValueError(
                f"must have a column {short_text(field)}, got {', '.join(names)}; name another with --field"
            )
        group = bisect.bisect_right(_row_groups(table), span.begin) - 1
        for batch in table.iter_batches(READ_ROWS, row_groups=[group], columns=[field], use_threads=False):
            for text in batch.column(0).to_pylist():
                yield text.encode() if isinstance(text, str) else text


def _text(line: bytes, field: str) -> bytes | None:
    """Return the document of a line, or None."""
    try:
        text = json.loads(line)[field]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if not isinstance(text, str):
        return None
    # JSON can escape half of a surrogate pair, which becomes U+FFFD
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
