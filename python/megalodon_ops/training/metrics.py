"""A run's metrics: one JSON object a line."""

from __future__ import annotations

import errno
import json
import logging
import os
from pathlib import Path
from typing import Any

from ..model.files import file_size, write_whole
from ..ops.values import is_whole

_log = logging.getLogger("megalodon_ops")


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
                _log.warning("damaged lines dropped: %d, the first at %d of %s", len(damaged), damaged[0], path)
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
    """The rows that name their step, and the numbers of damaged lines. A last line cut short is neither."""
    file_size(path)  # refuses what is no file
    rows, damaged = [], []
    *lines, _cut_short = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and is_whole(row.get("step"), 0):
            rows.append(row)
        else:
            damaged.append(number)
    return rows, damaged


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"
