"""A run's metrics: one JSON object a line."""

from __future__ import annotations

import errno
import json
import logging
import os
from typing import Any

from ..storage.files import as_path, opened, write_whole
from ..ops.common.checks import is_integer_between

_log = logging.getLogger("megalodon_ops")


class Metrics:
    """A file of JSON lines, written without a buffer.

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
        """Continue after `step`: remove lines of later steps and of the run's end, which the run writes again."""
        self.path = path = as_path("Metrics", "path", path)
        path.parent.mkdir(parents=True, exist_ok=True)
        earlier = [row for row in read_metrics(path) if row["step"] <= step and not row.get("final")]
        if os.path.lexists(path):
            write_whole(path, "".join(map(_line, earlier)).encode())
        self._file = open(path, "ab", buffering=0)

    def write(self, **row: Any) -> None:
        """Add a line; `row` must have a `step`."""
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
    """Return the lines of a `metrics.jsonl`, without a last line that is cut short; an empty list if there is no file.

    Damaged lines, without a step, are skipped with a warning in the log `megalodon_ops`.
    """
    path, rows = as_path("read_metrics", "path", path), []
    if not os.path.lexists(path):
        return rows
    with opened(path) as file:
        lines = file.read().split(b"\n")[:-1]
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and is_integer_between(row.get("step"), 0):
            rows.append(row)
    if len(rows) < len(lines):
        _log.warning("%s: damaged lines left out: %d", path, len(lines) - len(rows))
    return rows


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"
