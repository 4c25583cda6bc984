"""Runs of `train` by which its defaults were chosen, and their table.

    python -m bench.recipe                          # all runs; an interrupted call resumes
    python -m bench.recipe --only rates --jobs 4    # a part of them, four at a time

Each run is a process of one thread. Runs with equally many steps compare choices of equal cost; runs of equal duration,
on an idle machine, compare models whose steps differ in cost. Results go to bench/results/recipe.jsonl and .md;
docs/training.md draws the conclusions.

- **Flags** not shown have their defaults: `--optimizer muon --batch 64 --length 64 --dim 128 --layers 3`, and 8 times
  `--length` for `--context-length`.
- **Context**: sweeps from before its default was chosen read whole documents (`--context-length 1000000000`).
- **Text**: Python's standard library. `--data` names the other texts, of Debian's packages perl-doc and wordnet-base.
- **held out**: bits per byte of all held-out text, as `train` reports them at the end. **xz -9**: those of that
  compressor on the same text.
- **training, last twentieth**: mean bits per byte of the last twentieth of the steps.
"""

import argparse
import datetime
import glob
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megalodon_ops.training import read_metrics

from . import machine, records

BYTES = 1_638_400
"""Text of each run that is not timed, or a part or a multiple of it"""
WHOLE = 10**9
"""A context length longer than all documents"""


def _flags(
    rows: int = 64, length: int = 64, bytes_read: int = BYTES, context_length: int = WHOLE, **others: object
) -> str:
    flags = {
        "steps": bytes_read // (rows * length),
        "batch": rows,
        "length": length,
        **others,
        "context-length": context_length,
    }
    return " ".join(f"--{name} {value}" for name, value in flags.items())


GROUPS: dict[str, list[str]] = {
    "beside: the defaults with another rate, batch, width or number of steps, context length 512 or 256": [
        _flags(context_length=512, bytes_read=3 * BYTES, lr=0.02),
        *(_flags(context_length=512, lr=rate) for rate in (0.005, 0.02)),
        *(_flags(128, 32, context_length=length) for length in (256, 512)),
        *(_flags(context_length=512, dim=256, lr=rate, bytes_read=BYTES // 2) for rate in (0.0025, 0.005, 0.01)),
        _flags(context_length=512, bytes_read=2 * BYTES),
    ],
    "context: documents of more tokens are cut": [
        _flags(bytes_read=size, context_length=length)
        for size in (BYTES, 3 * BYTES)
        for length in (256, 512, 1024, 4096, WHOLE)
    ],
    "rows: the same number of bytes in batches of several shapes": [
        _flags(rows, length, lr=rate, optimizer=name)
        for name, rate in (("muon", 0.02), ("adamw", 0.01))
        for rows, length in ((16, 64), (16, 256), (64, 64), (128, 32))
    ],
    "rates: peak learning rates": [
        *(_flags(lr=rate) for rate in (0.005, 0.01, 0.02, 0.04)),
        *(_flags(lr=rate, optimizer="adamw") for rate in (0.005, 0.01, 0.02)),
    ],
    "widths: peak learning rates at other widths": [
        *(_flags(dim=64, lr=rate) for rate in (0.01, 0.02, 0.04)),
        *(_flags(dim=256, lr=rate, bytes_read=BYTES // 2) for rate in (0.005, 0.01, 0.02)),
        *(_flags(dim=512, lr=rate, bytes_read=BYTES // 2) for rate in (0.00125, 0.0025, 0.005)),
    ],
    "minutes: models and batches, ten minutes of one thread each": [
        f"--minutes 10 {flags}--context-length {WHOLE}"
        for flags in ("", "--batch 128 --length 32 ", "--dim 96 --layers 4 ", "--dim 192 --layers 4 ")
    ],
    "texts: the defaults on texts that were not used to choose them, ten minutes of one thread each": [
        f"--minutes 10 {flags}--data {files}"
        for flags in ("", f"--context-length {WHOLE} ")
        for files in ("/usr/share/perl/5.*/pod", "/usr/share/wordnet/data.*")
    ],
}
"""Flags of `train` by group; wildcards are expanded, as by a shell"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.recipe", description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="GROUP", help=", ".join(name.split(":")[0] for name in GROUPS))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each of one thread (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"))
    options = parser.parse_args()
    path = options.out / "recipe.jsonl"
    finished = {(record["group"], record["flags"]) for record in records.read(path)}
    chosen = [name for name in GROUPS if not options.only or name.split(":")[0] in options.only]
    runs = [(group, f"{flags} --seed {options.seed}") for group in chosen for flags in GROUPS[group]]

    def work(run: tuple[str, str]) -> None:
        group, flags = run
        record = {"group": group, "flags": flags, **train(flags)}
        records.append(path, record)
        print(record, flush=True)

    with ThreadPoolExecutor(options.jobs) as pool:
        for _ in pool.map(work, [run for run in runs if run not in finished]):
            records.write(path.with_suffix(".md"), "\n".join(page(records.read(path))) + "\n")


def train(flags: str) -> dict[str, Any]:
    """Run `train` with these flags and return its record."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        expanded = [path for flag in flags.split() for path in sorted(glob.glob(flag)) or [flag]]
        command = [sys.executable, "-m", "megalodon_ops", "train", "--out", f"{folder}/run", *expanded]
        process = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)}\n{process.stderr[-2000:]}")
        rows = read_metrics(Path(folder, "run", "metrics.jsonl"))
        record = json.loads(next(Path(folder, "run", "checkpoints").glob("*/training.json")).read_text())
    steps = [row for row in rows if "loss" in row]
    last = steps[-max(1, len(steps) // 20) :]
    return {
        "parameters": int(process.stdout.split(" parameters")[0].split()[-1].replace(",", "")),
        "learning rate": record["options"]["lr"],
        "held out": round(rows[-1]["held_out_bits_per_byte"], 4),
        "xz -9": round(rows[-1]["compressors"]["xz -9"], 4),
        "training, last twentieth": round(sum(row["bits_per_byte"] for row in last) / len(last), 4),
        "steps": steps[-1]["step"],
        "bytes": steps[-1]["tokens"],
        "seconds": round(time.monotonic() - begin),
        "processor": machine.describe()["processor"],
        "date": datetime.date.today().isoformat(),
    }


def page(results: list[dict[str, Any]]) -> list[str]:
    lines = ["# The recipe of `train`", "", __doc__.split("\n\n", 2)[2].strip(), ""]
    columns = ["parameters", "learning rate", "held out", "xz -9", "training, last twentieth", "steps", "bytes"]
    by_group: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        by_group.setdefault(result["group"], []).append(result)
    for group, members in by_group.items():
        shown = [name for name in columns if all(name in result for result in members)]
        lines += [
            f"## {group.capitalize()}",
            "",
            f"| flags | {' | '.join(shown)} |",
            "| --- |" + " ---: |" * len(shown),
        ]
        for result in members:
            cells = (f"{result[name]:,}" if isinstance(result[name], int) else f"{result[name]:g}" for name in shown)
            lines.append(f"| `{result['flags']}` | {' | '.join(cells)} |")
        lines.append("")
    machines = sorted({f"{result['processor']}, {result['date']}" for result in results})
    return [*lines, f"`python -m bench.recipe`; bits per byte; {'; '.join(machines)}."]


if __name__ == "__main__":
    main()
