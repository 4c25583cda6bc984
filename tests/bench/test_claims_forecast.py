"""Claim of forecasts: errors by hand, no look ahead, a stream that gives the forecasts of whole series."""

import numpy
import pytest
import torch

pytest.importorskip("transformers")

from bench.claims import forecast, forecasters, report, runs, verdict  # noqa: E402
from bench.claims.__main__ import main  # noqa: E402
from bench.claims.forecast_data import LEVELS, SOURCES, Panel, mase, weighted_quantile_loss  # noqa: E402


def panel(season=4, horizon=3, origins=2, step=5, T=60):
    random = numpy.random.default_rng(0)
    values = random.standard_normal((2, T)).cumsum(1)
    return Panel(values, season=season, horizon=horizon, origins=origins, step=step)


def test_origins_leave_what_their_targets_need():
    p = panel()
    assert p.num_training == 60 - 3 - 5 and p.training_part().num_training == p.num_training - 3 - 5
    for series, targets in zip(p.values, p.targets(), strict=True):
        assert targets.tolist() == [series[52:55].tolist(), series[57:60].tolist()]


def test_errors_are_those_of_the_definition():
    p = panel()
    quantiles = p.targets()[..., None] + numpy.linspace(-1, 2, len(LEVELS))
    ratios, losses = [], []
    for series, targets, forecasts in zip(p.values, p.targets(), quantiles, strict=True):
        naive = [abs(series[t] - series[t - 4]) for t in range(4, 52)]
        ratios.append(0.5 / (sum(naive) / len(naive)))  # the median is 0.5 too high
        total = 0.0
        for target, row in zip(targets.ravel(), forecasts.reshape(-1, len(LEVELS)), strict=True):
            for level, value in zip(LEVELS, row, strict=True):
                total += (level if target > value else 1 - level) * abs(target - value)
        losses.append(2 * total / len(LEVELS) / abs(targets).sum())
    assert mase(p, quantiles) == pytest.approx(numpy.mean(ratios))
    assert weighted_quantile_loss(p, quantiles) == pytest.approx(numpy.mean(losses))


@pytest.mark.parametrize("season", [1, 4])
def test_a_forecast_reads_its_past_alone_and_streams(season):
    torch.manual_seed(0)
    net = forecasters.Forecaster(season, 6).eval()
    values = torch.randn(2, 50, dtype=torch.float64).cumsum(1)
    later = values.clone()
    later[:, 30:] += 1
    with torch.no_grad():
        whole, changed = net(values), net(later)
    assert whole.shape == (2, 50, 6, len(LEVELS))
    torch.testing.assert_close(changed[:, season:30], whole[:, season:30], rtol=0, atol=0)
    assert not torch.equal(changed[:, 30], whole[:, 30])
    stream = forecasters.ForecastStream(net, values[1, :40])
    for t in range(40, 50):
        torch.testing.assert_close(stream(values[1, t].item()), whole[1, t], rtol=1e-4, atol=1e-5)
    assert stream.decoder.fused


def test_training_reads_nothing_after_the_first_origin(monkeypatch):
    """With a fixed number of steps, other values after the first origin leave its forecasts as they are."""
    p = panel(T=80)

    def num_calls(limit):  # in place of the seconds: 0, 1, 2 ...
        limit.calls = getattr(limit, "calls", -1) + 1
        return limit.calls

    monkeypatch.setattr(forecasters.TimeLimit, "spent", property(num_calls))
    other = p._replace(values=p.values.copy())
    other.values[:, p.num_training :] += 10
    found, changed = (forecasters.megalodon(q, seed=0, seconds=3, lr=1e-3) for q in (p, other))
    assert found["steps"] == changed["steps"] == 3
    assert (found["quantiles"][:, 0] == changed["quantiles"][:, 0]).all()
    assert (found["quantiles"][:, 1] != changed["quantiles"][:, 1]).all()


def content(panel, model, value, seed=0):
    return {
        "settings": {"panel": panel, "model": model, "seed": seed},
        "result": {"mase": value, "wql": value},
        "seconds": 1.0,
    }


def results(ours, theirs, panels=SOURCES):
    found = [content(panel, forecast.NAIVE, 2.0) for panel in panels]
    for panel in panels:
        found += [content(panel, model, theirs) for model in forecast.CLASSICAL[1:]]
        for seed in range(3):
            found += [
                content(panel, forecast.MEGALODON, ours + 0.001 * seed, seed),
                content(panel, forecast.NHITS, theirs, seed),
            ]
    return found


def test_the_claim_is_decided_by_means_over_all_panels():
    assert forecast.relative(results(1.0, 1.5), "mase")[forecast.MEGALODON] == pytest.approx([0.5, 0.5005, 0.501])
    found = forecast.verdicts(results(1.0, 1.5))
    assert found["claim"] == verdict.HELD == found["MASE, all panels: lower than NHITS"]
    assert found["MASE, single panels: lower than AutoETS"] == "held at " + " / ".join(SOURCES)
    assert forecast.verdicts(results(1.0, 0.9))["claim"] == verdict.NOT_HELD
    assert forecast.verdicts(results(1.0, 1.01))["claim"] == verdict.UNDECIDED  # less than the least difference
    some = forecast.verdicts(results(1.0, 1.5, [*SOURCES][1:]))
    assert some["claim"] == verdict.UNDECIDED


def test_panels_are_those_of_the_packages():
    for name in ("statsmodels", "aeon", "river"):
        pytest.importorskip(name)
    sizes = {name: (source.load().values.shape, source.load().num_training) for name, source in SOURCES.items()}
    assert sizes == {
        "elnino": ((1, 732), 636),
        "co2": ((1, 526), 430),
        "sunspots": ((1, 309), 270),
        "macrodata": ((9, 203), 171),
        "fertility": ((192, 52), 43),
        "uschange": ((5, 187), 155),
        "water": ((1, 1268), 1076),
    }
    assert all(numpy.isfinite(source.load().values).all() for source in SOURCES.values())


@pytest.mark.slow
def test_a_quick_run_from_end_to_end(tmp_path, capsys):
    """It takes the packages of the other forecasters, which no extra installs."""
    for name in ("statsmodels", "statsforecast", "neuralforecast"):
        pytest.importorskip(name)
    assert main(["forecast", "--quick", "--threads", "1", "--out", str(tmp_path)]) == 0
    found = runs.results(tmp_path / "forecast-quick.jsonl")
    assert found.keys() >= {
        "sunspots NHITS seed=2",
        "stream MEGALODON, Decoder 200",
        "stream AutoARIMA, fitted anew 100",
    }
    assert all(0 < content["result"].get("mase", 1) < 4 for content in found.values())
    page = report.report("forecast", forecast, tmp_path / "forecast-quick.jsonl")
    assert f"| sunspots | 1 | {SOURCES['sunspots'].load().num_training}" in page and "neuralforecast" in page
