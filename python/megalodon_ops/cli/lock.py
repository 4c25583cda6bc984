"""One run at a time in a folder."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

from megalodon_ops.cli.errors import CommandError


class Lock:
    """Holds a run's folder, which it makes if there is none, until the block or the process ends, however it ends.

    The file `lock` says who holds the folder. What counts is the system's lock on that file, which ends with its
    process, so the file of a process that was killed keeps nobody out.
    """

    def __init__(self, folder: Path):
        self.folder, self.file = folder, folder / "lock"

    def __enter__(self) -> Lock:
        self.made = not self.folder.exists()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise CommandError(f"--out {self.folder}: a file; name a folder") from error
        except OSError as error:
            raise CommandError(f"--out {self.folder}: no such folder can be made: {error.strerror}") from error
        while True:
            self.handle = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                holder = os.read(self.handle, 200).decode(errors="replace").strip() or "which has just begun"
                os.close(self.handle)
                raise CommandError(
                    f"--out {self.folder}: another run is writing there, {holder}; wait for it, or name another folder"
                ) from error
            except OSError as error:
                raise CommandError(f"{self.file}: could not be locked: {error.strerror}") from error
            if self._is_the_file():
                break
            os.close(self.handle)  # its holder has removed the file meanwhile
        os.ftruncate(self.handle, 0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        os.write(self.handle, f"process {os.getpid()} on {socket.gethostname()} since {since}\n".encode())
        return self

    def __exit__(self, *error: object) -> None:
        self.file.unlink(missing_ok=True)
        if self.made:
            with suppress(OSError):  # the run has left something in the folder
                self.folder.rmdir()
        os.close(self.handle)

    def _is_the_file(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self.handle), os.stat(self.file))
        except FileNotFoundError:
            return False
