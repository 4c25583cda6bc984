"""Find text files and load their documents."""

import codecs
import dataclasses
import os
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from megalodon_ops.cli.documents import KINDS, LINES, LIST, PARQUET, content, holds_documents, kind_of
from megalodon_ops.cli.documents import read_documents, read_pieces, reasons
from megalodon_ops.cli.errors import CommandError
from megalodon_ops.cli.options import TextOptions, Train
from megalodon_ops.storage.files import FileError
from megalodon_ops.training.corpus import Corpus, hold_out
from megalodon_ops.training.shards import Shards, is_tokens

Paths = Sequence[str | Path]
_DEFAULTS = TextOptions()
NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


class FoundFile(NamedTuple):
    path: Path
    folder: Path | None = None  # the named folder that holds the file; None for a named file
    fault: str = ""  # why the file is skipped; "": it is taken


def load_data(options: Train, *, quiet: bool = False) -> Corpus:
    """Load the corpus of `train`: the text of :func:`load_corpus`, or a folder of tokens."""
    validation = None
    if options.validation is not None:
        validation = load_documents(options.validation, dataclasses.replace(options, glob=None), quiet=quiet)
    if (folder := tokens_folder(options.data)) is None:
        return load_corpus(options.data, options, validation=validation, quiet=quiet)
    if options.glob:
        raise CommandError(f"--glob: chooses among files of text, and {folder} holds tokens")
    return Shards(folder).hold_out(validation)


def load_corpus(
    paths: Paths | None, how: TextOptions = _DEFAULTS, *, validation: Sequence[bytes] | None = None, quiet: bool = False
) -> Corpus:
    """Read the documents that :func:`find_files` finds; hold out `validation` or, if it is None, some of them."""
    documents = load_documents(paths, how, quiet=quiet)
    try:
        return hold_out(documents, validation)
    except ValueError as error:
        needed = "at least 2 bytes, one to learn and one to hold out"
        if validation is not None:
            needed = "a document that is not in --validation"
        raise CommandError(f"{' '.join(map(str, paths or ()))}: must have {needed}") from error


def load_documents(paths: Paths | None, how: TextOptions = _DEFAULTS, *, quiet: bool = False) -> list[bytes]:
    """Read the documents that :func:`find_files` finds; unless `quiet`, print how many lines and rows were skipped."""
    skipped: Counter[str] = Counter()
    documents = [*read_documents(find_files(paths, how, quiet=quiet), how, skipped)]
    if skipped and not documents:
        found = f"no document, but {reasons(skipped)}"
        raise CommandError(f"{' '.join(map(str, paths))}: {found}; name a field with --field")
    if skipped and not quiet:
        _note(f"skipped: {reasons(skipped)}")
    return documents


def tokens_folder(paths: Paths | None) -> Path | None:
    """Return the folder of tokens in --data, or None; such a folder must be the only path."""
    folders = [Path(path) for path in paths or () if is_tokens(Path(path))]
    if folders and len(paths or ()) > 1:
        raise CommandError(f"--data {folders[0]}: holds tokens, so it must be named alone")
    return folders[0] if folders else None


def list_files(options: TextOptions) -> int:
    """`--dry-run`: print each file with how it would be read, or why it is skipped."""
    if hasattr(options, "checkpoint") and not options.data:  # without --data, such a command reads the run's text
        raise CommandError("--dry-run: lists the files of --data, and none is named")
    if folder := tokens_folder(options.data):
        print(f"{folder}: tokens")
    files = [] if folder else [*_examine(options.data, options)]
    if validation := getattr(options, "validation", None):
        files += _examine(validation, _DEFAULTS)
    for file in files:
        if file.fault:
            how = f"skipped, {file.fault}"
        elif holds_documents(file.path):
            how = "documents"
        else:
            how = "text" if is_text(file.path, options) else "bytes"
        print(f"{file.path}: {how}")
    return 0


def find_files(paths: Paths | None, how: TextOptions = _DEFAULTS, *, quiet: bool = False) -> list[Path]:
    """Return the named files and, from named folders, files that match a pattern or, without patterns, text files.

    Without paths, return the Python sources of the standard library. Unless `quiet`, print a note on .json files that
    hold no list and, for folders without patterns, on the files taken and skipped.
    """
    found = list(_examine(paths, how))
    taken = [file for file in found if not file.fault]
    skipped = [file.path for file in found if file.fault]
    folders_with_text = {file.folder for file in taken}
    for folder in dict.fromkeys(file.folder for file in found):
        if folder not in folders_with_text:
            if how.glob:
                raise CommandError(f"{folder}: no file in this folder matches {' or '.join(how.glob)}")
            raise CommandError(f"{folder}: no text in this folder: skipping {_not_text(skipped)}")
    files = [file.path for file in taken]
    if quiet:
        return files
    from_folders = [file.path for file in taken if file.folder]
    if from_folders and not how.glob:
        _note(f"taking {_by_suffix(from_folders)}")
    if skipped and not how.glob:
        _note(f"skipping {_not_text(skipped)}")
    if not_lists := [file for file in files if kind_of(file) == LIST and not holds_documents(file)]:
        kind = f"{LIST} file{'s' * (len(not_lists) > 1)}"
        _note(f"taking {len(not_lists)} {kind} without a list as text: {_names(not_lists)}")
    return files


def _note(text: str) -> None:
    print(f"megalodon_ops: {text}", file=sys.stderr)


def _examine(paths: Paths | None, how: TextOptions) -> Iterator[FoundFile]:
    """Yield the named files and all files of named folders; without paths, those of the standard library."""
    if "" in (how.glob or ()):
        raise CommandError("--glob: must be a pattern of file names such as '*.py', got ''")
    if how.glob and not paths:
        raise CommandError("--glob: chooses among the files of folders, and none is named")
    if not paths:
        yield from map(FoundFile, standard_library())
    for path in map(Path, paths or ()):
        if is_tokens(path):
            raise CommandError(f"{path}: is a folder of tokens, which `train --data` reads; name text")
        if path.is_dir():
            files = list(_walk(path))
            if not files:
                raise CommandError(f"{path}: no file with content in this folder")
            for file in files:
                if how.glob:
                    fault = "" if any(file.relative_to(path).match(glob) for glob in how.glob) else "no --glob matches"
                else:
                    is_read = kind_of(file) in (*LINES, PARQUET) or is_text(file, how)
                    fault = "" if is_read else f"not {how.encoding or 'UTF-8'} text"
                yield FoundFile(file, path, fault)
        elif not path.is_file():
            raise CommandError(f"{path}: no such file or folder")
        elif not path.stat().st_size:
            raise CommandError(f"{path}: the file is empty")
        elif kind_of(path) not in KINDS and not (how.encoding and is_text(path, how)) and _is_binary(path):
            kinds = ", ".join(KINDS)
            raise CommandError(f"{path}: is neither text nor one of {kinds}; --glob takes any file of a folder as text")
        else:
            yield FoundFile(path)


def _by_suffix(files: Sequence[Path], limit: int = 8) -> str:
    """Describe the files by suffix, largest kind first, with counts and bytes; suggest --glob if there are several."""
    counts = Counter(file.suffix for file in files)
    sizes = Counter[str]()
    for file in files:
        sizes[file.suffix] += file.stat().st_size
    kinds = [f"{counts[kind]:,} {kind or 'without suffix'} ({size:,} bytes)" for kind, size in sizes.most_common(limit)]
    if len(sizes) > limit:
        kinds.append(f"{len(sizes) - limit} other kinds")
    largest = sizes.most_common(1)[0][0] or ".txt"
    return ", ".join(kinds) + (f"; --glob '*{largest}' takes files of one kind" if len(sizes) > 1 else "")


def is_text(path: Path, how: TextOptions = _DEFAULTS) -> bool:
    """Return True if a file is text in the given encoding, or UTF-8, without a NUL character."""
    path.open("rb").close()  # raises if the file may not be read
    try:
        with content(path) as file:
            return all("\0" not in piece for piece in codecs.iterdecode(read_pieces(file), how.encoding or "utf-8"))
    except FileError:
        return False


def _is_binary(path: Path) -> bool:
    """Return True if the file's start has a NUL byte, or more control characters than text in any encoding."""
    with content(path) as file:
        start = file.read(1 << 16)
    num_controls = len(start) - len(start.translate(None, _CONTROLS))
    return b"\0" in start or num_controls > len(start) / 30  # in compressed data, a tenth


_CONTROLS = bytes([*range(8), *range(14, 27), *range(28, 32), 127])
"""Control characters that text does not contain, as in the program `file`"""


def _not_text(files: Sequence[Path]) -> str:
    fix = "--encoding names another encoding, --glob PATTERN takes every match"
    return f"{len(files)} of the files, which are not text in UTF-8 or --encoding: {_names(files)}; {fix}"


def _names(files: Sequence[Path], limit: int = 10) -> str:
    more = f" and {len(files) - limit} more (--dry-run lists all)" if len(files) > limit else ""
    return ", ".join(map(str, files[:limit])) + more


def standard_library() -> list[Path]:
    """Return the Python sources of the standard library, without its tests, which some machines lack."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [path for path in _walk(root, skip=NOT_LIBRARY) if path.suffix == ".py"]
    if not files:
        raise CommandError(f"no Python source under {root}; name some text with --data PATH")
    return files


def _walk(root: Path, skip: Iterable[str] = ()) -> Iterator[Path]:
    """Yield the files of a folder tree, except hidden and empty ones."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in skip)
        for name in sorted(names):
            path = Path(folder, name)
            if not name.startswith(".") and path.is_file() and path.stat().st_size:
                yield path
