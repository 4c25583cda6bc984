"""Folders of the checkout that tests read."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
DATA = TESTS / "data"
DOCS = ROOT / "docs"
TEST_PATH = f"{TESTS / 'support'}:{TESTS / 'ops'}:{TESTS / 'cuda'}:{ROOT}"
"""PYTHONPATH of a process that imports test helpers"""


def test_file(name: str) -> Path:
    """Path of the test file with this name, which is unique."""
    (path,) = TESTS.rglob(name)
    return path
