"""One command at a time writes in a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

from megalodon_ops.cli.errors import CommandError

LOCK = ".lock"
"""The file in the folder that the system's lock is on; it stays there, and says nothing when nobody has the lock"""


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Holds the folder of --out, which is made if there is none, until the block or the process ends, however it ends."""
    try:
        made = not out.exists()
        out.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise CommandError(f"--out {out}: a file; name a folder") from error
    except OSError as error:
        raise CommandError(f"--out {out}: no such folder can be made: {error.strerror}") from error
    try:
        with filelock.FileLock(out / LOCK, timeout=0):
            yield
    except filelock.Timeout as error:
        raise CommandError(
            f"--out {out}: another command is writing there; wait for it, or name another folder"
        ) from error
    finally:
        if made and os.listdir(out) == [LOCK]:  # the command has not begun
            (out / LOCK).unlink()
            out.rmdir()
