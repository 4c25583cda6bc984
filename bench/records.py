"""Files of results: JSON Lines, one run a line, to which several processes append."""

import fcntl
import json
import warnings
from pathlib import Path
from typing import Any


def read(path: Path) -> list[dict[str, Any]]:
    """Return the records in the order of their appending; none if there is no file.

    A last line without a newline is an interrupted write: it is skipped with a warning.
    """
    *lines, rest = path.read_bytes().split(b"\n") if path.exists() else [b""]
    if rest:
        warnings.warn(f"{path}: the last line is incomplete, and left out", stacklevel=2)
    return [json.loads(line) for line in lines]


def append(path: Path, record: dict[str, Any]) -> None:
    """Append a line by one write, under a lock on the file; replace an incomplete last line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(record).encode() + b"\n"
    with open(path, "a+b", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        if file.write(line) < len(line):
            raise OSError(f"{path}: no room for a result of {len(line):,} bytes")


def write(path: Path, text: str) -> None:
    """Write a file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(text)
    draft.replace(path)
