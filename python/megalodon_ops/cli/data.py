"""Documents: where the bytes come from, and which of them are held out.

A document has a length and slices of bytes: `bytes` for training, a `FileDocument` for text longer than memory.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from megalodon_ops.cli.errors import CommandError

HELD_OUT_FRACTION = 0.05
NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


class Corpus(NamedTuple):
    train: list[bytes]
    held_out: list[bytes]
    fingerprint: str
    """sha256 of what is in either part, whatever the files are called and in whatever order they came"""


class FileDocument:
    """A file read piece by piece, so that evaluating it takes memory for one piece."""

    def __init__(self, path: Path):
        self.path = path
        self.size = path.stat().st_size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, part: slice) -> bytes:
        start, stop, _ = part.indices(self.size)
        with open(self.path, "rb") as file:
            file.seek(start)
            piece = file.read(stop - start)
        if len(piece) != stop - start:
            raise CommandError(f"{self.path}: the file became shorter while it was read")
        return piece


def load_corpus(paths: Sequence[str | Path] | None) -> Corpus:
    """Read the documents of `paths`, or the standard library's sources for None, and hold some of them out."""
    return split(path.read_bytes() for path in (find_files(paths) if paths else standard_library()))


def find_files(paths: Iterable[str | Path]) -> list[Path]:
    """The files named and, of the folders named, all files with content but those whose path has a name like `.git`."""
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            files = list(_walk(path))
            if not files:
                raise CommandError(f"--data {path}: no file with content in this folder")
            found += files
        elif path.is_file():
            if not path.stat().st_size:
                raise CommandError(f"--data {path}: the file is empty")
            found.append(path)
        else:
            raise CommandError(f"--data {path}: no such file or folder")
    return found


def standard_library() -> list[Path]:
    """The Python sources of the running interpreter's library: without its tests, which not every machine has."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [path for path in _walk(root, skip=NOT_LIBRARY) if path.suffix == ".py"] if root.is_dir() else []
    if not files:
        raise CommandError(f"no Python source under {root}; name some text with --data PATH")
    return files


def split(documents: Iterable[bytes]) -> Corpus:
    """Hold out a twentieth of the bytes by whole documents; of identical documents one is kept.

    Documents are taken in the order of their hash while they fit. Where they are too few or too long to fill half of
    the twentieth, the end of the longest one is held out too.
    """
    unique = {hashlib.sha256(document).digest(): document for document in documents if document}
    total = sum(map(len, unique.values()))
    if total < 2:
        raise CommandError("the text must have at least 2 bytes, one to learn and one to hold out")
    goal = max(1, int(HELD_OUT_FRACTION * total))

    train: list[bytes] = []
    held_out: list[bytes] = []
    held = 0
    for key in sorted(unique):
        fits = held + len(unique[key]) <= goal
        held += len(unique[key]) if fits else 0
        (held_out if fits else train).append(unique[key])
    if held < goal / 2:
        longest = max(range(len(train)), key=lambda i: len(train[i]))
        cut = len(train[longest]) - (goal - held)
        held_out.append(train[longest][cut:])
        train[longest] = train[longest][:cut]

    fingerprint = hashlib.sha256(b"".join(sorted(unique)))
    return Corpus(train, held_out, fingerprint.hexdigest())


def _walk(root: Path, skip: Iterable[str] = ()) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in skip)
        for name in sorted(names):
            path = Path(folder, name)
            if not name.startswith(".") and path.is_file() and path.stat().st_size:
                yield path
