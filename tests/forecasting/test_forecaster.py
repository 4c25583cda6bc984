"""Forecasts in the data's units: the loss's masks and scales, covariates, samples, streams."""

import pytest
import torch
from assertions import assert_close

import megalodon_ops as mo
from megalodon_ops.forecasting import Forecaster

HORIZONS = (1, 3)
LEVELS = (0.1, 0.5, 0.9)


def forecaster(num_features=1, num_targets=1, **options) -> Forecaster:
    torch.manual_seed(0)
    sizes = dict(num_layers=1, model_dim=16, z_dim=8, value_dim=16, ffn_hidden_dim=16, norm_num_groups=2, cema_ndim=2)
    size = num_targets * len(HORIZONS) * len(LEVELS)
    config = mo.MegalodonConfig(**sizes, num_features=num_features, missing_values=True, output_size=size)
    model = mo.Megalodon(config).double()
    return Forecaster(model, horizons=HORIZONS, levels=LEVELS, num_targets=num_targets, **options)


def series(B=2, L=30, F=1):
    return torch.randn(B, L, F, dtype=torch.float64).cumsum(1)


def test_the_loss_is_that_of_the_quantiles_where_the_scale_and_the_value_are_known():
    net, x = forecaster(burn_in=4), series()
    x[0, 7] = x[1, :3] = torch.nan
    quantiles, _ = net(x)
    losses = []
    for row in range(2):
        for place in range(30):
            past = x[row, : place + 1, 0]
            past = past[~past.isnan()]
            for h, horizon in enumerate(HORIZONS):
                if len(past) > 4 and place + horizon < 30 and not x[row, place + horizon, 0].isnan():
                    error = (x[row, place + horizon, 0] - quantiles[row, place, 0, h]) / past.std(correction=0)
                    levels = torch.tensor(LEVELS, dtype=torch.float64)
                    losses += torch.maximum(levels * error, (levels - 1) * error).tolist()
    assert_close(net.loss(x), torch.tensor(losses, dtype=torch.float64).mean(), tolerance=1e-10)
    net.loss(x).backward()
    assert all(parameter.grad.isfinite().all() for parameter in net.parameters())
    assert_close(net.loss(x, x), net.loss(x), tolerance=1e-12)


def test_scales_do_not_matter():
    """Rows of other units have the same loss, and forecasts in their units; a constant row counts in no loss."""
    net, x = forecaster(burn_in=4), series()
    other = 1000 + 50 * x
    assert_close(net.loss(other), net.loss(x), tolerance=1e-8)
    assert_close(net(other)[0][:, 2:], 1000 + 50 * net(x)[0][:, 2:], tolerance=1e-8)
    constant = torch.full_like(x[:1], 5.0)
    changed_at_the_end = constant + (torch.arange(30) == 29)[:, None]
    assert net.loss(torch.cat([constant, changed_at_the_end])) == 0
    assert_close(net(constant)[0][:, 2:], torch.full((1, 28, 1, 2, 3), 5.0, dtype=torch.float64), tolerance=1e-12)


def test_where_the_scale_is_not_known():
    net, x = forecaster(), series(1, 6)
    x[0, [0, 2]] = torch.nan
    mean, deviation = net.model.input_scale(x)
    assert mean.isnan().flatten().tolist() == [True, False, False, False, False, False]
    assert deviation.isnan().flatten().tolist() == [True, True, True, False, False, False]
    assert net(x)[0].isnan().flatten(2).any(2).tolist() == [[True, True, True, False, False, False]]
    _, state = net(x[:, :2])
    again = net.model.input_scale(x[:, 2:], state=state)
    assert [each.isnan().flatten().tolist() for each in again] == [[False] * 4, [True, False, False, False]]


@pytest.mark.filterwarnings("ignore:record. functions run in Python")
def test_a_stream_gives_the_forecasts_of_the_whole():
    net, x = forecaster(), series()
    whole, _ = net(x)
    state = None
    for place in range(30):
        piece, state = net(x[:, place : place + 1], state)
        if place > 1:
            assert_close(piece[:, 0], whole[:, place], tolerance=1e-9)
    with torch.no_grad():
        _, state = net(x[:, :9])
        step = mo.record(net, x[:, 9:10], state=state)
        decoder = mo.Decoder(net.model, state)
        for place in (9, 10, 11):
            assert_close(step(x[:, place : place + 1])[:, 0], whole[:, place], tolerance=1e-9)
            assert_close(decoder(x[:, place : place + 1])[:, 0], net.model(x)[:, place], tolerance=1e-9)
    assert net.loss(x[:, :5], x[:, :8], state=state).isfinite(), "a state needs no burn-in"


def test_covariates_known_ahead():
    net = forecaster(num_features=1 + 2 * 2)
    calendar = torch.arange(33.0, dtype=torch.float64)[:, None] * torch.tensor([1.0, 100.0])
    columns = net.known_ahead(calendar[None])
    assert columns.shape == (1, 30, 4) and columns[0, 5].tolist() == [6, 8, 600, 800]
    assert net(torch.cat([series(1), columns], -1))[0].shape == (1, 30, 1, 2, 3)


def test_samples_have_the_quantiles():
    net = forecaster()
    quantiles = torch.tensor([[0.0, 1.0, 4.0], [5.0, 9.0, 7.0]], dtype=torch.float64)
    drawn = net.sample(quantiles, 100_000, generator=torch.Generator().manual_seed(0))
    found = drawn.quantile(torch.tensor(LEVELS, dtype=torch.float64), dim=0).T
    assert_close(found, quantiles.sort(-1).values, tolerance=0.03)
    assert drawn[:, 0].min() == pytest.approx(-0.25, abs=0.01) and drawn[:, 0].max() == pytest.approx(4.75, abs=0.01)


def test_wrong_arguments_are_named():
    net = forecaster()
    options = dict(horizons=HORIZONS, levels=LEVELS)
    for change, message in (
        (dict(levels=(0.5, 0.1)), r"`levels` must be at least 2 increasing numbers in \(0, 1\), got \[0.5, 0.1\]"),
        (dict(horizons=(0,)), "`horizons` must be"),
        (dict(horizons=(1,)), "output_size = 3, targets x horizons x levels, got 1 and 6"),
        (dict(num_targets=2), "at least 2 num_features"),
    ):
        with pytest.raises(ValueError, match=f"Forecaster: .*{message}"):
            Forecaster(net.model, **{**options, **change})
