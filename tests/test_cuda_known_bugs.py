"""Bugs of the CUDA kernels that tests once missed: planted again, the test that was written for each notices it."""

from __future__ import annotations

from pathlib import Path

import pytest
from cuda_emulator.known_bugs import BUGS, Bug, planted
from cuda_emulator.mutate import SURVIVED, Session, Workshop

NUMBERS = {name: number for number, name in enumerate(BUGS, start=1)}
TESTS = Path(__file__).parent


def test_every_bug_can_be_planted():
    """The kernels still have the bugs' places, and the tests that notice are there."""
    assert planted(NUMBERS).keys() == {bug.file for bug in BUGS.values()}
    for bug in BUGS.values():
        assert bug.test[1].split("[")[0] in (TESTS / bug.test[0]).read_text()


def chosen_for(bug: Bug, collected: list[str]) -> list[str]:
    file, *words = bug.test
    return [test for test in collected if test.startswith(f"tests/{file}") and all(word in test for word in words)]


@pytest.mark.slow
def test_every_known_bug_is_noticed(tmp_path):
    """All bugs are compiled at once; without a bug the tests pass."""
    texts = {Path("cuda") / file: text for file, text in planted(NUMBERS).items()}
    files = {bug.test[0] for bug in BUGS.values()}
    session = Session(Workshop(tmp_path / "copy", texts), "session", files)
    tests = {name: chosen_for(bug, session.tests) for name, bug in BUGS.items()}
    assert all(tests.values()), tests
    verdict, traces = session.run(0, [(test, 600.0) for test in sorted(set().union(*tests.values()))])
    assert verdict == SURVIVED, "the tests fail without a bug"
    verdicts = {}
    for name, number in NUMBERS.items():
        quick_first = sorted(tests[name], key=lambda test: traces[test].seconds)
        verdicts[name] = session.run(number, [(test, 600.0) for test in quick_first])[0]
    session.close()
    missed = [name for name, verdict in verdicts.items() if verdict == SURVIVED]
    assert not missed, f"of {len(BUGS)} bugs these are not noticed: {missed}"
