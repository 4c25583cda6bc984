"""Forecasts of series of numbers, in the data's units, by a model with `num_features`; docs/tutorials/forecast.md."""

from .forecaster import Forecaster

__all__ = ["Forecaster"]
