"""`python -m bench.claims CLAIM`: the runs of a claim; `--plan` says how long they take, `report` makes tables and plots.

A call that was cut off goes on where it was, and `--hours` cuts it off. Results go to bench/claims/results/<claim>.jsonl, a
run a line.
"""

from __future__ import annotations

import argparse
import signal
from functools import partial
from pathlib import Path
from types import ModuleType

import torch

from . import (
    ablation, context, encoder, gecko_loss, gecko_tasks, long_loss, loss, memory, overview, report, speed, task_runs,
)  # fmt: skip
from .runs import Session, duration, results

CLAIMS = {
    "loss": loss, "speed": speed, "context": context, "tasks": task_runs, "memory": memory, "ablation": ablation,
    "encoder": encoder,
}  # fmt: skip
SECOND_ROUND = {"long-loss": long_loss, "gecko-tasks": gecko_tasks, "gecko-loss": gecko_loss}
"""Claims whose runs take a day, which `all` leaves out"""


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    modules = CLAIMS | SECOND_ROUND
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
            print(f"{name}: stopped; the same command goes on")
            return 130
        if options.plan:
            left = sum(seconds for seconds, done in session.planned.values() if not done)
            for run, (seconds, done) in session.planned.items() if options.claim != "all" else []:
                print(f"  {'done' if done else duration(seconds):>8}  {run}")
            print(f"{name}: {len(session.planned)} runs, {duration(left)} left on 2 quiet cores (estimated)")
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
    if found.keys() >= {*overview.DRAWN}:
        drawn = {name: [*results(paths[name]).values()] for name in overview.DRAWN}
        report.draw(partial(overview.plot, drawn), options.out / "overview.png")
    return 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.claims", description=__doc__.split("\n")[0])
    names = [*CLAIMS, *SECOND_ROUND, "all", "report"]
    parser.add_argument("claim", choices=names, metavar="CLAIM", help=", ".join(names))
    parser.add_argument("--plan", action="store_true", help="list the runs and their estimated times; run nothing")
    parser.add_argument("--quick", action="store_true", help="tiny runs in a folder of their own, to test the programs")
    parser.add_argument("--seed", type=int, default=0, help="the first of the seeds (0)")
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="PATH",
        help="files and folders of text, absolute (the standard library; long text of Debian)",
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"), help="folder of the results")
    parser.add_argument(
        "--hours", type=float, default=0, help="stop after so long, to go on by the same call (0: never)"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch (%(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    return options


if __name__ == "__main__":
    raise SystemExit(main())
