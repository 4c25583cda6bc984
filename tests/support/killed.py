"""Simulation of a process that is killed while it writes files."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from megalodon_ops.storage import files

# Values of `count` that one test takes in turn. The writer makes fewer than ten calls of a function of `os`.
COUNTS = [pytest.param((0, 4), id=""), pytest.param((1, 2, 3, 5, 6, 7), id="others", marks=pytest.mark.slow)]


class _Killed(BaseException):
    pass


@contextmanager
def killed_at(monkeypatch: pytest.MonkeyPatch, call: str, count: int) -> Iterator[pytest.MonkeyPatch]:
    """Allow `count` calls of `os.<call>`; end the block at the next one, if there is one, without cleaning up."""
    real = getattr(os, call)
    calls = 0

    def die_at(*arguments):
        nonlocal calls
        calls += 1
        if calls > count:
            for module, name in ((files.shutil, "rmtree"), (os, "unlink")):  # a killed process removes nothing
                patch.setattr(module, name, lambda *a, **k: None)
            raise _Killed
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, die_at)
        with suppress(_Killed):
            yield patch
