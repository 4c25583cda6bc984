"""Documents: where the bytes come from, and which of them are held out.

A document has a length and slices of bytes: `bytes` for training, a `FileDocument` for text longer than memory.
"""

from __future__ import annotations

import codecs
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from megalodon_ops.cli.errors import CommandError
from megalodon_ops.training.corpus import Corpus, hold_out
from megalodon_ops.training.shard_files import is_complete, is_tokens
from megalodon_ops.training.shards import Shards

NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


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


def load_corpus(
    paths: Sequence[str | Path] | None, globs: Sequence[str] | None = None, *, flag: str = "--data "
) -> Corpus:
    """Read the documents of `paths`, or the standard library's sources for None, and hold some of them out."""
    files = find_files(paths, globs, flag=flag) if paths else standard_library()
    try:
        return hold_out(path.read_bytes() for path in files)
    except ValueError as error:
        raise CommandError(
            f"{flag}{' '.join(map(str, paths or ()))}: must have at least 2 bytes of text, one to learn and one to hold out; "
            "name more"
        ) from error


def load_data(paths: Sequence[str | Path] | None, globs: Sequence[str] | None = None) -> Corpus:
    """What `train` learns from and holds out: the text of :func:`load_corpus`, or the tokens of a folder."""
    if (folder := tokens_folder(paths)) is None:
        return load_corpus(paths, globs)
    if globs:
        raise CommandError(f"--glob: chooses among files of text, and {folder} holds tokens")
    return Shards(folder).hold_out()


def tokens_folder(paths: Sequence[str | Path] | None) -> Path | None:
    """The folder of tokens that --data names, if it names one; CommandError if it names anything else beside it, too."""
    folders = [Path(path) for path in paths or () if is_tokens(Path(path))]
    if not folders:
        return None
    if len(paths or ()) > 1:
        raise CommandError(f"--data {folders[0]}: holds tokens, so it must be named alone")
    if not is_complete(folders[0]):
        raise CommandError(f"--data {folders[0]}: is not finished; run the command `tokenize` again, which goes on")
    return folders[0]


def check_glob(globs: Sequence[str] | None, paths: Sequence[str | Path] | None) -> None:
    if globs and not paths:
        raise CommandError("--glob: chooses among the files of --data, which is not given")


def find_files(paths: Iterable[str | Path], globs: Sequence[str] | None = None, *, flag: str = "--data ") -> list[Path]:
    """The files named, and of the folders named those that match one of the patterns, whatever they hold.

    Without patterns the folders' files of text are taken, and one message says how many other files were skipped. Errors
    begin with `flag`.
    """
    found: list[Path] = []
    skipped: list[Path] = []
    for path in map(Path, paths):
        if is_tokens(path):
            raise CommandError(f"{flag}{path}: is a folder of tokens, which `train --data` reads; name text")
        if path.is_dir():
            chosen, others = _choose(path, globs, flag)
            found += chosen
            skipped += others
        elif path.is_file():
            if not path.stat().st_size:
                raise CommandError(f"{flag}{path}: the file is empty")
            found.append(path)
        else:
            raise CommandError(f"{flag}{path}: no such file or folder")
    if skipped:
        print(f"megalodon_ops: skipping {_not_text(skipped)}", file=sys.stderr)
    return found


def _choose(folder: Path, globs: Sequence[str] | None, flag: str) -> tuple[list[Path], list[Path]]:
    """The files of a folder to take, at least one, and those to skip because they are not text."""
    files = list(_walk(folder))
    if not files:
        raise CommandError(f"{flag}{folder}: no file with content in this folder")
    if globs:
        chosen = [file for file in files if any(file.relative_to(folder).match(glob) for glob in globs)]
        if not chosen:
            raise CommandError(f"{flag}{folder}: no file in this folder matches {' or '.join(globs)}")
        return chosen, []
    chosen, others = [], []
    for file in files:
        (chosen if is_text(file) else others).append(file)
    if not chosen:
        raise CommandError(f"{flag}{folder}: no text in this folder, but {_not_text(others)}")
    return chosen, others


def is_text(path: Path) -> bool:
    """Whether a file is UTF-8 without a NUL byte, read in pieces up to the first piece that is not."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with open(path, "rb") as file:
            while piece := file.read(1 << 20):
                decoder.decode(piece)
                if b"\0" in piece:
                    return False
            decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True


def _not_text(files: Sequence[Path]) -> str:
    """What the user is told of the files of folders that are not text."""
    count, first = ("1 file that is", "") if len(files) == 1 else (f"{len(files)} files that are", "the first ")
    return f"{count} not UTF-8 text, {first}{files[0]}; --glob PATTERN takes what matches, text or not"


def standard_library() -> list[Path]:
    """The Python sources of the running interpreter's library: without its tests, which not every machine has."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [path for path in _walk(root, skip=NOT_LIBRARY) if path.suffix == ".py"] if root.is_dir() else []
    if not files:
        raise CommandError(f"no Python source under {root}; name some text with --data PATH")
    return files


def _walk(root: Path, skip: Iterable[str] = ()) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in skip)
        for name in sorted(names):
            path = Path(folder, name)
            if not name.startswith(".") and path.is_file() and path.stat().st_size:
                yield path
