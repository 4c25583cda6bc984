"""Bugs of the CUDA kernels that tests once missed: planted again, the test that was written for each notices it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from cuda_emulator.known_bugs import BUGS, planted
from cuda_emulator.mutate import SURVIVED, Session, Workshop

NUMBERS = {name: number for number, name in enumerate(BUGS, start=1)}
TESTS = Path(__file__).parent


def test_every_bug_can_be_planted():
    """The kernels still have the bugs' places, and the tests that notice are there."""
    assert planted(NUMBERS).keys() == {bug.file for bug in BUGS.values()}
    for bug in BUGS.values():
        assert bug.test[1].split("[")[0] in (TESTS / bug.test[0]).read_text()


@pytest.fixture(scope="module")
def session(tmp_path_factory) -> Iterator[Session]:
    texts = {Path("cuda") / file: text for file, text in planted(NUMBERS).items()}
    workshop = Workshop(tmp_path_factory.mktemp("known_bugs") / "copy", texts)
    session = Session(workshop, "session", {bug.test[0] for bug in BUGS.values()})
    yield session
    session.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", BUGS)
def test_a_known_bug_is_noticed(session, name):
    file, *words = BUGS[name].test
    tests = [
        (test, 600.0) for test in session.tests if test.startswith(f"tests/{file}") and all(w in test for w in words)
    ]
    assert tests
    assert session.run(0, tests)[0] == SURVIVED, "the tests fail without the bug"
    assert session.run(NUMBERS[name], tests)[0] != SURVIVED
