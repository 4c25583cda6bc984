"""A run's metrics: one JSON object a line."""

from __future__ import annotations

import errno
import json
import logging
import os
from typing import Any

from ..files import as_path, opened, write_whole
from ..ops.common.checks import is_whole

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
        """Go on after `step`: later lines, and those of the run's end, go, as the run is about to write them again."""
        self.path = path = as_path("Metrics", "path", path)
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_metrics(path) if row["step"] <= step and not row.get("final")]
        if os.path.lexists(path):
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
    """The lines of a `metrics.jsonl`, but for a last one that is cut short; none of a run that has not begun.

    Damaged lines, which name no step, are left out with a warning in the log `megalodon_ops`.
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
        if isinstance(row, dict) and is_whole(row.get("step"), 0):
            rows.append(row)
    if len(rows) < len(lines):
        _log.warning("%s: damaged lines left out: %d", path, len(lines) - len(rows))
    return rows


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"
