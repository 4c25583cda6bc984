"""`python -m bench`: run the benches and write bench/results/<date>-<device>.md, .json and plots.

Partial and quick runs have other file names, so they never overwrite a full one.
"""

import argparse
import datetime
import gc
import importlib
import sys
import time
from pathlib import Path

import megalodon_ops
import torch

from . import gpu, harness, machine, report, summary

BENCHES = "cema timestep_norm attention working_memory linear elementwise overhead".split()
BENCHES += "model small_weights encoder onnx stream waiting".split()


def main() -> int:
    options = _options()
    begin = time.monotonic()
    if options.device == "cuda":
        harness.hardware = gpu
        torch.set_default_device("cuda")
    elif not megalodon_ops.keep_freed_memory():
        print("no glibc: times include the clearing of new pages", file=sys.stderr)
    hardware = harness.hardware
    all_threads = torch.get_num_threads()
    threads = options.threads or ([all_threads] if options.quick else [1, all_threads])
    threads = sorted(set(threads), reverse=True) if options.device == "cpu" else [all_threads]
    effort = harness.Effort(samples=1, seconds=0.01, compiled=False, attempts=1) if options.quick else harness.Effort()
    limits = {count: hardware.measure_limits(count, options.quick) for count in threads}
    results, failures = [], []
    for bench in options.only:
        cases = importlib.import_module(f".bench_{bench}", __package__).cases(options.quick, options.device == "cuda")
        for case in cases:
            try:
                for result in harness.measure(bench, case, threads, effort):
                    results.append(result)
                    print(f"{time.monotonic() - begin:4.0f} s  {bench}: {report.summary(result)}", file=sys.stderr)
            except harness.Disagreement as error:
                failures.append(f"{bench}: {error}")
                print(f"FAILED  {failures[-1]}", file=sys.stderr)
            del case
            gc.collect()
            gc.freeze()  # survivors are mostly modules; later collections skip them
    limits = {count: limits[count].best(hardware.measure_limits(count, options.quick)) for count in threads}
    date = datetime.date.today().isoformat()
    part = [] if set(options.only) == set(BENCHES) else options.only
    stem = options.out / "-".join([date, hardware.NAME, *part, *(["quick"] if options.quick else [])])
    seconds = round(time.monotonic() - begin)
    run = report.Run(hardware.describe(), limits, hardware.NAME, date, seconds, options.quick)
    report.write(stem, results, failures, run)
    print(f"wrote {stem}.md", file=sys.stderr)
    if hardware is machine and not part and not options.quick:
        print(summary.text(Path(f"{stem}.md")))
    return 1 if failures else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=BENCHES, default=BENCHES, metavar="BENCH", help=", ".join(BENCHES))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cpu, or cuda: the current GPU")
    parser.add_argument(
        "--quick", action="store_true", help="test the benches: small shapes, one sample, no torch.compile"
    )
    parser.add_argument("--threads", nargs="+", type=int, metavar="N", help="default: 1 and all; with --quick all")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"), help="folder for the results")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
