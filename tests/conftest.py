"""How the tests are shared between the workers of pytest-xdist; what every worker begins with is in shared_fixtures.py."""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Iterator

import pytest

# Before torch loads OpenMP: tests run beside each other, and threads that spin would take the other tests' cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

LONG = (
    "test_distributed", "test_cuda_known_bugs", "test_cuda_sanitized", "test_readme", "test_hf_tools", "test_docs",
    "test_corrupt_checkpoints", "test_memory_limits", "test_fork",
)  # fmt: skip
"""Files that begin early, so that no worker is left alone with one"""


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """The process that hands the tests out runs none, and need not import torch."""
    if not session.config.pluginmanager.hasplugin("dsession"):
        session.config.pluginmanager.import_plugin("shared_fixtures")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """What is imported stays. To look for garbage in it takes a tenth of the time that the tests are read in."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, then those of many tests."""
    counts = Counter(item.path.name for item in items)
    items.sort(key=lambda i: (not i.path.name.startswith(LONG), -counts[i.path.name], i.path.name))
