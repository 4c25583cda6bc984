"""Folders and files of the checkout that tests read."""

import importlib.util
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
DATA = TESTS / "data"
DOCS = ROOT / "docs"
TEST_PATH = f"{TESTS / 'support'}:{TESTS / 'ops'}:{TESTS / 'cuda'}:{ROOT}"
"""PYTHONPATH of a process that imports test helpers"""


def load_module(path: Path, name: str | None = None) -> ModuleType:
    """Import a file as a module; `name` is the one in the source of a compiled module."""
    spec = importlib.util.spec_from_file_location(name or path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_file(name: str) -> Path:
    """Path of the test file with this name, which is unique."""
    (path,) = TESTS.rglob(name)
    return path
