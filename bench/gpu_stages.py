"""The first day on a GPU: stages of tests and benches, each in processes of its own, and one report. See bench/gpu.sh.

A stage that fails does not stop the next ones. Standard library only: the packages come with the environment that the
second stage makes.
"""

import argparse
import datetime
import functools
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
SANITIZED = "results_are_on_the_device or every_kernel_of_a_narrow_type"
# Beginnings of the mangled names of our kernels: torch's kernels have reports of their own.
OUR_KERNELS = ("_ZN9megalodon", "_ZN3gpu")
CARD_QUERY = "name,driver_version,compute_cap,memory.total,memory.free,power.limit,clocks.max.sm"
LOAD_QUERY = "power.draw,clocks.sm,clocks.mem,temperature.gpu"
PYTEST = ("-m", "pytest", "-p", "no:cacheprovider", "-q", "--durations=5")


@dataclass
class Step:
    """A command of a stage."""

    name: str
    command: list[str]
    minutes: float  # then it is stopped
    variables: dict[str, str] = field(default_factory=dict)  # added to the environment
    tool: str = ""  # program that must be on the PATH
    faults: str = ""  # the step also fails if a line of its output matches this pattern


@dataclass
class Outcome:
    step: str
    status: str  # "passed", or why not
    minutes: float
    load: dict[str, str]  # power and clocks meanwhile
    last_lines: list[str]


def stages(python: str, folder: Path, here: bool) -> dict[str, list[Step]]:
    """All stages in their order, with `python` of the environment and results in `folder`."""
    install = [python, "-m", "pip", "install", "--quiet"]
    build = ["-C", "cmake.define.MEGALODON_OPS_CUDA=ON", "-C", "cmake.define.MEGALODON_OPS_ARCHITECTURES=AUTO"]
    if here:  # needs no network
        made = [Step("build", [*install, "--no-build-isolation", "--no-deps", "--force-reinstall", *build, "."], 30)]
    else:
        made = [
            Step("venv", [sys.executable, "-m", "venv", str(Path(python).parents[1])], 5),
            Step("build", [*install, *build, ".[test]"], 60),
        ]
    one_process = [python, *PYTEST, "-n", "0"]
    backends = [*one_process, "tests/ops", "-m", "", "-k", "cuda and not emulated"]
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    bench = [python, "-m", "bench", "--device", "cuda", "--out", str(folder)]
    # One worker: a fault loses the context of its process, and the next worker goes on.
    smoke = [python, *PYTEST, "-n", "1", "tests/cuda/test_cuda_smoke.py", "-k", "real_sizes"]
    checked = [*one_process, "tests/cuda/test_cuda.py", "-k", SANITIZED]
    sanitizers = [sanitizer(tool, checked, uncached) for tool in SANITIZERS]
    floors = [python, "-m", "bench.predict", "--measure", "--json", str(folder / "floors.json")]
    ops = "cema timestep_norm attention linear elementwise overhead stream".split()
    return {
        "environment": [*made, Step("info", [python, "-m", "megalodon_ops", "info"], 2)],
        "smoke": [Step("smoke", smoke, 15, {"MEGALODON_OPS_SMOKE": str(folder / "smoke.jsonl")})],
        "kernels": [
            Step("test_cuda", [*one_process, "tests/cuda/test_cuda.py"], 30),
            Step("decoder", [*one_process, "tests/cuda/test_cuda_decoder.py"], 10),
            Step("backends", backends, 60),
        ],
        "sanitizers": sanitizers,
        "suite": [Step("default", [python, *PYTEST], 60), Step("slow", [python, *PYTEST, "-m", "slow"], 180)],
        "benches": [Step("floors", floors, 20), Step("ops", [*bench, "--only", *ops], 60)],
        "model": [Step("mega200M", [*bench, "--only", "model"], 60)],
    }


def sanitizer(tool: str, command: list[str], variables: dict[str, str]) -> Step:
    """A run of `command` under a tool of compute-sanitizer, which checks our kernels alone.

    initcheck runs on all kernels, as it must see what torch's kernels write for ours; only its reports on ours count.
    """
    start = ["compute-sanitizer", "--tool", tool]
    if tool == "initcheck":
        start += ["--demangle", "no", "--print-limit", "0"]
        faults = rf"^=+\s+at .*({'|'.join(OUR_KERNELS)})"
    else:
        start += ["--error-exitcode", "1", "--report-api-errors", "no"]  # a launch that fails raises an exception
        start += [word for name in OUR_KERNELS for word in (_name_option(), f"kns={name}")]
        faults = ""
    return Step(tool, [*start, *command], 60, variables, tool=start[0], faults=faults)


@functools.cache
def _name_option() -> str:
    """compute-sanitizer's filter by names, which CUDA 12.3 renamed."""
    path = shutil.which("compute-sanitizer")
    listed = subprocess.run([path, "--help"], capture_output=True, text=True, check=False).stdout if path else ""
    return "--kernel-regex" if "--kernel-regex" in listed else "--kernel-name"


def query(fields: str) -> list[str] | None:
    """nvidia-smi's values for GPU 0, or None without it."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0"]
    try:
        line = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return [value.strip() for value in line.strip().split(",")]


def preflight() -> tuple[dict[str, str], list[str]]:
    """Facts about the machine, and what is missing."""
    facts = {"Python": platform.python_version(), "system": platform.platform()}
    problems = []
    card = query(CARD_QUERY)
    if card:
        facts |= dict(zip(("card", "driver", "compute capability", "memory", "free", "power limit", "clock"), card))
    else:
        problems.append("nvidia-smi shows no GPU: install the driver, or run where there is one")
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if nvcc:
        version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout.split("\n")
        facts["nvcc"] = next((line.strip() for line in version if "release" in line), nvcc)
    else:
        problems.append("nvcc was not found: put it on the PATH or in CUDACXX")
    if not shutil.which("compute-sanitizer"):
        problems.append("compute-sanitizer was not found: it comes with the CUDA toolkit")
    facts["disk"] = f"{shutil.disk_usage(ROOT).free >> 30} GiB free"
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    facts["commit"] = commit.stdout.strip() or "not a checkout"
    return facts, problems


@contextmanager
def sampled_load(into: dict[str, str], seconds: float = 1.0) -> Iterator[None]:
    """Sample power, clocks and temperature in a thread; `into` gets minimum, maximum and median of each."""
    names = LOAD_QUERY.split(",")
    samples: list[list[str]] = []
    done = threading.Event()

    def sample() -> None:
        while not done.wait(seconds):
            if values := query(LOAD_QUERY):
                samples.append(values)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        for i, name in enumerate(names):
            values = [float(row[i].split()[0]) for row in samples if row[i][:1].isdigit()]
            if values:
                into[name] = f"{min(values):g} to {max(values):g}, median {statistics.median(values):g}"


def run_step(stage: str, step: Step, folder: Path) -> Outcome:
    """Run a step with its output in a file of its own. A step that fails raises nothing: its outcome says so."""
    log = folder / f"{stage}-{step.name}.log"
    load: dict[str, str] = {}
    begin = time.monotonic()
    if step.tool and not shutil.which(step.tool):
        return Outcome(step.name, f"not run: {step.tool} was not found", 0, load, [])
    with log.open("w") as output, sampled_load(load):
        print(" ".join(step.command), file=output, flush=True)
        try:
            variables = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"} | step.variables
            streams = dict(stdout=output, stderr=subprocess.STDOUT, timeout=60 * step.minutes)
            process = subprocess.run(step.command, cwd=ROOT, env=variables, check=False, **streams)
            status = "passed" if process.returncode == 0 else f"failed (exit status {process.returncode})"
            if step.faults and (count := len(re.findall(step.faults, log.read_text(errors="replace"), re.MULTILINE))):
                status = f"failed ({count} reports on our kernels)"
        except subprocess.TimeoutExpired:
            status = f"stopped after {step.minutes:g} minutes"
        except OSError as error:
            status = f"failed ({error})"
    lines = log.read_text(errors="replace").splitlines()[1:]
    return Outcome(step.name, status, (time.monotonic() - begin) / 60, load, lines[-3:])


def kernels_of_the_source() -> list[str]:
    sources = (path.read_text() for path in (ROOT / "cuda").rglob("*.cu*"))
    return sorted({name for text in sources for name in re.findall(r"__global__[^;{]*?\b(\w+_kernel)\(", text)})


def kernel_rows(record: Path) -> list[tuple[str, ...]]:
    """Kernels by the smoke test's record: cases that passed and failed, and the first error."""
    rows = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    table = []
    for kernel in kernels_of_the_source() if rows else []:  # no record: no table
        own = [row for row in rows if kernel in row["kernels"]]
        if not own:
            table.append((kernel, "not launched", "", "", ""))
            continue
        failed = [row for row in own if row["error"]]
        types = sorted({row["dtype"].removeprefix("torch.") for row in own})
        first = f"{failed[0]['case']}, {failed[0]['dtype']}: {failed[0]['error']}" if failed else ""
        verdict = "FAIL" if failed else "pass"
        table.append((kernel, verdict, f"{len(own) - len(failed)} of {len(own)}", ", ".join(types), first))
    unseen = [row for row in rows if row["error"] and not row["kernels"]]
    return table + [("(before a launch)", "FAIL", "", row["dtype"], f"{row['case']}: {row['error']}") for row in unseen]


def time_rows(record: Path) -> list[tuple[str, ...]]:
    """Times of `bench.predict --measure --json`: our kernels' and the library's beside the floor."""
    return [tuple(map(str, row)) for row in json.loads(record.read_text())] if record.exists() else []


def markdown(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    cells = [head, ("---",) * len(head), *(tuple(cell.replace("|", "/") for cell in row) for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def report(folder: Path, facts: dict[str, str], problems: list[str], outcomes: dict[str, list[Outcome]]) -> str:
    """The report's text."""
    all_steps = [(stage, outcome) for stage, steps in outcomes.items() for outcome in steps]
    failed = [f"{stage}: {o.step} {o.status}" for stage, o in all_steps if o.status != "passed"]
    kernels = kernel_rows(folder / "smoke.jsonl")
    info = folder / "environment-info.log"
    versions = "\n".join(info.read_text(errors="replace").splitlines()[1:]) if info.exists() else "not built"
    verdict = "\n".join(f"- {line}" for line in [*problems, *failed]) or "Everything passed."
    steps = [(stage, o.step, o.status, f"{o.minutes:.1f}", "; ".join(o.last_lines[-1:])) for stage, o in all_steps]
    loads = [(stage, o.step, name, value) for stage, o in all_steps for name, value in o.load.items()]
    head = ("shape", "path", "floor", "kernels", "library", "library, predicted")
    times = markdown(head, time_rows(folder / "floors.json"))
    parts = [
        f"# {facts.get('card', 'No GPU')}, {datetime.date.today()}",
        f"## Verdict\n\n{verdict}",
        "## Machine\n\n" + "\n".join(f"- {name}: {value}" for name, value in facts.items()),
        f"```\n{versions}\n```",
        "## Kernels, by the smoke test\n\n" + markdown(("kernel", "result", "cases", "types", "first error"), kernels),
        f"## Times\n\nMicroseconds. A floor is computed from the machine code; see bench/README.md.\n\n{times}",
        "## Stages\n\n" + markdown(("stage", "step", "result", "minutes", "last line"), steps),
        "## Power and clocks (W, MHz, MHz, degrees C)\n\n" + markdown(("stage", "step", "what", "values"), loads),
        f"## What to send back\n\n`{folder.name}.tar.gz`: this report, the logs of all steps, and the benches' tables.",
    ]
    return "\n\n".join(parts) + "\n"


def run(
    folder: Path, chosen: list[str], steps_of: dict[str, list[Step]], check: Callable[[], tuple[dict, list]] = preflight
) -> int:
    """Run the chosen stages, write the report after each of them, and pack the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    facts, problems = check()
    outcomes: dict[str, list[Outcome]] = {}
    for problem in problems:
        print(f"preflight: {problem}", flush=True)
    for stage in chosen:
        outcomes[stage] = []
        for step in steps_of[stage]:
            print(f"{datetime.datetime.now():%H:%M} {stage}: {step.name}", flush=True)
            outcomes[stage].append(run_step(stage, step, folder))
            print(f"      {outcomes[stage][-1].status}", flush=True)
            (folder / "report.md").write_text(report(folder, facts, problems, outcomes))
    with tarfile.open(folder.with_name(f"{folder.name}.tar.gz"), "w:gz") as archive:
        archive.add(folder, folder.name)
    print(f"Report: {folder / 'report.md'}; send back {folder}.tar.gz")
    return int(bool(problems) or any(o.status != "passed" for steps in outcomes.values() for o in steps))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench/gpu.sh", description=__doc__)
    names = list(stages("python", Path(), True))
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="STAGE", help=", ".join(names))
    parser.add_argument("--out", type=Path, help="folder of the report; default: bench/results/gpu-<date>")
    parser.add_argument("--environment", type=Path, default=ROOT / "build" / "gpu", help="virtual environment to make")
    parser.add_argument("--here", action="store_true", help="use this Python and its packages; needs no network")
    options = parser.parse_args(arguments)
    folder = (options.out or ROOT / "bench" / "results" / f"gpu-{datetime.date.today()}").resolve()
    python = sys.executable if options.here else str(options.environment.resolve() / "bin" / "python")
    return run(folder, options.only, stages(python, folder, options.here))


if __name__ == "__main__":
    raise SystemExit(main())
