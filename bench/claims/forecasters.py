"""Forecasters of the claim `forecast`: quantiles (S, origins, horizon, levels) of a panel, and their cost."""

import time
import warnings
from typing import Any

import numpy
import torch
from numpy import ndarray
from torch import Tensor, nn

import megalodon_ops as mo
from megalodon_ops import training

from .forecast_data import LEVELS, Panel

ROWS = 4
"""Windows of a training step of MEGALODON"""
_LEVELS = torch.from_numpy(LEVELS)
INTERVALS = [20, 40, 60, 80]
"""Intervals in percent; their ends are all levels but the median"""
_NUM_WEIGHTS = 2


class TimeLimit:
    """Decays an optimizer's learning rate linearly, to zero at the end of a time of this process on the processor."""

    def __init__(self, seconds: float, rate: float) -> None:
        self.seconds = seconds
        self.rate = rate
        self.begin = time.process_time()

    @property
    def spent(self) -> float:
        return time.process_time() - self.begin

    def set_rate(self, optimizer: torch.optim.Optimizer) -> bool:
        """Set the rate of the next step; return False once the time is over."""
        left = max(0.0, 1 - self.spent / self.seconds)
        for group in optimizer.param_groups:
            group["lr"] = self.rate * left
        return left > 0


class Forecaster(nn.Module):
    """MEGALODON as a forecaster: quantiles of the next `horizon` values after each position.

    It reads a value and its changes since the position and the season before. For each step ahead it returns two weights
    and, for each level, an offset in units of the seasonal changes' root mean square so far. The weights choose a point
    from the last value to the seasonal naive forecast, and a share of the last seasonal change that is added to it.
    """

    def __init__(self, season: int, horizon: int) -> None:
        super().__init__()
        self.season, self.horizon = season, horizon
        self.lags = [season - 1 - step % season for step in range(horizon)]
        """Positions from the last value back to the seasonal naive forecasts"""
        sizes = dict(num_layers=1, model_dim=32, z_dim=16, value_dim=32, ffn_hidden_dim=32, cema_ndim=8, chunk_size=64)
        ends = dict(num_features=3, output_size=horizon * (len(LEVELS) + _NUM_WEIGHTS))
        config = mo.MegalodonConfig(**sizes, **ends, norm_num_groups=4, hidden_dropout=0.4, dropout=0.4)
        self.model = mo.Megalodon(config)

    def forward(self, values: Tensor) -> Tensor:
        """Return quantiles (B, L, horizon, levels) after each of the values (B, L); arbitrary in the first season."""
        changes = [values - values.roll(lag, 1) for lag in (1, self.season)]
        for change, lag in zip(changes, (1, self.season), strict=True):
            change[:, :lag] = 0
        position = torch.arange(1, values.shape[1] + 1)
        scale = (changes[1].square().cumsum(1) / position).sqrt()
        naive = torch.stack([values.roll(lag, 1) for lag in self.lags], -1)
        return self.quantiles(self.model(torch.stack([values, *changes], -1)), values, naive, changes[1], scale)

    def quantiles(self, outputs: Tensor, last: Tensor, naive: Tensor, change: Tensor, scale: Tensor) -> Tensor:
        """Return quantiles (..., horizon, levels) for outputs (..., O) and naive (..., horizon); the others are (...)."""
        *offsets, towards_naive, change_share = outputs.unflatten(-1, (self.horizon, -1)).unbind(-1)
        last, change, scale = last[..., None], change[..., None], scale[..., None, None]
        middle = last + towards_naive.sigmoid() * (naive - last) + change_share.sigmoid() * change
        return middle[..., None] + scale * torch.stack(offsets, -1)


class ForecastStream:
    """A forecaster that takes one observation at a time, by a :class:`megalodon_ops.Decoder`."""

    @torch.no_grad()
    def __init__(self, net: Forecaster, values: Tensor) -> None:
        """values: (L,), the observations so far, more than a season."""
        x = values.double()
        changes = [torch.cat([x[:lag] * 0, x[lag:] - x[:-lag]]) for lag in (1, net.season)]
        _, state = net.model(torch.stack([x, *changes], -1)[None], return_state=True)
        self.net = net
        self.decoder = mo.Decoder(net.model, state)
        self.recent = x[-net.season :].tolist()
        self.count = len(x)
        self.squares = float(changes[1].square().sum())

    @torch.no_grad()
    def __call__(self, value: float) -> Tensor:
        """Return quantiles (horizon, levels) after one more observation."""
        change = value - self.recent[0]
        step = value - self.recent[-1]
        self.recent = [*self.recent[1:], value]
        self.count += 1
        self.squares += change**2
        outputs = self.decoder(torch.tensor([[[value, step, change]]], dtype=torch.float64))[0, 0]
        naive = torch.tensor([self.recent[-1 - lag] for lag in self.net.lags], dtype=torch.float64)
        numbers = torch.tensor([value, change, (self.squares / self.count) ** 0.5], dtype=torch.float64)
        return self.net.quantiles(outputs, numbers[0], naive, numbers[1], numbers[2])


def megalodon(panel: Panel, *, seed: int, seconds: float, lr: float) -> dict[str, Any]:
    """Train on windows of half to all of the positions before the first origin, then read the panel once."""
    torch.manual_seed(seed)
    random = numpy.random.default_rng(seed)
    net = Forecaster(panel.season, panel.horizon)
    values = torch.from_numpy(panel.values)
    end = panel.num_training - panel.horizon
    size = (values[:, panel.season : end] - values[:, : end - panel.season]).abs().mean(1)
    optimizer = training.adamw(net, lr=lr)
    limit = TimeLimit(seconds, lr)
    steps = 0
    while limit.set_rate(optimizer):
        length = int(end * random.uniform(0.5, 1))
        rows = random.integers(len(values), size=ROWS)
        starts = random.integers(end - length + 1, size=ROWS)
        x = torch.stack([values[row, start : start + length + panel.horizon] for row, start in zip(rows, starts)])
        targets = x.unfold(1, panel.horizon, 1)[:, 1:]
        error = (targets[..., None] - net(x[:, :length])) / size[rows, None, None, None]
        losses = torch.maximum(_LEVELS * error, (_LEVELS - 1) * error)
        losses[:, 2 * panel.season :].mean().backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
    spent = limit.spent
    net.eval()
    with torch.no_grad():
        found = net(values[:, : values.shape[1] - panel.horizon])[:, panel.num_training - 1 :: panel.step]
    return {"quantiles": found.numpy(), "steps": steps, "train_seconds": spent}


def classical(panel: Panel, name: str) -> ndarray:
    """Quantiles of a model of statsforecast, which is fitted anew at each origin."""
    from statsforecast import StatsForecast, models

    forecaster = StatsForecast([getattr(models, name)(season_length=panel.season)], freq=1, n_jobs=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of series for which a model does not converge
        table = forecaster.cross_validation(
            df=_frame(panel.values), h=panel.horizon, step_size=panel.step, n_windows=panel.origins, level=INTERVALS
        )
    return _quantiles(panel, table, name, name)


def nhits_model(horizon: int, season: int, seed: int = 0, **options: Any) -> Any:
    """NHITS of neuralforecast with its own sizes and rate; it reads three seasons or horizons, standardised."""
    from neuralforecast.losses.pytorch import MQLoss
    from neuralforecast.models import NHITS

    inputs = dict(input_size=3 * max(season, horizon), scaler_type="standard")
    steps = dict(num_lr_decays=-1, max_steps=10**6, val_check_steps=10**6, random_seed=seed)
    outputs = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
    quiet = dict.fromkeys(outputs, False)
    return NHITS(h=horizon, loss=MQLoss(level=INTERVALS), accelerator="cpu", **inputs, **steps, **quiet, **options)


def nhits(panel: Panel, *, seed: int, seconds: float, lr: float) -> dict[str, Any]:
    """Train NHITS once on the positions before the first origin, for a time."""
    import pytorch_lightning as lightning
    from neuralforecast import NeuralForecast

    spent = {}

    class StopAtLimit(lightning.Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            self.limit = TimeLimit(seconds, lr)

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
            trainer.should_stop = not self.limit.set_rate(trainer.optimizers[0])

        def on_train_end(self, trainer: Any, module: Any) -> None:
            spent.update(steps=trainer.global_step, train_seconds=self.limit.spent)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Lightning, which does not save the callback
        model = nhits_model(panel.horizon, panel.season, seed, learning_rate=lr, callbacks=[StopAtLimit()])
        forecaster = NeuralForecast([model], freq=1)
        table = forecaster.cross_validation(_frame(panel.values), n_windows=panel.origins, step_size=panel.step)
    return {"quantiles": _quantiles(panel, table, "NHITS", "NHITS-median"), **spent}


def _frame(values: ndarray) -> Any:
    """Return the values (S, T) as a table of the libraries."""
    import pandas

    S, T = values.shape
    ids, positions = numpy.divmod(numpy.arange(S * T), T)
    return pandas.DataFrame({"unique_id": ids, "ds": positions, "y": values.ravel()})


def _quantiles(panel: Panel, table: Any, name: str, median: str) -> ndarray:
    """Return the quantiles (S, origins, horizon, levels) in a table of a library."""
    low = [f"{name}-lo-{percent}" for percent in reversed(INTERVALS)]
    high = [f"{name}-hi-{percent}" for percent in INTERVALS]
    table = table.sort_values(["unique_id", "cutoff", "ds"])
    return table[[*low, median, *high]].to_numpy().reshape(*panel.targets().shape, len(LEVELS))
