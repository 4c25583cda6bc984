"""Writes files that are complete or not there, and reads files that come from anywhere.

Only regular files are opened, only small, flat and unambiguous JSON is read. Every fault of a file that is read is a
ValueError of one line that begins with the file's path, or a FileNotFoundError.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import hashlib
import json
import math
import os
import re
import shutil
import stat
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from .. import extras
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


def file_facts(path: Path) -> dict[str, Any]:
    """Bytes and sha256 sum of a file."""
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def file_sha256(path: Path, read: Callable[[int], object] = lambda _: None) -> str:
    """The sha256 sum of a file; `read` is told how many bytes were read, block by block."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            read(len(block))
    return digest.hexdigest()


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


def write_whole(path: Path, content: bytes) -> None:
    """Replaces the content of a file; if this process is killed meanwhile, the old content stays."""
    try:
        with write_atomically(path) as draft:
            draft.write_bytes(content)
    except OSError as error:
        raise OSError(f"{path}: could not be written: {error.strerror or error}") from error


@contextmanager
def write_folder_atomically(folder: Path) -> Iterator[Path]:
    """Yields the path of an empty draft folder to fill with files, then flushes it and gives it the name `folder`.

    A folder that exists is exchanged for the draft in one step (renameat2 of Linux) and then removed. If the process is
    killed at any moment, `folder` is the old one or the new one, whole. Where the file system cannot exchange folders,
    the old one is first renamed to `.<name>.old`, and a process killed at that moment leaves it there. A draft that
    cannot be finished is removed; one whose process was killed is removed by the next call for the same folder.
    """
    folder = Path(os.path.realpath(folder))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_drafts(folder.parent, glob.escape(folder.name))
        draft = folder.with_name(f".{folder.name}.draft-{uuid.uuid4().hex[:8]}")
        draft.mkdir()
        handle = _lock(draft)
        try:
            yield draft
            for path in draft.iterdir():
                flush(path)
            flush(draft)
            _put(draft, folder)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        finally:
            os.close(handle)
        flush(folder.parent)
    except OSError as error:
        raise OSError(f"{folder}: could not be written: {error.strerror or error}") from error


def remove_drafts(parent: Path, name: str) -> None:
    """Removes the drafts that killed processes have left of the folder `name`, which may be a pattern."""
    for draft in parent.glob(f".{name}.draft-*"):
        if draft.is_dir():
            handle = _lock(draft, wanted=True)
            if handle is not None:
                shutil.rmtree(draft, ignore_errors=True)
                os.close(handle)


def _lock(folder: Path, wanted: bool = False) -> int | None:
    """A handle of the folder that holds the system's lock on it, where there are locks; None if it is held and `wanted`."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        if wanted:
            os.close(handle)
            return None
    return handle


def _put(draft: Path, folder: Path) -> None:
    """Gives the draft the name `folder`; what was there goes."""
    try:
        os.rename(draft, folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    else:
        return
    if _exchange(draft, folder):
        shutil.rmtree(draft)
        return
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    os.rename(folder, old)
    os.rename(draft, folder)
    shutil.rmtree(old)


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges two paths in one step; False where the system cannot do this."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    if renameat2(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    if (number := ctypes.get_errno()) in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number))


_HERE, _RENAME_EXCHANGE = -100, 2  # AT_FDCWD and a flag of renameat2(2)


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes the tensors to one file; a tensor that shares memory with others is written once for each name.

    What goes wrong is an OSError. Without `metadata`, the file's is what transformers wants to find.
    """
    save_file = extras.load("safetensors.torch", "train").save_file
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
    except extras.load("safetensors", "train").SafetensorError as error:
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
