"""Write results as JSON, as tables in Markdown, and as a plot for each bench."""

import dataclasses
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from .harness import OURS, Result, Timing
from .machine import Limits
from .plots import BLUE, GREY, ORANGE, plain_ticks

_HEAD = """# {title}

{machine}

Limits of this machine, measured before and after the benches (the better value), by number of threads:

{limits}

How to read the tables: [README](../README.md). Times are medians of interleaved samples; ± is half the distance from
the first to the third quartile, in percent of the median; n is the number of samples; * is a single call. The run
took {minutes:.0f} minutes.{quick}
"""

_LIMIT_NAMES = {
    "fma_fp32": "fp32 multiply-add, GFLOP/s",
    "gemm_fp32": "torch fp32 matrix product, GFLOP/s",
    "gemm_fp32_onednn": "oneDNN fp32 matrix product, GFLOP/s",
    "gemm_bf16": "torch bf16 matrix product, GFLOP/s",
    "copy": "copy, GB/s read and written",
    "read": "read, GB/s",
    "first_touch": "writing fresh memory, GB/s",
}


@dataclasses.dataclass(frozen=True)
class Run:
    """A run of the benches."""

    machine: dict[str, str]
    """facts, by name"""
    limits: dict[int, Limits]
    """of the machine, by number of threads"""
    device: str
    date: str
    seconds: int
    quick: bool


def write(stem: Path, results: Sequence[Result], failures: Sequence[str], run: Run) -> None:
    """Write `stem`.json, `stem`.md and the plots `stem`-<bench>.png."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    limits = run.limits
    record = dataclasses.asdict(run) | dict(failures=list(failures), results=[*map(dataclasses.asdict, results)])
    stem.with_name(stem.name + ".json").write_text(json.dumps(record, indent=1) + "\n")
    quick_note = "\n\nSmall shapes and few samples: a test of the benches, not a measurement." if run.quick else ""
    rows = [[name, *(_number(getattr(limits[t], key)) for t in limits)] for key, name in _LIMIT_NAMES.items()]
    parts = [
        _HEAD.format(
            title=_title(run.machine, [result.bench for result in results], run.date),
            machine="\n".join(f"- {key}: {value}" for key, value in run.machine.items()),
            limits=_table(["", *(_threads(t) for t in limits)], rows),
            minutes=run.seconds / 60,
            quick=quick_note,
        )
    ]
    if failures:
        parts.append("## Failed\n\n" + "\n".join(f"- {failure}" for failure in failures) + "\n")
    for bench in dict.fromkeys(result.bench for result in results):
        bench_results = [result for result in results if result.bench == bench]
        plot(bench_results, stem.with_name(f"{stem.name}-{bench}.png"))
        tables = f"{ours_table(bench_results, limits)}\n\nEvery path, all threads:\n\n{paths_table(bench_results)}"
        parts.append(f"## {bench}\n\n{tables}\n")
    stem.with_name(stem.name + ".md").write_text("\n".join(parts))


def _title(machine: dict[str, str], benches: Iterable[str], date: str) -> str:
    """Title of a page: processor or card, benches and date."""
    if "card" in machine:
        device = machine["card"].partition(",")[0]
    else:
        device = f"{machine['processor']}, {machine['cores']} cores"
    names = list(dict.fromkeys(benches))
    return f"{device}: times of {' and '.join(names) if len(names) < 3 else 'all ops and of models'}, {date}"


def ours_table(results: Iterable[Result], limits: dict[int, Limits]) -> str:
    """Our speed, compared with the machine's limits and with the best path in plain torch."""
    rows = []
    for r in results:
        limit, best = limits[r.threads], r.best_rival
        gemm = limit.gemm_bf16 if r.dtype == "bf16" else limit.gemm_fp32
        for state, samples in (("warm", r.ours.warm), ("cold", r.ours.cold)):
            if not samples:
                continue
            seconds = statistics.median(samples)
            flops, gigabytes = (None if work is None else work / seconds / 1e9 for work in (r.flops, r.bytes))
            rival = best and statistics.median(getattr(best, state) or best.warm)
            mark = "*" if best and best.note.startswith("one call") else ""
            cells = [r.case, r.shape, r.dtype, str(r.threads), state, _milliseconds(seconds), _spread(samples)]
            cells += [_per_unit(seconds, r), _number(gigabytes), _percent(gigabytes, limit.copy)]
            cells += [_number(flops), _percent(flops, limit.fma_fp32), _percent(flops, gemm)]
            cells += [best.path, _milliseconds(rival) + mark, f"**{rival / seconds:.3g}**"] if best else [""] * 3
            rows.append(cells)
    head = "work|shape|type|threads|cache|ms|±|speed|GB/s|of torch's copy|GFLOP/s|of FMA peak|of torch GEMM"
    return _table(f"{head}|best in plain torch|its ms|times faster".split("|"), rows)


def paths_table(results: Sequence[Result]) -> str:
    """All paths at the largest number of threads."""
    all_threads = max(r.threads for r in results)
    rows = []
    for r in results:
        for t in r.timings if r.threads == all_threads else ():
            warm, cold = (_milliseconds(statistics.median(samples)) if samples else "" for samples in (t.warm, t.cold))
            ratio = f"{t.median / r.ours.median:.3g}" if t.warm else ""
            error = "" if t.error is None else f"{t.error:.0e}"
            peak = "" if t.peak_memory is None else f"{t.peak_memory / 2**20:,.0f}"
            cells = [r.case, r.shape, r.dtype, t.path, warm, cold, _spread(t.warm), str(len(t.warm))]
            rows.append([*cells, ratio, error, peak, t.note])
    head = "work|shape|type|path|warm ms|cold ms|±|n|time / ours|error|peak MiB|note"
    return _table(head.split("|"), rows)


def summary(result: Result) -> str:
    """One line for the terminal."""
    best, ours = result.best_rival, result.ours
    line = f"{result.case}, {result.shape}, {result.dtype}, {_threads(result.threads)}: {_milliseconds(ours.median)} ms"
    return line + (f", {best.path} {_milliseconds(best.median)} ms" if best else "")


def plot(results: Sequence[Result], path: Path) -> None:
    """Median time of every path, warm, at the largest number of threads; lines span the quartiles."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    all_threads = max(r.threads for r in results)
    results = [r for r in results if r.threads == all_threads]
    figure, axes = plt.subplots(figsize=(11, 1.2 + 0.34 * sum(len(r.timings) + 1 for r in results)))
    y = 0.0
    positions, labels = [], []
    for r in results:
        bars = [t for t in r.timings if t.warm]
        positions.append(y + (len(bars) - 1) / 2)
        labels.append(f"{r.case}\n{r.shape}, {r.dtype}")
        for t in bars:
            low, middle, high = (1e3 * q for q in np.percentile(t.warm, (25, 50, 75)))
            axes.plot((low, high), (y, y), color=_colour(t), linewidth=1.5)
            axes.plot(middle, y, "o", color=_colour(t))
            text = f"{_milliseconds(middle / 1e3)}  {t.path}"
            axes.annotate(text, (high, y), (8, 0), textcoords="offset points", va="center", fontsize=7)
            y += 1
        y += 1
    axes.set(xscale="log", xlabel=f"milliseconds, {_threads(all_threads)}, warm; less is better")
    axes.set_yticks(positions, labels, fontsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.12, y=0.01)
    plain_ticks(axes.xaxis)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def _colour(timing: Timing) -> str:
    if timing.path == OURS:
        return BLUE
    return GREY if timing.rival else ORANGE


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _spread(samples: Sequence[float]) -> str:
    if len(samples) < 3:
        return ""
    low, middle, high = np.percentile(samples, (25, 50, 75))
    return f"{50 * (high - low) / middle:.0f}%"


def _per_unit(seconds: float, result: Result) -> str:
    if result.unit == "token":
        return f"{result.units / seconds:,.0f} tokens/s"
    each = seconds / result.units
    return f"{each * 1e6:.3g} µs a call" if result.unit == "call" else f"{each * 1e9:.3g} ns an element"


def _milliseconds(seconds: float) -> str:
    milliseconds = 1e3 * seconds
    return f"{milliseconds:,.0f}" if milliseconds >= 1000 else f"{milliseconds:.3g}"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def _percent(value: float | None, limit: float | None) -> str:
    return "" if value is None or limit is None else f"{100 * value / limit:.0f}%"
