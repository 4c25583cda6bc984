"""Writes files that are complete or not there, and reads files that come from anywhere.

Only regular files are opened, only small, flat and unambiguous JSON is read. Every fault of a file that is read is a
ValueError of one line that begins with the file's path, or a FileNotFoundError.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from ..ops.values import shown

LARGEST_JSON = 16 << 20
"""Most bytes of a JSON file; a configuration takes less than a thousandth of these"""
DEEPEST_JSON = 32
"""Most objects and lists inside one another"""
_STRING, _BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL), re.compile(r"[\[\]{}]")
_LONGEST_INTEGER = 40  # most digits: twice as many as an integer of 64 bits has


def file_size(path: Path) -> int:
    """Bytes of a regular file, or of one that a link leads to; a folder, pipe or device is refused before it is opened."""
    try:
        found = path.stat()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {_reason(error)}") from error
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path}: must be a file, got {_KINDS.get(stat.S_IFMT(found.st_mode), 'something else')}")
    return found.st_size


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds; numbers that are not finite and names that stand twice are refused."""
    if (size := file_size(path)) > LARGEST_JSON:
        raise ValueError(f"{path}: must have at most {LARGEST_JSON} bytes, got {size}")
    try:
        text = path.read_bytes().decode()
        _check_depth(text)
        content = json.loads(
            text, parse_constant=_refuse, parse_int=_integer, parse_float=_finite, object_pairs_hook=_distinct
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {_reason(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must hold a JSON object, got {shown(content)}")
    return content


@contextmanager
def write_atomically(path: Path) -> Iterator[Path]:
    """Yields the path of a draft to write, then flushes the draft to the disk and gives it the name `path`.

    If the process is killed meanwhile, what was at `path` stays. A draft that cannot be finished is removed: its remains
    would keep a full disk full.
    """
    draft = path.with_name(f".{path.name}.draft")
    try:
        yield draft
        flush(draft)
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    flush(path.parent)


def flush(path: Path) -> None:
    """Has the system write a file or a folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def one_line(error: Exception) -> str:
    """The error's text without line breaks, at most 1,000 characters of it."""
    return " ".join(str(error).split())[:1000]


def _check_depth(text: str) -> None:
    depth = 0
    for bracket in _BRACKET.finditer(_STRING.sub("", text)):
        depth += 1 if bracket[0] in "[{" else -1
        if depth > DEEPEST_JSON:
            raise ValueError(f"JSON nested more than {DEEPEST_JSON} deep")


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


def _integer(digits: str) -> int:
    if len(digits) > _LONGEST_INTEGER:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def _finite(digits: str) -> float:
    if not math.isfinite(value := float(digits)):
        raise ValueError(f"the number {shown(digits)} is infinite")
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) != len(pairs):
        (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the name {shown(twice)} stands twice in one object")
    return names


def _reason(error: Exception) -> str:
    return (error.strerror or "cannot be read") if isinstance(error, OSError) else str(error)


_KINDS = {
    stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}  # fmt: skip
