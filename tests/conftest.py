"""Distribution of tests over the workers of pytest-xdist. Fixtures of the workers: shared_fixtures.py."""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Iterator

import pytest

# Set before torch loads OpenMP: workers share the cores, and spinning threads would slow other workers.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Without it, torch refuses matrix products on a GPU under use_deterministic_algorithms. cuBLAS reads it once.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

LONG = (
    "test_distributed", "test_cuda_known_bugs", "test_cuda_sanitized", "test_readme", "test_hf_tools", "test_docs",
    "test_corrupt_checkpoints", "test_memory_limits", "test_fork",
)  # fmt: skip
"""Files that start first, because each keeps a worker busy for long"""


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """Load the fixtures in workers only: the controller runs no tests and need not import torch."""
    if not session.config.pluginmanager.hasplugin("dsession"):
        session.config.pluginmanager.import_plugin("shared_fixtures")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Collect tests without garbage collection, which takes a tenth of that time and frees nothing."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort tests: long files first, then files with many tests."""
    counts = Counter(item.path.name for item in items)
    items.sort(key=lambda i: (not i.path.name.startswith(LONG), -counts[i.path.name], i.path.name))
