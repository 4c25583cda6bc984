"""Pytest fixture of the emulated device, built once per session if a source has changed."""

import os
from collections.abc import Iterator
from types import ModuleType

import pytest

from emulator import reached
from emulator.device import Emulator, build, load


@pytest.fixture(scope="session")
def emulated_module() -> Iterator[ModuleType]:
    module = load(build())
    module.set_recording("MEGALODON_OPS_REACHED" in os.environ)
    yield module
    reached.write_record(module)


@pytest.fixture
def emulator(emulated_module: ModuleType) -> Iterator[Emulator]:
    """The emulated device with fresh counters, threads in random order."""
    emulator = Emulator(emulated_module)
    yield emulator
    emulator.reset()
