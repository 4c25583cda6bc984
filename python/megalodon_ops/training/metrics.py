"""A run's metrics: one JSON object a line."""

from __future__ import annotations

import errno
import json
import logging
import os
from pathlib import Path
from typing import Any

from ..errors import FileError
from ..model.files import file_size, write_whole
from ..ops.values import is_number, is_whole

_log = logging.getLogger("megalodon_ops")
_MOST_BITS = 1e30  # bits a byte; no loss is as large


class Metrics:
    """A file of JSON lines, each of which is in the file as soon as it is written.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from megalodon_ops.training import Metrics, read_metrics
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with Metrics(Path(folder, "metrics.jsonl")) as metrics:
        ...         metrics.write(step=1, loss=5.5)
        ...     read_metrics(metrics.path)
        [{'step': 1, 'loss': 5.5}]
    """

    def __init__(self, path: str | os.PathLike, step: int = 0):
        """Go on after `step`: later lines, which the run is about to write again, and a line cut short are dropped.

        Damaged lines are dropped too, and the log `megalodon_ops` is told.
        """
        self.path = path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(path):
            rows, damaged = _read(path)
            if damaged:
                lines = f"{len(damaged)} damaged lines, the first" if len(damaged) > 1 else "1 damaged line"
                _log.warning("dropping %s at %d of %s", lines, damaged[0], path)
            kept = [row for row in rows if row["step"] <= step and not is_end(row)]
            write_whole(path, "".join(map(_line, kept)).encode())
        self._file = open(path, "ab", buffering=0)

    def write(self, **row: Any) -> None:
        """Adds a line; it names its `step`."""
        line = _line(row).encode()
        try:
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise OSError(f"{self.path}: could not be written: {error.strerror}") from error

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl` that are complete and undamaged; none of a run that has not begun."""
    return _read(Path(path))[0] if os.path.lexists(path) else []


def is_end(row: dict[str, Any]) -> bool:
    """Whether the row is the last of a finished run: figures of all held-out text, beside those of compressors."""
    return row.get("final") is True and "held_out_bits_per_byte" in row and "compressors" in row


def _read(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The rows that are as a run writes them, and the numbers of damaged lines. A last line cut short is neither."""
    try:
        file_size(path)  # refuses what is no file
    except ValueError as error:
        raise FileError(str(error)) from error
    rows, damaged = [], []
    *lines, _cut_short = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if _is_row(row):
            rows.append(row)
        else:
            damaged.append(number)
    return rows, damaged


def _is_row(row: Any) -> bool:
    """Whether the row has a step, and its figures, which `draw_metrics` reads, are numbers that a run can write."""
    if not isinstance(row, dict) or not is_whole(row.get("step"), 0):
        return False
    compressors = row.get("compressors", {})
    if not isinstance(compressors, dict):
        return False
    figures = [row[name] for name in ("bits_per_byte", "held_out_bits_per_byte") if name in row]
    return all(is_number(figure) and abs(figure) < _MOST_BITS for figure in [*figures, *compressors.values()])


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"
