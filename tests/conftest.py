"""Distribution of tests over the workers of pytest-xdist. Fixtures of the workers: shared_fixtures.py."""

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

LONG = "distributed cuda_known_bugs cuda_sanitized readme hf_tools docs corrupt_checkpoints memory_limits fork"
"""Beginnings of the names of files that start first, because each keeps a worker busy for long"""


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
    long = tuple(f"test_{name}" for name in LONG.split())
    items.sort(key=lambda i: (not i.path.name.startswith(long), -counts[i.path.name], i.path.name))
