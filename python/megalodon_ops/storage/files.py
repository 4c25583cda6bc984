"""Write files and folders atomically, and read untrusted files.

Only regular files are opened. A missing file raises a FileNotFoundError. Another fault raises a FileError, whose
message is one line and begins with the file's path. Writing follows symbolic links and replaces their targets.
"""

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

from ..ops.common.checks import describe, short_text

MAX_JSON_BYTES = 16 << 20
"""Largest JSON file that is read; a configuration takes less than a thousandth of it"""
_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


class FileError(ValueError):
    """A file or folder that cannot be used as it is; the message is one line and names the file or folder."""


def as_path(caller: str, argument: str, value: object) -> Path:
    """Return the value as a path; raise a TypeError if it is not a path."""
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{caller}: `{argument}` must be a path, got {describe(value)}.")
    return Path(value)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Convert errors in the `with` block: to an OSError if memory is short, else to a FileError that names the file."""
    try:
        yield
    except (FileError, FileNotFoundError, ModuleNotFoundError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # raised by Rust libraries
            raise
        if isinstance(error, MemoryError) or "Cannot allocate memory" in str(error):
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM), str(path)) from error
        reason = (isinstance(error, OSError) and error.strerror) or one_line(error)
        raise FileError(reason if reason.startswith(str(path)) else f"{path}: {reason}") from error


def file_size(path: Path) -> int:
    """Return the size of a regular file in bytes, following links; for a folder, pipe or device raise a FileError."""
    with reading(path):
        try:
            status = path.stat()
        except FileNotFoundError:
            raise FileNotFoundError(f"{path}: no such file") from None
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"must be a file, got {_KINDS.get(stat.S_IFMT(status.st_mode), 'something else')}")
    return status.st_size


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Open a regular file for reading; errors in the `with` block are converted as by :func:`reading`."""
    file_size(path)
    with reading(path), open(path, "rb") as file:
        yield file


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with opened(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file."""
    if (size := file_size(path)) > MAX_JSON_BYTES:
        raise FileError(f"{path}: must have at most {MAX_JSON_BYTES} bytes, got {size}")
    with opened(path) as file:
        content = json.load(file)
        if not isinstance(content, dict):
            raise ValueError(f"must hold a JSON object, got {short_text(content)}")
    return content


@contextmanager
def write_atomically(path: Path, *, folder: bool = False, token: str | None = None) -> Iterator[Path]:
    """Yield the path of a draft to write, and rename the draft to `path` at the end.

    With `folder`, the draft is an empty folder; otherwise it is a file, which does not exist yet.

    If the process is killed before the rename, the old content of `path` stays. (A file system that cannot exchange
    folders needs two renames; if the process is killed between them, the old content stays inside
    `.<name>.draft-...`.) If an error ends the block, the draft is removed, to free its space on the disk. The next call
    for the same path removes the draft of a killed process. Processes that write to one path at the same time have
    separate drafts; the last to finish wins.
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
        # An OSError that caused this one has the reason: it is about a file inside the folder.
        cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
        raise OSError(f"{path}: could not be written: {cause.strerror or cause}") from cause


def write_whole(path: Path, content: bytes) -> None:
    """Replace the content of a file; if this process is killed meanwhile, the old content stays."""
    with write_atomically(path) as draft:
        draft.write_bytes(content)


def remove_drafts(parent: Path, name: str) -> None:
    """Remove the drafts of killed processes for the file or folder `name`, which may be a pattern."""
    for lock in parent.glob(f".{name}.draft-*.lock"):
        with suppress(OSError), open(lock, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails if the process is alive
            shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
            lock.unlink()


def draft_path(path: Path, token: str) -> Path:
    """Return the draft's path: `new` in a folder of its own; the lock file lies beside that folder."""
    return path.with_name(f".{path.name}.draft-{token}") / "new"


@contextmanager
def drafting(path: Path, token: str | None = None) -> Iterator[Path]:
    """Yield the path of a draft, hold its lock, and remove it at the end; calls with the same `token` take turns."""
    draft = draft_path(path, token or uuid.uuid4().hex[:8])
    has_lock = False
    path.parent.mkdir(parents=True, exist_ok=True)
    while not has_lock:  # lock again if the last holder has removed the lock file
        with open(f"{draft.parent}.lock", "ab") as lock:
            with suppress(OSError):  # a file system without locks, where drafts of killed processes stay
                fcntl.flock(lock, fcntl.LOCK_EX)
            if has_lock := os.fstat(lock.fileno()).st_nlink > 0:
                try:
                    draft.parent.mkdir(exist_ok=True)
                    yield draft
                finally:
                    shutil.rmtree(draft.parent, ignore_errors=True)
                    Path(lock.name).unlink(missing_ok=True)


def _replace(draft: Path, path: Path) -> None:
    """Rename a folder to `path` and replace the folder there, even if other processes do the same at once."""
    while not _exchange(draft, path):
        old = draft.with_name(f"old-{uuid.uuid4().hex[:8]}")
        try:
            with drafting(path, "turn"):  # `path` does not exist between the renames
                with suppress(FileNotFoundError):
                    os.rename(path, old)
                return os.rename(draft, path)
        except BaseException as error:
            with suppress(OSError):
                os.rename(old, path)
            if getattr(error, "errno", None) not in (errno.ENOTEMPTY, errno.EEXIST):  # another process was faster
                raise


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders atomically; return False if one is missing or the system cannot."""
    call = getattr(ctypes.CDLL(None), "renameat2", None)  # Linux: AT_FDCWD is -100, RENAME_EXCHANGE 2
    return call is not None and not call(-100, os.fsencode(one), -100, os.fsencode(other), 2)


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors to one file; shared memory is written once for each name.

    Failures raise an OSError. The default `metadata` is the one that transformers expects.
    """
    seen: set[int] = set()
    plain = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        begin = tensor.untyped_storage().data_ptr()
        plain[name] = tensor.clone() if begin in seen else tensor
        seen.add(begin)
    path.touch()
    mode = path.stat().st_mode  # the user's default; safetensors makes files that only their owner can read
    try:
        save_file(plain, path, metadata=metadata or {"format": "pt"})
    except SafetensorError as error:
        raise OSError(one_line(error)) from error
    path.chmod(mode)


def flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def one_line(error: BaseException) -> str:
    """Return at most 1,000 characters of the error's text, without line breaks and control characters."""
    text = " ".join(str(error).split())[:1000]
    return text if text.isprintable() else ascii(text)[1:-1]
