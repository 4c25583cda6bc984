"""Claim k: a small MEGALODON forecasts series of numbers better than statistical models and a neural forecaster.

pip install statsmodels aeon river statsforecast neuralforecast, then python -m bench.claims forecast --threads 1
"""

import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy
import torch

from bench import plots
from . import forecasters, models, verdict
from .forecast_data import SOURCES, Panel, mase, weighted_quantile_loss
from .runs import Session

TITLE = "Forecasts of numbers"
SECONDS, QUICK_SECONDS = 6.0, 0.2
MIN_DIFFERENCE = 0.02
RULE = (
    "Seven public panels of series from packages of the Python index are forecast from rolling origins, the last part of each "
    "series: the horizon is a season, or 5 years. Models give the nine deciles of each value. MASE is the absolute error "
    "of the median over that of the seasonal naive forecast before the first origin; the weighted quantile loss (WQL) is "
    "twice the quantile losses' sum over the values' absolute sum, averaged over series and deciles. AutoETS and AutoARIMA "
    "of statsforecast are fitted anew at each origin. MEGALODON and NHITS of neuralforecast are trained once for each panel, on what "
    f"lies before its first origin, for {SECONDS:g} s of processor time of one thread (the machine is shared) at rates that fall "
    "linearly to zero; three seeds. Inputs, sizes, rates and that time were chosen by short runs of other seeds on rolling "
    "origins inside of the training part. A model's figure is the geometric mean over the panels of its error "
    "divided by the seasonal naive forecast's. Two figures differ if they differ by more than 3 standard errors over the "
    f"seeds and by more than {MIN_DIFFERENCE:g}. The claim is held if MEGALODON's MASE and WQL are lower than those of the seasonal naive "
    "forecast, AutoETS, AutoARIMA and NHITS, and not held if one is higher. Single panels are compared by 5 standard "
    "errors and decide nothing. Also shown, without deciding: processor time for the forecast after one more observation "
    "of a stream and, added when the first seed's figures were known, one seed of NHITS trained for ten times as long, as "
    "it takes only 35 steps in that time."
)
MEGALODON, NHITS = models.MEGALODON, "NHITS"
LONG_NHITS = "NHITS, longer"
LONGER = 10  # factor of its training time
NAIVE = "SeasonalNaive"
CLASSICAL = (NAIVE, "AutoETS", "AutoARIMA")
OTHERS = (*CLASSICAL, NHITS)
RATES = {MEGALODON: 1e-3, NHITS: 1e-3}
NEURAL = {MEGALODON: forecasters.megalodon, NHITS: forecasters.nhits, LONG_NHITS: forecasters.nhits}
FIGURES = {"MASE": "mase", "WQL": "wql"}
COLOURS = {MEGALODON: plots.BLUE, NHITS: plots.INK, "AutoETS": plots.GREEN, "AutoARIMA": plots.RED, NAIVE: plots.GREY}
STREAM_COLOURS = COLOURS | {"MEGALODON": plots.BLUE}
ESTIMATES = {NAIVE: 1, "AutoETS": 3, "AutoARIMA": 40}
"""Seconds for a panel"""
COUNTS, QUICK_COUNTS = (1_000, 10_000, 100_000), (100, 200)
STREAM_SEASON = 12
FIRST_FIT = 1_000
"""Observations to which a model is fitted that is then only carried forward"""
PACKAGES = {"Auto": "statsforecast", "Seasonal": "statsforecast", NHITS: "neuralforecast"}


def run(session: Session, data: list[str] | None) -> None:
    panels = ["sunspots"] if session.quick else SOURCES
    part = dict(is_inside=True) if session.quick else {}
    seconds = QUICK_SECONDS if session.quick else SECONDS
    for panel in panels:
        for name in CLASSICAL:
            session.run(f"{panel} {name}", classical_work, ESTIMATES[name], panel=panel, model=name, **part)
    for seed in session.seeds():
        for panel in panels:
            for name, lr in RATES.items():
                settings = dict(panel=panel, model=name, train_seconds=seconds, lr=lr, seed=seed, **part)
                session.run(f"{panel} {name} seed={seed}", neural_work, seconds + 2, **settings)
    for panel in panels:
        settings = dict(panel=panel, model=LONG_NHITS, train_seconds=LONGER * seconds, lr=RATES[NHITS], **part)
        session.run(f"{panel} {LONG_NHITS}", neural_work, LONGER * seconds + 2, seed=session.seed, **settings)
    counts = QUICK_COUNTS if session.quick else COUNTS
    for method in STREAMS:
        for count in counts:
            if (method, count) not in SLOW_STREAMS:
                session.run(f"stream {method} {count}", stream_work, 10, method=method, count=count)


def load(panel: str, is_inside: bool) -> Panel:
    """Load a panel; `is_inside`: with origins inside of the training part, for trials."""
    whole = SOURCES[panel].load()
    return whole.training_part() if is_inside else whole


def errors(panel: Panel, quantiles: numpy.ndarray) -> dict[str, Any]:
    found = {"mase": mase(panel, quantiles), "wql": weighted_quantile_loss(panel, quantiles)}
    return {"shape": panel.values.shape, **found}


def classical_work(scratch: Path, *, panel: str, model: str, is_inside: bool = False) -> dict[str, Any]:
    loaded = load(panel, is_inside)
    begin = time.process_time()
    quantiles = forecasters.classical(loaded, model)
    return {**errors(loaded, quantiles), "seconds": time.process_time() - begin, "package": _package(model)}


def neural_work(
    scratch: Path, *, panel: str, model: str, train_seconds: float, lr: float, seed: int, is_inside: bool = False
) -> dict[str, Any]:
    loaded = load(panel, is_inside)
    begin = time.process_time()
    found = NEURAL[model](loaded, seed=seed, seconds=train_seconds, lr=lr)
    figures = errors(loaded, found.pop("quantiles"))
    return {**figures, **found, "seconds": time.process_time() - begin, "package": _package(model)}


def _package(model: str) -> str | None:
    """Package and version of a model; None: this one."""
    name = next((package for start, package in PACKAGES.items() if model.startswith(start)), None)
    return name and f"{name} {version(name)}"


# one more observation


def stream_work(scratch: Path, *, method: str, count: int) -> dict[str, Any]:
    random = numpy.random.default_rng(0)
    season = numpy.sin(numpy.arange(count + 1) * 2 * math.pi / STREAM_SEASON)
    values = 10 + season + 0.1 * random.standard_normal(count + 1)
    call, calls = STREAMS[method](values)
    times = []
    for _ in range(calls):
        begin = time.process_time()
        call()
        times.append(time.process_time() - begin)
    return {"milliseconds": 1e3 * statistics.median(times), "calls": calls, "seconds": sum(times)}


def megalodon_stream(values: numpy.ndarray) -> tuple[Callable[[], Any], int]:
    net = forecasters.Forecaster(STREAM_SEASON, STREAM_SEASON).eval()
    stream = forecasters.ForecastStream(net, torch.from_numpy(values[:-1]))
    stream(values[-1])  # records the step
    return partial(stream, values[-1]), 500


def classical_stream(values: numpy.ndarray, *, name: str, refits: bool) -> tuple[Callable[[], Any], int]:
    from statsforecast import models as classical_models

    model = getattr(classical_models, name)(season_length=STREAM_SEASON)
    options = dict(h=STREAM_SEASON, level=forecasters.INTERVALS)
    if refits:
        return lambda: model.forecast(values, **options), 1
    model.fit(values[:FIRST_FIT])
    return lambda: model.forward(values, **options), 5


def nhits_stream(values: numpy.ndarray) -> tuple[Callable[[], Any], int]:
    """Standardise the last window and run the network, without the library's tables."""
    model = forecasters.nhits_model(STREAM_SEASON, STREAM_SEASON).eval()
    window = torch.from_numpy(values[-model.input_size :]).float()[None, :, None]
    exogenous = dict.fromkeys(("futr_exog", "hist_exog", "stat_exog"))

    @torch.no_grad()
    def forecast() -> torch.Tensor:
        mean, deviation = window.mean(), window.std()
        batch = {"insample_y": (window - mean) / deviation, "insample_mask": torch.ones_like(window), **exogenous}
        return mean + deviation * model(batch)

    forecast()
    return forecast, 100


# Functions of the values so far, the last of which is new: the call that takes it, and how often to time the call.
STREAMS = {
    "MEGALODON, Decoder": megalodon_stream,
    "NHITS, its window": nhits_stream,
    "AutoETS, carried forward": partial(classical_stream, name="AutoETS", refits=False),
    "AutoARIMA, carried forward": partial(classical_stream, name="AutoARIMA", refits=False),
    "AutoETS, fitted anew": partial(classical_stream, name="AutoETS", refits=True),
    "AutoARIMA, fitted anew": partial(classical_stream, name="AutoARIMA", refits=True),
}
SLOW_STREAMS = {("AutoETS, fitted anew", 100_000), *(("AutoARIMA, fitted anew", count) for count in COUNTS[1:])}
"""Not run: more than a minute"""


# results


def by_model(results: list[dict[str, Any]], field: str) -> dict[str, dict[str, list[float]]]:
    """A figure of each model, over the seeds, by panel."""
    found: dict[str, dict[str, list[float]]] = {model: {} for model in (MEGALODON, *OTHERS, LONG_NHITS)}
    for content in results:
        if "panel" in content["settings"]:
            by_panel = found[content["settings"]["model"]]
            values = content["result"] | {"seconds": content["seconds"]}
            by_panel.setdefault(content["settings"]["panel"], []).append(values[field])
    return found


def relative(results: list[dict[str, Any]], field: str) -> dict[str, list[float]]:
    """Geometric mean over all panels of a model's figure divided by the seasonal naive forecast's, for each seed.

    A model without seeds has its figure as often as the verdicts ask for; one that lacks a run has none.
    """
    found = by_model(results, field)
    means: dict[str, list[float]] = {}
    for model, by_panel in found.items():
        is_complete = by_panel.keys() == found[NAIVE].keys() == SOURCES.keys()
        if not is_complete or len({*map(len, by_panel.values())}) > 1:
            means[model] = []
            continue
        ratios = [[value / found[NAIVE][panel][0] for value in values] for panel, values in by_panel.items()]
        by_seed = [statistics.geometric_mean(seed) for seed in zip(*ratios, strict=True)]
        means[model] = by_seed * (verdict.SEEDS if model in CLASSICAL else 1)
    return means


def verdicts(results: list[dict[str, Any]]) -> dict[str, str]:
    decisive, single = {}, {}
    for label, field in FIGURES.items():
        means = relative(results, field)
        found = by_model(results, field)
        for other in OTHERS:
            outcome = verdict.decide_lower(means[MEGALODON], means[other], MIN_DIFFERENCE)
            decisive[f"{label}, all panels: lower than {other}"] = outcome
            for panel in SOURCES:
                ours, theirs = (found[model].get(panel, []) for model in (MEGALODON, other))
                theirs = theirs * (verdict.SEEDS if other in CLASSICAL else 1)
                outcome = verdict.decide_lower(ours, theirs, errors=verdict.MANY_COMPARISONS)
                single[f"{label}, single panels: lower than {other}", panel] = outcome
    claim = verdict.combine([*decisive.values()])
    return {"claim": claim, **decisive, **verdict.group_by_comparison(single)}


def table(results: list[dict[str, Any]]) -> list[str]:
    found = {field: by_model(results, field) for field in (*FIGURES.values(), "seconds")}
    lines = [
        "| panel | series | values | source | model | MASE | WQL | processor time, s | seeds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    sizes = {c["settings"]["panel"]: c["result"]["shape"] for c in results if "panel" in c["settings"]}
    for panel, (series, positions) in sizes.items():
        for model in found["mase"]:
            values = {field: by[model].get(panel, []) for field, by in found.items()}
            if values["mase"]:
                errors = [verdict.spread(values[field]) for field in ("mase", "wql")]
                effort = [f"{statistics.fmean(values['seconds']):.1f}", str(len(values["mase"]))]
                cells = [panel, f"{series} | {positions:,}", SOURCES[panel].origin, model, *errors, *effort]
                lines.append(f"| {' | '.join(cells)} |")
    means = {field: relative(results, field) for field in FIGURES.values()}
    for model in means["mase"]:
        if means["mase"][model]:
            cells = [verdict.spread(by[model]) for by in means.values()]
            lines.append(f"| all, relative to {NAIVE} | | | | {model} | {' | '.join(cells)} | | |")
    lines += ["", "| one more observation of a stream | after | ms |", "| --- | --- | --- |"]
    for content in results:
        if "method" in content["settings"]:
            settings, milliseconds = content["settings"], content["result"]["milliseconds"]
            lines.append(f"| {settings['method']} | {settings['count']:,} | {milliseconds:.3f} |")
    packages = {content["result"].get("package") for content in results} - {None}
    return [*lines, "", f"Models of others: {', '.join(sorted(packages))}."]


def plot(results: list[dict[str, Any]], figure: Any) -> None:
    left, right = figure.subplots(1, 2)
    found = by_model(results, "mase")
    for model in (MEGALODON, *OTHERS):
        naive = {panel: values[0] for panel, values in found[NAIVE].items()}
        ratios = [(panel, value / naive[panel]) for panel, values in found[model].items() for value in values]
        if ratios:
            left.plot(*zip(*ratios), "o", color=COLOURS[model], fillstyle="none", label=model)
    left.set(yscale="log", ylabel=f"MASE relative to {NAIVE}", xlabel="panel")
    left.set_yticks([0.2, 0.5, 1, 2, 5], ["0.2", "0.5", "1", "2", "5"])
    left.minorticks_off()
    left.tick_params(axis="x", rotation=30)
    left.legend(fontsize="small")
    times: dict[str, list[tuple[int, float]]] = {}
    for content in results:
        if "method" in content["settings"]:
            point = content["settings"]["count"], content["result"]["milliseconds"]
            times.setdefault(content["settings"]["method"], []).append(point)
    for method, points in times.items():
        style = "--" if method.endswith("anew") else "-"
        model, _, _ = method.partition(",")
        right.plot(*zip(*sorted(points)), style, marker="o", color=STREAM_COLOURS[model], label=method)
    right.set(
        xscale="log", yscale="log", ylim=(0.03, 1e7), xlabel="observations so far", ylabel="one more observation, ms"
    )
    right.set_xticks([1_000, 10_000, 100_000], ["1,000", "10,000", "100,000"])
    plots.plain_ticks(right.yaxis)
    right.legend(fontsize="small", loc="upper right")
