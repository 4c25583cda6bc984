"""Writes files and folders that are complete or not there, and reads files that come from anywhere.

Only regular files are opened. A fault of a file that is read is a FileError of one line that begins with the file's
path, or a FileNotFoundError. Whatever is written follows symbolic links: what a link leads to is replaced.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import hashlib
import json
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .ops.common.checks import described, shown

LARGEST_JSON = 16 << 20
"""Most bytes of a JSON file; a configuration takes less than a thousandth of these"""
_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


class FileError(ValueError):
    """A file or folder that cannot be used as it is; the message is one line and names it."""


def as_path(caller: str, argument: str, value: object) -> Path:
    """The value as a path, or a TypeError."""
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{caller}: `{argument}` must be a path, got {described(value)}.")
    return Path(value)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Makes of what a reader of the file raises a FileError that names it; of too little memory, an OSError."""
    try:
        yield
    except (FileError, FileNotFoundError, ModuleNotFoundError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of libraries in Rust
            raise
        if isinstance(error, MemoryError) or "Cannot allocate memory" in str(error):
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM), str(path)) from error
        reason = (isinstance(error, OSError) and error.strerror) or one_line(error)
        raise FileError(reason if reason.startswith(str(path)) else f"{path}: {reason}") from error


def file_size(path: Path) -> int:
    """Bytes of a regular file, or of one that a link leads to; a folder, pipe or device is refused unopened."""
    with reading(path):
        try:
            found = path.stat()
        except FileNotFoundError:
            raise FileNotFoundError(f"{path}: no such file") from None
        if not stat.S_ISREG(found.st_mode):
            raise ValueError(f"must be a file, got {_KINDS.get(stat.S_IFMT(found.st_mode), 'something else')}")
    return found.st_size


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Opens a regular file to read it in the block, whose errors are faults of the file."""
    file_size(path)
    with reading(path), open(path, "rb") as file:
        yield file


def file_sha256(path: Path) -> str:
    """The sha256 sum of a file."""
    digest = hashlib.sha256()
    with opened(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds."""
    if (size := file_size(path)) > LARGEST_JSON:
        raise FileError(f"{path}: must have at most {LARGEST_JSON} bytes, got {size}")
    with opened(path) as file:
        content = json.load(file)
        if not isinstance(content, dict):
            raise ValueError(f"must hold a JSON object, got {shown(content)}")
    return content


@contextmanager
def write_atomically(path: Path, *, folder: bool = False, token: str | None = None) -> Iterator[Path]:
    """Yields the path of a draft, a file to write or an empty folder to fill, which then takes the place of `path`.

    If the process is killed meanwhile, what was at `path` stays; where folders cannot be exchanged, and it is killed
    between two renames, inside `.<name>.draft-...`. A draft that cannot be finished is removed, as its remains would keep
    a full disk full; what a killed process has left goes with the next call for the same path. Each of several processes
    that write one path has a draft of its own, and the last one replaces the others'.
    """
    path = Path(os.path.realpath(path))
    try:
        with drafting(path, token) as draft:
            if folder:
                draft.mkdir(exist_ok=True)
            yield draft
            for written in (*draft.glob("*"), draft):
                flush(written)
            (_replace if folder else os.rename)(draft, path)
            flush(path.parent)
        remove_drafts(path.parent, glob.escape(path.name))
    except OSError as error:
        cause = error.__cause__ if isinstance(error.__cause__, OSError) else error  # of a file inside a folder
        raise OSError(f"{path}: could not be written: {cause.strerror or cause}") from cause


def write_whole(path: Path, content: bytes) -> None:
    """Replaces the content of a file; if this process is killed meanwhile, the old content stays."""
    with write_atomically(path) as draft:
        draft.write_bytes(content)


def remove_drafts(parent: Path, name: str) -> None:
    """Removes the drafts that killed processes have left of the file or folder `name`, which may be a pattern."""
    for lock in parent.glob(f".{name}.draft-*.lock"):
        with suppress(OSError), open(lock, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails where the process lives
            shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
            lock.unlink()


def draft_of(path: Path, token: str) -> Path:
    """The draft of a path, in a folder of its own, beside which is a file that the process has the system's lock on."""
    return path.with_name(f".{path.name}.draft-{token}") / "new"


@contextmanager
def drafting(path: Path, token: str | None = None) -> Iterator[Path]:
    """Yields the path of a draft, and holds its lock; in the end it goes. One process at a time has one of this token."""
    draft, has_lock = draft_of(path, token or uuid.uuid4().hex[:8]), False
    path.parent.mkdir(parents=True, exist_ok=True)
    while not has_lock:  # until the file is not one that its last holder has removed
        with open(f"{draft.parent}.lock", "ab") as lock:
            with suppress(OSError):  # of a file system without locks, where the drafts of killed processes stay
                fcntl.flock(lock, fcntl.LOCK_EX)
            if has_lock := os.fstat(lock.fileno()).st_nlink > 0:
                try:
                    draft.parent.mkdir(exist_ok=True)
                    yield draft
                finally:
                    shutil.rmtree(draft.parent, ignore_errors=True)
                    Path(lock.name).unlink(missing_ok=True)


def _replace(draft: Path, path: Path) -> None:
    """Gives a folder the name `path`, whatever other processes put there meanwhile."""
    while not _exchange(draft, path):
        old = draft.with_name(f"old-{uuid.uuid4().hex[:8]}")
        try:
            with drafting(path, "turn"):  # the name is free for a moment
                with suppress(FileNotFoundError):
                    os.rename(path, old)
                return os.rename(draft, path)
        except BaseException as error:
            with suppress(OSError):
                os.rename(old, path)
            if getattr(error, "errno", None) not in (errno.ENOTEMPTY, errno.EEXIST):  # of another process
                raise


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges two folders in one step; False where there are not two, or the system or file system cannot."""
    call = getattr(ctypes.CDLL(None), "renameat2", None)  # of Linux: AT_FDCWD is -100, RENAME_EXCHANGE 2
    return call is not None and not call(-100, os.fsencode(one), -100, os.fsencode(other), 2)


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes the tensors to one file; a tensor that shares memory with others is written once for each name.

    What goes wrong is an OSError. Without `metadata`, the file's is what transformers wants to find.
    """
    seen: set[int] = set()
    plain = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        begin = tensor.untyped_storage().data_ptr()
        plain[name] = tensor.clone() if begin in seen else tensor
        seen.add(begin)
    path.touch()
    mode = path.stat().st_mode  # that of a user's new files; the library's are their owner's alone
    try:
        save_file(plain, path, metadata=metadata or {"format": "pt"})
    except SafetensorError as error:
        raise OSError(one_line(error)) from error
    path.chmod(mode)


def flush(path: Path) -> None:
    """Has the system write a file or a folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def one_line(error: BaseException) -> str:
    """The error's text without line breaks and characters that a terminal would obey, at most 1,000 of it."""
    text = " ".join(str(error).split())[:1000]
    return text if text.isprintable() else ascii(text)[1:-1]
