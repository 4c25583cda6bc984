"""Files of results: JSON Lines, a run a line, to which several processes append."""

from __future__ import annotations

import fcntl
import json
import warnings
from pathlib import Path
from typing import Any


def read(path: Path) -> list[dict[str, Any]]:
    """The records in the order in which they were appended; none where there is no file.

    A line ends with a newline. A last line without one was cut off amid its write: it is left out, with a warning.
    """
    *lines, rest = path.read_bytes().split(b"\n") if path.exists() else [b""]
    if rest:
        warnings.warn(f"{path}: the last line is incomplete, and left out", stacklevel=2)
    return [json.loads(line) for line in lines]


def append(path: Path, record: dict[str, Any]) -> None:
    """Adds a line by one write. Processes that append at once take turns; an incomplete last line makes room."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(record).encode() + b"\n"
    with open(path, "a+b", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        if file.write(line) < len(line):
            raise OSError(f"{path}: no room for a result of {len(line):,} bytes")


def write(path: Path, text: str) -> None:
    """Writes a file that is complete or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(text)
    draft.replace(path)
