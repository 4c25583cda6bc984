"""Mutation tests of the kernels in cuda/: mutants that no test notices are written to survivors.tsv.

    python tests/cuda/emulator/mutate.py                 all kernels
    python tests/cuda/emulator/mutate.py --only cema     files with this prefix; rows of other files stay
    python tests/cuda/emulator/mutate.py --barriers      barriers, waits and commits; rows of other mutations stay
    python tests/cuda/emulator/mutate.py --list          print the mutants

All mutants are compiled at once, in a copy of the sources; a number chooses one at run time. Workers collect
the tests and fork for each mutant (mutant_session.py). A fork runs only tests that, without a mutant, reach its place
with values that it would change. Outcomes are saved in the scratch folder, so that a run can be resumed; after a change
of a kernel, of cuda/common or of the tests, a mutant runs again. The last column of survivors.tsv, why a mutant is
harmless, is written by hand.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
from emulator.lint import op_of
from emulator.mutants import Mutant, mutants, with_mutants

ROOT = Path(__file__).parents[3]
TABLE = Path(__file__).parent / "survivors.tsv"
SURVIVED = "survived"
KINDS = (
    "race, out of bounds, uninitialised read, read-only buffer, divergent barrier, deadlock, invalid operation, "
    "misaligned, copy in flight, copy never waited for, copy never committed, wrong memory, not device memory, "
    "wrong mma fragment, invalid launch"
).split(", ")
BARRIERS = r"sync|named_barrier|_wait|_commit"  # in Mutant.change
WRAPPER_TESTS = "test_cuda_instructions.py"  # tests of cuda/common
OP_TESTS = {  # tests of all ops
    "test_cuda_ops.py": [],
    "test_cuda_wrong_offsets.py": [],
    "test_ops.py": ["cuda-emulated"],
    "test_range.py": ["cuda-emulated"],
}


@dataclass
class Job:
    file: Path  # relative to ROOT
    mutant: Mutant
    nth: int  # among the file's mutants with the same text, by line
    key: str  # a hash of the kernels and of the tests

    def __str__(self) -> str:
        return f"{self.file}:{self.mutant.line} {self.mutant.change}"


def kernel_files(only: list[str]) -> list[Path]:
    """Files of cuda/ that have mutants, and whose names begin with a word of `only`, if it has any.

    Skips files of cuda/common with a branch for the emulator: they have their own tests.
    """
    branches = re.compile(r"GPU_EMULATED|cuda_runtime\.h")
    texts = {file: file.read_text() for file in sorted((ROOT / "cuda").rglob("*.cu*"))}
    portable = [file for file, text in texts.items() if not branches.search(text) and mutants(text)]
    return [file.relative_to(ROOT) for file in portable if not only or file.name.startswith(tuple(only))]


def test_files(file: Path) -> list[tuple[str, list[str]]]:
    """Test files for a kernel file, with words of test names: tests of the op, then tests of all ops."""
    op = op_of(file.stem)  # None: several ops use it
    tests = sorted((ROOT / "tests" / "cuda").rglob("test_cuda_*.py"))
    tested = {test.name: op_of(test.stem[len("test_cuda_") :]) for test in tests}
    wrappers = [(WRAPPER_TESTS, [])] if op is None else []
    own = [(name, []) for name, tested_op in tested.items() if tested_op and op in (None, tested_op)]
    shared = [(test, words if op is None else [*words, op]) for test, words in OP_TESTS.items()]
    return wrappers + own + shared


def path_of(test: str) -> Path:
    """Path of the test file with this name, relative to the checkout."""
    (path,) = (ROOT / "tests").rglob(test)
    return path.relative_to(ROOT)


def jobs_of(file: Path) -> list[Job]:
    names = [name for name, _ in test_files(file)]
    wanted = {*names, "cases.py", "strategies.py", "assertions.py", "emulated_attention.py"}
    tests = {path for path in (ROOT / "tests").rglob("*.py") if path.name in wanted}
    kernels = {f for f in (ROOT / "cuda").rglob("*.cu*") if op_of(f.stem) in (None, op_of(file.stem))}
    context = hashlib.sha256()
    for source in sorted(tests | kernels):
        if source.exists():
            context.update(source.read_bytes())
    prefix = f"{context.hexdigest()}\0{file}\0"
    return [Job(file, m, nth, hashlib.sha256((prefix + m.text).encode()).hexdigest()) for m, nth in numbered(file)]


def numbered(file: Path) -> list[tuple[Mutant, int]]:
    """Each mutant of a file, with its number among those with the same text."""
    found = mutants((ROOT / file).read_text())
    changes = [mutant.change for mutant in found]
    return [(mutant, changes[: i + 1].count(mutant.change)) for i, mutant in enumerate(found)]


class Workshop:
    """A copy of the sources with mutants, with its own build of the emulator."""

    def __init__(self, folder: Path, broken: dict[Path, str]) -> None:
        self.folder = folder
        sources, copies = (self._files(root) for root in (ROOT, folder))
        for file in copies - sources:
            (folder / file).unlink()
        for file in sources:  # unchanged files keep their time stamps and are not compiled again
            content = broken[file].encode() if file in broken else (ROOT / file).read_bytes()
            if file not in copies or (folder / file).read_bytes() != content:
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                (folder / file).write_bytes(content)
        shutil.copy(ROOT / "pyproject.toml", folder)

    def key(self) -> str:
        """A hash of all files in the workshop."""
        content = hashlib.sha256()
        for name in sorted(self._files(self.folder)):
            content.update(str(name).encode() + b"\0" + (self.folder / name).read_bytes())
        return content.hexdigest()

    @staticmethod
    def _files(root: Path) -> set[Path]:
        names = ("cuda", "cpp", "cmake", "tests", "bench/__init__.py", "bench/sass.py")
        found = (path for name in names for path in [root / name, *(root / name).rglob("*")])
        return {path.relative_to(root) for path in found if path.is_file() and "__pycache__" not in path.parts}


class Trace(NamedTuple):
    """Run of one test without a mutant."""

    seconds: float
    mattered: Collection[int]  # mutants that would have changed a value, not necessarily the result


class Session:
    """A process of mutant_session.py in a checkout or workshop; `tests` are those that it has collected."""

    def __init__(self, folder: Path, output: Path, files: set[str]) -> None:
        self.output = output
        path = [str(folder / "tests"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(os.path.abspath(entry) for entry in path if entry),
            "OMP_NUM_THREADS": "1",  # a fork has no threads
            "MEGALODON_OPS_REACHED": "",  # do not record iterations of mutants
        }
        command = [sys.executable, "tests/cuda/emulator/mutant_session.py", str(self.output.with_suffix(".log"))]
        command += [str(path_of(file)) for file in sorted(files)]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.process = subprocess.Popen(command, cwd=folder, env=environment, **pipes)
        self.tests: list[str] = self._answer()

    def _answer(self) -> Any:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(self.output.with_suffix(".log").read_text())
        return json.loads(line)

    def run(self, number: int, tests: list[tuple[str, float]]) -> tuple[str, dict[str, Trace]]:
        """Return the failure of the first failed test, or SURVIVED, and the trace of each test."""
        request = {"mutant": number, "tests": tests, "output": str(self.output)}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self._answer()
        output = self.output.read_text(errors="replace")
        traces = {test: Trace(*trace) for test, trace in answer["tests"].items()}
        return _cause(answer["code"], output) if answer["code"] else SURVIVED, traces

    def close(self) -> None:
        with self.process:  # closes the pipes and waits for the end
            pass


def _cause(code: int, output: str) -> str:
    if code == -signal.SIGPROF:
        return "never ends"
    if code < 0:
        return f"crash ({signal.Signals(-code).name})"
    test = re.search(r"^(?:FAILED|ERROR) \S+::(\w+)", output, re.MULTILINE)
    kind = re.search(rf"^E\s+(?:\S*Error: )?({'|'.join(KINDS)})(?:: | of )", output, re.MULTILINE)
    if code != 1 or test is None:
        raise RuntimeError(f"pytest ended with {code} and no failed test:\n{output[-4000:]}")
    return f"{kind[1] if kind else 'wrong result'}, `{test[1]}`"


class Row(NamedTuple):
    """A surviving mutant, the `nth` of those of the file with the same text."""

    file: str
    change: str
    nth: int
    why: str


HEADER = "file\tmutation\tnumber\twhy it survives"


def rows_of(text: str) -> list[Row]:
    """The rows of a table."""
    _, _, rows = text.partition(HEADER + "\n")
    cells = (line.split("\t") for line in rows.splitlines())
    return [Row(file, change, int(nth), why) for file, change, nth, why in cells]


def write_table(done: list[tuple[Job, str]]) -> None:
    """Write the survivors. Rows of mutants that were not run stay; rows of mutants that no longer exist are removed."""
    before = TABLE.read_text() if TABLE.exists() else ""
    known = {row[:3]: row.why for row in rows_of(before)}
    outcomes = {(job.file.name, job.mutant.change, job.nth): outcome for job, outcome in done}
    ran = {name: int(count) for name, count in re.findall(r"(\w+\.cuh?) (\d+)", before.partition(HEADER)[0])}
    survived = {key for key, outcome in outcomes.items() if outcome == SURVIVED}
    survived |= known.keys() - outcomes.keys()
    rows, counts = [], {}
    for file in sorted(kernel_files([]), key=lambda file: file.name):
        keys = [(file.name, mutant.change, nth) for mutant, nth in numbered(file)]
        rows += [Row(*key, known.get(key, "")) for key in keys if key in survived]
        now = sum(key in outcomes for key in keys)
        counts[file.name] = min(max(ran.get(file.name, 0), now), len(keys))  # of an earlier run, or of this one
    total = sum(counts.values())
    lines = [
        f"# {total} mutants were run: {total - len(rows)} killed, {len(rows)} alive.",
        "# By file: " + ", ".join(f"{name} {count}" for name, count in counts.items() if count),
        "# Not run: " + ", ".join(name for name, count in counts.items() if not count),
        HEADER,
        *("\t".join(map(str, row)) for row in rows),
    ]
    TABLE.write_text("\n".join(lines) + "\n")


def run(jobs: list[Job], scratch: Path, workers: int) -> list[tuple[Job, str]]:
    record = scratch / "outcomes.jsonl"
    scratch.mkdir(parents=True, exist_ok=True)
    done = dict(json.loads(line) for line in record.read_text().splitlines()) if record.exists() else {}
    left = [job for job in jobs if job.key not in done]
    left.sort(key=lambda job: not re.search(BARRIERS, job.mutant.change))  # memory errors first
    print(f"{len(jobs)} mutants, {len(jobs) - len(left)} of them run before", flush=True)
    if left:
        files = {name for job in left for name, _ in test_files(job.file)}
        workshop, numbers = workshop_of_all(scratch / "copy")
        sessions = [
            Session(workshop.folder, scratch / f"session{i}.txt", files) for i in range(min(workers, len(left)))
        ]
        traces = _baseline(sessions, left, workshop.key(), scratch)
        free: SimpleQueue[Session] = SimpleQueue()
        for session in sessions:
            free.put(session)

        def work(job: Job) -> None:
            session, start = free.get(), time.monotonic()
            try:
                number = numbers[job.file, job.mutant.text]
                tests = in_order(job.file, session.tests, traces)
                tests = [(test, limit) for test, limit in tests if number in traces[test].mattered]
                done[job.key], _ = session.run(number, tests)
            finally:
                free.put(session)
            with record.open("a") as file:
                file.write(json.dumps([job.key, done[job.key]]) + "\n")
            print(f"{job}: {done[job.key]} ({time.monotonic() - start:.0f} s, {len(tests)} tests)", flush=True)

        with ThreadPoolExecutor(len(sessions)) as pool:
            list(pool.map(work, left))
        for session in sessions:
            session.close()
    return [(job, done[job.key]) for job in jobs]


def workshop_of_all(folder: Path) -> tuple[Workshop, dict[tuple[Path, str], int]]:
    """A workshop with all mutants, and their numbers by file and text."""
    numbers, broken = {}, {}
    for i, file in enumerate(kernel_files([]), start=1):
        text = (ROOT / file).read_text()
        by_number = {1000 * i + j: mutant for j, mutant in enumerate(mutants(text))}  # up to 1000 in a file
        numbers |= {(file, mutant.text): number for number, mutant in by_number.items()}
        broken[file] = with_mutants(text, by_number.items())
    return Workshop(folder, broken), numbers


def _baseline(sessions: list[Session], jobs: list[Job], key: str, scratch: Path) -> dict[str, Trace]:
    """Traces of the tests without a mutant, all of which must pass."""
    record = scratch / "traces.json"
    known = json.loads(record.read_text()) if record.exists() else {}
    traces = {test: Trace(*trace) for test, trace in known.get(key, {}).items()}
    collected = sessions[0].tests
    files = {job.file for job in jobs}
    wanted = {test for file in files for test, _ in in_order(file, collected, {})}
    tests = [(test, 600.0) for test in collected if test in wanted and test not in traces]  # at most 600 s each

    def part(i: int) -> dict[str, Trace]:
        verdict, found = sessions[i].run(0, tests[i :: len(sessions)])
        if verdict != SURVIVED:
            raise SystemExit(f"the tests fail without a mutant: {verdict}; see {sessions[i].output}")
        return found

    with ThreadPoolExecutor(len(sessions)) as pool:
        for found in pool.map(part, range(len(sessions))):
            traces |= found
    record.write_text(json.dumps({key: traces}))
    return {test: Trace(trace.seconds, set(trace.mattered)) for test, trace in traces.items()}


def in_order(file: Path, collected: list[str], traces: dict[str, Trace]) -> list[tuple[str, float]]:
    """Tests of a kernel file with time limits, fastest first within each test file."""
    found: list[tuple[str, float]] = []
    for name, words in test_files(file):
        chosen = [test for test in collected if test.startswith(f"{path_of(name)}::") and all(w in test for w in words)]
        seconds = {test: traces[test].seconds if test in traces else 0.0 for test in chosen}
        found += [(test, 10 * seconds[test] + 10) for test in sorted(chosen, key=seconds.__getitem__)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--barriers", action="store_true")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--scratch", type=Path, default=Path("~/.cache/megalodon_ops/mutation").expanduser())
    arguments = parser.parse_args()
    jobs = [job for file in kernel_files(arguments.only) for job in jobs_of(file)]
    if arguments.barriers:
        jobs = [job for job in jobs if re.search(BARRIERS, job.mutant.change)]
    if arguments.list:
        print(*jobs, sep="\n")
        return
    start = time.monotonic()
    done = run(jobs, arguments.scratch, arguments.jobs)
    write_table(done)
    unexplained = [row for row in rows_of(TABLE.read_text()) if not row.why]
    print(f"{TABLE}: {len(unexplained)} survivors without an explanation, {time.monotonic() - start:.0f} s")
    sys.exit(bool(unexplained))


if __name__ == "__main__":
    main()
