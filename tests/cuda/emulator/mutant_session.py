"""A pytest process for mutate.py that collects the tests once and forks for each mutant.

Each line of input is a request, {"mutant": number, "tests": [[name, seconds], ...], "output": path}. A fork runs these
tests in this order on the mutant until one fails; the answer is {"code": exit status, "tests": {name: [seconds, numbers
of mutants that would have changed something]}}. A test that exceeds its seconds of processor time ends the fork. The
first answer lists all tests.
"""

import gc
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import pytest


class Session:
    """Pytest plugin that answers requests."""

    def __init__(self, requests: TextIO, answers: TextIO) -> None:
        self.requests, self.answers = requests, answers
        self.limits: dict[str, float] = {}  # seconds by test; only in a fork
        self.done: dict[str, tuple[float, list[int]]] = {}  # the answer's "tests"
        self.record = -1  # in a fork, the pipe for `done`
        self.module: Any = None

    def pytest_sessionstart(self) -> None:
        """Make hypothesis not shrink failing examples. Runs after conftest.py, before the tests are collected."""
        from hypothesis import Phase, settings

        settings.register_profile("mutants", parent=settings.default, phases=[Phase.explicit, Phase.generate])
        settings.load_profile("mutants")

    def _build(self) -> None:
        from emulator import fixtures
        from emulator.device import build, load

        library = build()
        self.module = load(library)
        fixtures.build, fixtures.load = lambda: library, lambda _: self.module

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        """Return True after the last request; None in a fork, where pytest continues."""
        tests = {item.nodeid: item for item in session.items}
        self._answer(list(tests))
        for line in self.requests:
            request = json.loads(line)
            if self.module is None:
                self._build()
                gc.collect()
                gc.freeze()  # so that garbage collection in a fork copies no objects
            read, self.record = os.pipe()
            sys.stdout.flush()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about forks with threads: there are no threads
                child = os.fork()
            if child == 0:
                self._become(request)
                session.items[:] = [tests[name] for name, _ in request["tests"]]
                return None
            os.close(self.record)
            with open(read) as pipe:
                text = pipe.read()
            _, status = os.waitpid(child, 0)
            self._answer({"code": os.waitstatus_to_exitcode(status), "tests": json.loads(text or "{}")})
        return True

    def _answer(self, content: Any) -> None:
        self.answers.write(json.dumps(content) + "\n")
        self.answers.flush()

    def _become(self, request: dict[str, Any]) -> None:
        output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for standard in (1, 2):
            os.dup2(output, standard)
        self.limits = dict(request["tests"])
        self.module.set_mutant(request["mutant"])

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Run a test; SIGPROF ends the process at the test's time limit."""
        start = time.process_time()
        self.module.mutants_that_matter()
        signal.setitimer(signal.ITIMER_PROF, self.limits[item.nodeid])
        result = yield
        signal.setitimer(signal.ITIMER_PROF, 0)
        self.done[item.nodeid] = time.process_time() - start, self.module.mutants_that_matter()
        return result

    def pytest_sessionfinish(self) -> None:
        if self.limits:
            with open(self.record, "w") as record:
                json.dump(self.done, record)


def main() -> None:
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    sys.path.insert(0, str(Path(__file__).parents[1]))
    log = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for standard in (1, 2):
        os.dup2(log, standard)
    # All tests, also slow ones.
    options = ["-n", "0", "-x", "-q", "--tb=short", "-p", "no:cacheprovider", "--capture=sys", "-m", ""]
    code = pytest.main([*options, *sys.argv[2:]], plugins=[Session(requests, answers)])
    sys.stdout.flush()
    os._exit(code)  # freeing all objects would copy them to a fork


if __name__ == "__main__":
    main()
