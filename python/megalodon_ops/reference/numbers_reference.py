"""A model of numbers in plain PyTorch: standardized inputs, then the layers of a model of tokens."""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from megalodon_ops.reference.megalodon_reference import Megalodon

_INVERSE_EPS = 1e30
"""1 / eps, where eps = 1e-30 is added to a variance, so that a constant feature, x - mean = 0, gives zeros"""


class MegalodonOfNumbers(Megalodon):
    """The model of a :class:`MegalodonConfig` with `num_features`, as :class:`Megalodon` is that of tokens.

    With `scale_inputs`, its state ends with the statistics of the inputs: count, mean and variance (B, F).
    """

    def __init__(self, config: Any) -> None:
        token_fields = dict(num_features=None, missing_values=False, scale_emb=False)
        super().__init__(dataclasses.replace(config, vocab_size=config.num_outputs, output_size=-1, **token_fields))
        self.inputs = config
        self.embed = nn.Linear(config.input_width, config.model_dim)

    def fresh(self, num_sequences: int) -> tuple[Tensor, ...]:
        state = super().fresh(num_sequences)
        count = state[0].new_zeros(num_sequences, self.inputs.num_features)
        return (*state, count, count.double(), count.double()) if self.inputs.scale_inputs else state

    def forward(self, x: Tensor, state: tuple[Tensor, ...] | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the outputs (B, L, outputs) of numbers (B, L, F), and the state after them."""
        state = self.fresh(x.shape[0]) if state is None else state
        statistics = ()
        if self.inputs.scale_inputs:
            *state, count, mean, var = state
            x, statistics = running_scale(x, count, mean, var, missing_values=self.inputs.missing_values)
        y, state = super().forward(x.to(self.embed.weight.dtype), tuple(state))
        return y, (*state, *statistics)


def running_scale(
    x: Tensor, count: Tensor, mean: Tensor, var: Tensor, *, missing_values: bool
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Standardize x (B, L, F) by its mean and deviation so far, in float64; return it and the new statistics (B, F)."""
    x = x.double()
    present = ~x.isnan() if missing_values else torch.ones_like(x, dtype=torch.bool)
    mean = mean.where(count > 0, _first(x, present))[:, None]
    counts = count[:, None] + present.cumsum(1)
    n = counts.clamp(min=1).double()
    means = mean + (x - mean).where(present, 0).cumsum(1) / n
    distance = (x - means).where(present, 0)
    added = distance.square() * (n / (n - 1).clamp(min=1))  # as in the timestep norm
    variances = (count[:, None] * var[:, None] + added.cumsum(1)) / n
    return _scaled(distance, variances, present, missing_values), (counts[:, -1], means[:, -1], variances[:, -1])


def sequence_scale(x: Tensor, valid: Tensor, *, missing_values: bool) -> Tensor:
    """Standardize x (B, L, F) by the mean and deviation of its valid (B, L, 1) positions, in float64."""
    x = x.double()
    present = valid & ~x.isnan() if missing_values else valid.expand_as(x)
    n = present.sum(1, keepdim=True).clamp(min=1)
    first = _first(x, present)[:, None]
    distance = (x - first).where(present, 0)
    distance = (distance - distance.sum(1, keepdim=True) / n).where(present, 0)
    var = distance.square().sum(1, keepdim=True) / n
    return _scaled(distance, var, present, missing_values)


def _scaled(distance: Tensor, var: Tensor, present: Tensor, missing_values: bool) -> Tensor:
    # distance / sqrt(var + eps), for torch's exporter, which drops a sum with eps
    y = distance * ((var * _INVERSE_EPS + 1).rsqrt() * _INVERSE_EPS**0.5)
    return torch.cat((y, (~present).to(y.dtype)), -1) if missing_values else y


def _first(x: Tensor, present: Tensor) -> Tensor:
    """Return the first present value (B, F) of each feature, so that constant features have exact means."""
    return x.where(present, 0).gather(1, present.int().argmax(1, keepdim=True))[:, 0]
