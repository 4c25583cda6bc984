"""Fixtures of the op tests: which backend runs them, and memory that is poisoned before a kernel writes it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from megalodon_ops import _C

pytest_plugins = ["cuda_emulator.fixtures"]

# The same examples in every run; HYPOTHESIS_PROFILE=explore draws new ones, and more.
settings.register_profile("default", max_examples=15, deadline=None, derandomize=True)
settings.register_profile(
    "explore", max_examples=300, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

DEFAULT_ISA = _C.active_isa()


@pytest.fixture(scope="session", params=_C.available_isas())
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test on every instruction set of this machine. Tests that do not ask for it run on the best one."""
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(DEFAULT_ISA)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN (or the largest integer), so that an element which no kernel writes shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Two threads, even where torch would take another number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)
