"""Runs of a claim, with results on disk: finished runs are not repeated, interrupted runs resume.

OUT/<claim>.jsonl                   one run a line: settings, result, seconds, machine, versions, time
OUT/<claim>-unfinished/<run>.pt     progress of a run; removed at its end
"""

import datetime
import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

import megalodon_ops as mo
from bench import machine, records

Work = Callable[..., dict[str, Any]]


@dataclass
class Session:
    """Runs of one claim in a file; with `plan`, nothing is run, only estimated."""

    claim: str
    out: Path
    quick: bool = False
    plan: bool = False
    seed: int = 0
    planned_runs: dict[str, tuple[float, bool]] = field(default_factory=dict)
    """Estimated seconds of each requested run, and True if it is finished, by name"""

    @property
    def path(self) -> Path:
        return self.out / f"{self.claim}{'-quick' if self.quick else ''}.jsonl"

    def seeds(self, count: int = 3) -> range:
        return range(self.seed, self.seed + count)

    def run(self, name: str, work: Work, seconds: float, **settings: Any) -> dict[str, Any] | None:
        """Return the result of `work(scratch, **settings)`; None if it was only planned.

        scratch: file for the work's progress. settings: JSON that determines the result.
        """
        settings = json.loads(json.dumps(settings))
        record = results(self.path).get(name)
        if record is not None and record["settings"] != settings:
            raise SystemExit(f"{self.path}: {name} has other settings; remove its line, or choose another --out")
        self.planned_runs[name] = seconds, record is not None
        if record is not None or self.plan:
            return None if record is None else record["result"]
        scratch = self.path.with_name(f"{self.path.stem}-unfinished") / (re.sub(r"[^\w.=-]+", "_", name) + ".pt")
        scratch.parent.mkdir(parents=True, exist_ok=True)
        print(f"{self.claim}: {name}, about {duration(seconds)}", flush=True)
        load, _, _ = os.getloadavg()
        begin = time.monotonic()
        result = work(scratch, **settings)
        took = result.pop("seconds", None) or time.monotonic() - begin
        date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        record = dict(claim=self.claim, run=name, settings=settings, result=result, seconds=round(took, 1))
        record |= dict(estimated_seconds=round(seconds, 1), date=date, load_at_start=round(load, 2), machine=facts())
        records.append(self.path, record)
        scratch.unlink(missing_ok=True)
        print(f"{self.claim}: {name}, took {duration(took)}", flush=True)
        return result


def results(path: Path) -> dict[str, dict[str, Any]]:
    """Finished runs of a claim by name, sorted by name; of two with one name, the later."""
    return {record["run"]: record for record in sorted(records.read(path), key=itemgetter("run"))}


def facts() -> dict[str, Any]:
    """Machine and versions, as recorded with a result."""
    import transformers

    described = machine.describe()
    return {
        **{name: described[name] for name in ("processor", "cores", "kernels in use", "torch", "python", "system")},
        "threads": torch.get_num_threads(),
        "megalodon_ops": mo._C.build_info()["version"],
        "transformers": transformers.__version__,
    }


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
