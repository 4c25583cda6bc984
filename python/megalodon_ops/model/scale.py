"""Standardisation of numbers by the statistics of their own sequence, with or without missing values."""

from collections.abc import Callable

import torch
from torch import Tensor

from .config import MegalodonConfig
from .sequences import Sequences
from ..ops.common.definition import call
from ..ops.common.spans import num_sequences, token_sequences
from ..ops.common.states import TimestepNormState
from ..ops.sequence_norm.sequence_norm import sequence_norm
from ..ops.timestep_norm.timestep_norm import timestep_norm, timestep_norm_fwd

ScaleState = TimestepNormState | tuple[()]
"""Statistics of the inputs so far, or () where there are none: a pytree without leaves"""
_EPS = 1e-30
"""Added to a variance. A constant feature has x - mean = 0 in float64, so it gives zeros, not noise."""


def standardize(
    x: Tensor, config: MegalodonConfig, state: ScaleState, return_state: bool, sequences: Sequences
) -> tuple[Tensor, ScaleState]:
    """Standardise each feature of x (B, L, F) by its own mean and deviation, in float64.

    A causal model uses the statistics up to and including the position, and returns their new state; an encoder uses
    those of the whole sequence. With `missing_values`, a NaN does not count and becomes 0; F flags are appended.
    """
    x = x.double()
    rows, spans, restore = _feature_rows(x, config, sequences)
    groups = rows.shape[-1]
    weight, bias = x.new_zeros(2, groups)
    options = dict(num_groups=groups, eps=_EPS, spans=spans)
    if config.causal:
        initial = _initial_state(rows, config, state, sequences)
        y, end = timestep_norm(rows, weight, bias, state=initial, return_state=True, **options)
    else:
        y, end = sequence_norm(rows, weight, bias, **options), None
    y = restore(y)
    if config.missing_values:
        y = torch.cat([y, x.isnan().to(y.dtype)], -1)
    return y, _states_by_sequence(end, config) if return_state else ()


def running_scale(x: Tensor, config: MegalodonConfig, state: ScaleState) -> tuple[Tensor, Tensor]:
    """Return the mean and deviation by which :func:`standardize` scales a causal model's x (B, L, F), in float64.

    NaN stands for a mean of no value and for a deviation of fewer than two.
    """
    sequences = Sequences()
    rows, spans, restore = _feature_rows(x.double(), config, sequences)
    groups, initial = rows.shape[-1], _initial_state(rows, config, state, sequences)
    before = (None,) * 4 if initial is None else tuple(initial)
    weight, bias = rows.new_zeros(2, groups)
    flags = (True, False)  # return the statistics of each position, not the state
    _, stats, *_ = call(timestep_norm_fwd, rows, weight, bias, groups, _EPS, *before, spans, *flags)
    mean, mean_residual, rstd = stats
    scale = torch.stack([restore(mean + mean_residual), restore(1 / rstd)])
    if config.missing_values:  # a missing value has the statistics at the last value before it
        before_x = torch.stack([state.mean, state.var.sqrt()]) if state else scale.new_zeros(2, len(x), x.shape[2])
        position = torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]
        last = torch.where(x.isnan(), 0, position).cummax(1).values
        scale = torch.cat([before_x[:, :, None], scale], 2).gather(2, last.expand_as(scale))
    seen = x.isnan().logical_not().cumsum(1)  # values so far
    if state:
        seen = seen + state.count.view(len(x), 1, -1)
    return scale[0].where(seen > 0, torch.nan), scale[1].where(seen > 1, torch.nan)


def _feature_rows(
    x: Tensor, config: MegalodonConfig, sequences: Sequences
) -> tuple[Tensor, Tensor | None, Callable[[Tensor], Tensor]]:
    """Return the norm's input, its spans, and a function from its output to x's layout.

    Without missing values, each feature of x is a group. With them, each feature of each sequence becomes a sequence of
    its own, packed without the missing values, so that its statistics count only present values.
    """
    if not config.missing_values:
        return x, sequences.spans, lambda y: y
    num_features, S = x.shape[2], num_sequences(x.shape[0], sequences.spans)
    sequence = token_sequences(x, sequences.spans)[..., None]
    # The new sequence of each number. Padding and missing values have the last key, which is none.
    key = sequence * num_features + torch.arange(num_features, device=x.device)
    key = key.where((sequence < S) & ~x.isnan(), S * num_features).flatten()
    counts = key.new_zeros(S * num_features + 1).index_add(0, key, torch.ones_like(key))
    ends = counts[:-1].cumsum(0)
    spans = torch.stack((ends - counts[:-1], ends), 1)
    order = key.argsort(stable=True)

    def restore(y: Tensor) -> Tensor:
        return torch.zeros_like(y.flatten()).index_copy(0, order, y.flatten()).view(x.shape)

    return x.flatten()[order].view(1, -1, 1), spans, restore


def _initial_state(
    rows: Tensor, config: MegalodonConfig, state: ScaleState, sequences: Sequences
) -> TimestepNormState | None:
    """Return the norm's initial state; with missing values it has a row for each feature of each sequence."""
    if not config.missing_values:
        return sequences.norm_state(rows.shape[-1], rows, state or None)
    if not state:
        return None
    residual = None if state.residual is None else state.residual.movedim(1, 2).reshape(-1, 2, 1)
    return TimestepNormState(state.count.flatten(), state.mean.view(-1, 1), state.var.view(-1, 1), residual)


def _states_by_sequence(state: TimestepNormState, config: MegalodonConfig) -> TimestepNormState:
    """Return the state of S sequences from the norm's, the inverse of :func:`_initial_state`."""
    if not config.missing_values:
        return state
    count, mean, var = (field.view(-1, config.num_features) for field in state[:3])
    return TimestepNormState(count, mean, var, state.residual.view(*count.shape, 2).movedim(2, 1))
