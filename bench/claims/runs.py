"""Runs of a claim, each with a result on the disk: what is finished is not run again, and what was cut off goes on.

OUT/<claim>.jsonl                   a run a line: settings, result, seconds, machine, versions, time
OUT/<claim>-unfinished/<run>.pt     how far a run has come; removed at its end
"""

from __future__ import annotations

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
    """The runs of one claim in a file; with `plan`, nothing is run and only the estimates are kept."""

    claim: str
    out: Path
    quick: bool = False
    plan: bool = False
    seed: int = 0
    planned: dict[str, tuple[float, bool]] = field(default_factory=dict)
    """Estimated seconds, and whether it is done, of every run that was asked for, by its name"""

    @property
    def path(self) -> Path:
        return self.out / f"{self.claim}{'-quick' if self.quick else ''}.jsonl"

    def seeds(self, count: int = 3) -> range:
        return range(self.seed, self.seed + count)

    def run(self, name: str, work: Work, seconds: float, **settings: Any) -> dict[str, Any] | None:
        """The result of `work(scratch, **settings)`; None where it was only planned.

        scratch: where the work may keep how far it has come. settings: JSON that decides the result.
        """
        settings = json.loads(json.dumps(settings))
        done = results(self.path).get(name)
        if done is not None and done["settings"] != settings:
            raise SystemExit(f"{self.path}: {name} is of other settings; remove its line, or name another --out")
        self.planned[name] = seconds, done is not None
        if done is not None or self.plan:
            return None if done is None else done["result"]
        scratch = self.path.with_name(f"{self.path.stem}-unfinished") / (re.sub(r"[^\w.=-]+", "_", name) + ".pt")
        scratch.parent.mkdir(parents=True, exist_ok=True)
        print(f"{self.claim}: {name}, about {duration(seconds)}", flush=True)
        load, begin = os.getloadavg()[0], time.monotonic()
        result = work(scratch, **settings)
        took = result.pop("seconds", None) or time.monotonic() - begin
        finished = {
            "claim": self.claim, "run": name, "settings": settings, "result": result,
            "seconds": round(took, 1), "estimated_seconds": round(seconds, 1),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "load_at_start": round(load, 2), "machine": facts(),
        }  # fmt: skip
        records.append(self.path, finished)
        scratch.unlink(missing_ok=True)
        print(f"{self.claim}: {name}, took {duration(took)}", flush=True)
        return result


def results(path: Path) -> dict[str, dict[str, Any]]:
    """The finished runs of a claim by their names and in their order; of two of one name, the later."""
    return {record["run"]: record for record in sorted(records.read(path), key=itemgetter("run"))}


def facts() -> dict[str, Any]:
    """The machine and the versions, as a result states them."""
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
