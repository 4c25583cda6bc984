"""A lock that lets one command at a time write in a folder."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

from megalodon_ops.cli.errors import CommandError

LOCK = ".lock"
"""The locked file in the folder; it stays there unlocked"""


@contextmanager
def folder_lock(out: Path) -> Iterator[None]:
    """Lock the folder of --out, created if missing, until the block or the process ends."""
    try:
        is_new = not out.exists()
        out.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise CommandError(f"--out {out}: a file; name a folder") from error
    except OSError as error:
        raise CommandError(f"--out {out}: cannot create the folder: {error.strerror}") from error
    try:
        with filelock.FileLock(out / LOCK, timeout=0):
            yield
    except filelock.Timeout as error:
        raise CommandError(f"--out {out}: another command is using it; wait for it, or name another folder") from error
    finally:
        if is_new and os.listdir(out) == [LOCK]:  # the command has written nothing
            (out / LOCK).unlink()
            out.rmdir()
