"""`python -m bench.claims CLAIM`: make the runs of a claim; `--plan` estimates their time, `report` makes tables and plots.

An interrupted call resumes where it was; `--hours` stops a call. Results go to bench/claims/results/<claim>.jsonl, one run
a line.
"""

import argparse
import signal
from functools import partial
from pathlib import Path
from types import ModuleType

import torch

from . import ablation, context, encoder, forecast, gecko_loss, gecko_tasks, long_loss, loss, memory
from . import overview, report, speed, task_runs
from .runs import Session, duration, results

CLAIMS = {"loss": loss, "speed": speed, "context": context, "tasks": task_runs, "memory": memory}
CLAIMS |= {"ablation": ablation, "encoder": encoder}
OTHER_CLAIMS = {"long-loss": long_loss, "gecko-tasks": gecko_tasks, "gecko-loss": gecko_loss, "forecast": forecast}
"""Claims that are no part of `all`: their runs take a day, or need the packages of other forecasters"""


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    modules = CLAIMS | OTHER_CLAIMS
    if options.claim == "report":
        return _report(options, modules)
    names = [*CLAIMS] if options.claim == "all" else [options.claim]
    if options.hours:
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 3600 * options.hours)
    total = 0.0
    for name in names:
        session = Session(name, options.out, options.quick, options.plan, options.seed)
        try:
            modules[name].run(session, options.data)
        except KeyboardInterrupt:
            print(f"{name}: stopped; the same command resumes it")
            return 130
        if options.plan:
            left = sum(seconds for seconds, finished in session.planned_runs.values() if not finished)
            for run, (seconds, finished) in session.planned_runs.items() if options.claim != "all" else []:
                print(f"  {'done' if finished else duration(seconds):>8}  {run}")
            print(f"{name}: {len(session.planned_runs)} runs, {duration(left)} left on 2 quiet cores (estimated)")
            total += left
    if options.plan and len(names) > 1:
        print(f"all: {duration(total)}")
    return 0


def _report(options: argparse.Namespace, modules: dict[str, ModuleType]) -> int:
    paths = {name: Session(name, options.out, options.quick).path for name in modules}
    pages = {name: report.report(name, modules[name], path) for name, path in paths.items()}
    found = {name: page for name, page in pages.items() if page}
    if not found:
        raise SystemExit(f"--out {options.out}: holds no results")
    print(*found.values(), sep="\n")
    if found.keys() >= {*overview.SHOWN_CLAIMS}:
        shown = {name: [*results(paths[name]).values()] for name in overview.SHOWN_CLAIMS}
        report.draw(partial(overview.plot, shown), options.out / "overview.png")
    return 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.claims", description=__doc__.split("\n")[0])
    names = [*CLAIMS, *OTHER_CLAIMS, "all", "report"]
    parser.add_argument("claim", choices=names, metavar="CLAIM", help=", ".join(names))
    parser.add_argument("--plan", action="store_true", help="list the runs and their estimated times; run nothing")
    parser.add_argument("--quick", action="store_true", help="tiny runs in files of their own, to test the programs")
    parser.add_argument("--seed", type=int, default=0, help="first of the seeds (0)")
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="PATH",
        help="files and folders of text, absolute (the standard library; long text of Debian)",
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"), help="folder for the results")
    parser.add_argument("--hours", type=float, default=0, help="stop after this time; the same call resumes (0: never)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch's threads (%(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    return options


if __name__ == "__main__":
    raise SystemExit(main())
