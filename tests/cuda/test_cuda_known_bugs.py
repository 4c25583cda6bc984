"""Planted bugs that tests once missed: the test written for each bug finds it."""

import pytest
from emulator.device import ROOT
from emulator.known_bugs import BUGS, with_known_bugs
from emulator.mutate import SURVIVED, Session, path_of


def node_of(test: str) -> str:
    """Pytest's node id of "test_file.py::test"."""
    file, _, rest = test.partition("::")
    return f"{path_of(file)}::{rest}"


def test_every_bug_can_be_planted():
    """The kernels still have the code to replace, and the tests exist."""
    for number, bug in enumerate(BUGS.values(), start=1):
        text = bug.path.read_text()
        assert text.count(bug.right) == 1 and f"(gpu_mutant == {number})" in with_known_bugs(bug.file, text), bug
        file, _, test = bug.test.partition("::")
        assert f"def {test.partition('[')[0]}(" in (ROOT / path_of(file)).read_text(), bug.test


@pytest.mark.slow
def test_every_known_bug_is_noticed(tmp_path):
    """All bugs are compiled in; each is turned on alone. Without a bug, the tests pass."""
    session = Session(ROOT, tmp_path / "session.txt", {bug.test.partition("::")[0] for bug in BUGS.values()})
    tests = {node_of(bug.test): 600.0 for bug in BUGS.values()}
    assert tests.keys() <= set(session.tests), tests.keys() - set(session.tests)
    verdicts = {
        name: session.run(number, [(node_of(bug.test), 600.0)])[0]
        for number, (name, bug) in enumerate(BUGS.items(), start=1)
    }
    without_a_bug, _ = session.run(0, list(tests.items()))
    session.close()
    missed = [name for name, verdict in verdicts.items() if verdict == SURVIVED]
    assert not missed, f"of {len(BUGS)} bugs these are not noticed: {missed}"
    assert without_a_bug == SURVIVED, "the tests fail without a bug"
