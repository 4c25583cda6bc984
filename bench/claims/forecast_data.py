"""Public series inside of Python packages, and the two errors of quantile forecasts from rolling origins."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.resources import files
from typing import NamedTuple

import numpy
from numpy import ndarray

LEVELS = numpy.arange(1, 10) / 10
"""Quantiles of a forecast"""
MEDIAN = len(LEVELS) // 2


class Panel(NamedTuple):
    """Series of equal length (S, T) and their rolling origins, the last of which leaves `horizon` positions."""

    values: ndarray
    season: int
    horizon: int
    origins: int
    step: int
    """positions between two origins"""

    @property
    def num_training(self) -> int:
        """Positions before the first origin: all that training and the errors' scale may read."""
        return self.values.shape[1] - self.horizon - (self.origins - 1) * self.step

    def targets(self) -> ndarray:
        """Values (S, origins, horizon) that follow each origin."""
        windows = numpy.lib.stride_tricks.sliding_window_view(self.values, self.horizon, axis=1)
        return windows[:, self.num_training :: self.step]

    def training_part(self) -> Panel:
        """Return the positions before the first origin, with as many origins inside of them."""
        return self._replace(values=self.values[:, : self.num_training])


def mase(panel: Panel, quantiles: ndarray) -> float:
    """Mean absolute error of the medians, in units of the seasonal naive forecast's error before the first origin.

    quantiles: (S, origins, horizon, levels). Both errors are means over a series; the result is their mean.
    """
    before = panel.values[:, : panel.num_training]
    scales = abs(before[:, panel.season :] - before[:, : -panel.season]).mean(1)
    errors = abs(quantiles[..., MEDIAN] - panel.targets()).mean((1, 2))
    return float((errors / scales).mean())


def weighted_quantile_loss(panel: Panel, quantiles: ndarray) -> float:
    """Twice the quantile losses' sum over the targets' absolute sum; mean over series and levels."""
    error = panel.targets()[..., None] - quantiles
    losses = 2 * numpy.maximum(LEVELS * error, (LEVELS - 1) * error)
    sizes = abs(panel.targets()).sum((1, 2))
    return float((losses.mean(-1).sum((1, 2)) / sizes).mean())


def _statsmodels(name: str, *columns: str) -> ndarray:
    from statsmodels import datasets

    table = getattr(datasets, name).load_pandas().data
    return table[[*columns]].to_numpy(float).T if columns else table.to_numpy()


def _elnino() -> ndarray:
    return _statsmodels("elnino")[:, 1:].astype(float).reshape(1, -1)


def _co2() -> ndarray:
    """Monthly means of weekly values; five months without any are interpolated."""
    from statsmodels.datasets import co2

    return co2.load_pandas().data.co2.resample("MS").mean().interpolate().to_numpy()[None]


def _fertility() -> ndarray:
    """Countries with a value for each year from 1960 to 2011."""
    rates = _statsmodels("fertility")[:, 4:-2].astype(float)
    return rates[numpy.isfinite(rates).all(1)]


def _csv(package: str, path: str, *columns: int) -> ndarray:
    text = files(package).joinpath(path).read_text().splitlines()
    return numpy.loadtxt(text, delimiter=",", skiprows=1, usecols=columns, ndmin=2).T


_ECONOMY = "realgdp realcons realinv realgovt realdpi cpi m1 tbilrate unemp".split()
_macrodata = partial(_statsmodels, "macrodata", *_ECONOMY)
_sunspots = partial(_statsmodels, "sunspots", "SUNACTIVITY")
_uschange = partial(_csv, "aeon.datasets", "data/Uschange/Uschange.csv", 2, 3, 4, 5, 6)
_water = partial(_csv, "river.datasets", "water-flow.csv", 1)


class Source(NamedTuple):
    """A panel's series, and where they come from."""

    read: Callable[[], ndarray]
    origin: str
    """package, and licence of the data"""
    season: int
    horizon: int
    origins: int
    step: int

    def load(self) -> Panel:
        return Panel(self.read(), season=self.season, horizon=self.horizon, origins=self.origins, step=self.step)


SOURCES = {  # the numbers: season, horizon, origins, step
    "elnino": Source(_elnino, "statsmodels, public domain: sea surface temperature, months", 12, 12, 8, 12),
    "co2": Source(_co2, "statsmodels, public domain: CO2 on Mauna Loa, months", 12, 12, 8, 12),
    "sunspots": Source(_sunspots, "statsmodels, public domain: sunspots, years", 11, 11, 8, 4),
    "macrodata": Source(_macrodata, "statsmodels, public domain: economy of the US, quarters", 4, 4, 8, 4),
    "fertility": Source(_fertility, "statsmodels, terms of the World Bank: births per woman, years", 1, 5, 3, 2),
    "uschange": Source(_uschange, "aeon, BSD 3-clause: changes in the economy of the US, quarters", 4, 4, 8, 4),
    "water": Source(_water, "river, BSD 3-clause: flow of water, hours", 24, 24, 8, 24),
}
