"""`Forecaster`: quantiles of future values, their loss, and samples from them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..ops.common.checks import check_size
from ..public_models import Megalodon, MegalodonState

_LEAST_DEVIATION = 1e-14
"""Of equal values, `Megalodon.input_scale` gives the deviation 1e-15"""


class Forecaster(nn.Module):
    """A model of numbers whose outputs are quantiles of the values at H horizons, in the data's units.

    The first T columns of the inputs (B, L, F) are forecast; the others are covariates. Each row is a series, and may
    have its own scale: the loss is computed in units of each series's deviation so far.

    Args:
        model: with `num_features=F`, `scale_inputs` and `output_size=T * H * Q`.
        horizons: H positive numbers of positions ahead.
        levels: Q increasing probabilities between 0 and 1, at least 2.
        num_targets: T.
        burn_in: values of a series that its mean and deviation need before its forecasts count in the loss.

    Example:
        >>> import torch, megalodon_ops as mo
        >>> from megalodon_ops.forecasting import Forecaster
        >>> config = mo.MegalodonConfig(num_layers=1, model_dim=32, z_dim=16, value_dim=32, ffn_hidden_dim=32,
        ...                             num_features=1, output_size=2 * 3)
        >>> forecaster = Forecaster(mo.Megalodon(config), horizons=(1, 12), levels=(0.1, 0.5, 0.9))
        >>> x = torch.randn(4, 100, 1)
        >>> forecaster.loss(x).backward()
        >>> quantiles, state = forecaster(x)
        >>> quantiles.shape, forecaster.sample(quantiles[:, -1], 50).shape
        (torch.Size([4, 100, 1, 2, 3]), torch.Size([50, 4, 1, 2]))
    """

    def __init__(
        self,
        model: Megalodon,
        *,
        horizons: Sequence[int],
        levels: Sequence[float],
        num_targets: int = 1,
        burn_in: int = 24,
    ) -> None:
        super().__init__()
        self.model, self.burn_in = model, burn_in
        self.horizons = [check_size("Forecaster", "horizons", horizon) for horizon in horizons]
        levels = torch.as_tensor(levels, dtype=torch.float64)
        if len(levels) < 2 or not bool((levels.diff() > 0).all() and levels[0] > 0 and levels[-1] < 1):
            raise ValueError(
                f"Forecaster: `levels` must be at least 2 increasing numbers in (0, 1), got {levels.tolist()}."
            )
        self.register_buffer("levels", levels, persistent=False)
        self._shape = (check_size("Forecaster", "num_targets", num_targets), len(self.horizons), len(levels))
        config, size = model.config, levels.new_empty(self._shape).numel()
        if config.num_outputs != size or config.num_features is None or not num_targets <= config.num_features:
            expected = f"at least {num_targets} num_features and output_size = {size}, targets x horizons x levels"
            got = f"{config.num_features} and {config.num_outputs}"
            raise ValueError(f"Forecaster: `model` must have {expected}, got {got}.")

    def forward(self, x: Tensor, state: MegalodonState | None = None) -> tuple[Tensor, MegalodonState]:
        """Return the quantiles (B, L, T, H, Q) after each position of x (B, L, F), and the new state.

        Quantiles are float64, and NaN where a series has fewer than two values so far.
        """
        outputs, new_state = self.model(x, state=state, return_state=True)
        mean, deviation = self._scale(x, state)
        return mean[..., None] + deviation[..., None] * outputs.unflatten(-1, self._shape), new_state

    def loss(self, x: Tensor, values: Tensor | None = None, *, state: MegalodonState | None = None) -> Tensor:
        """Mean quantile loss of the forecasts, in units of the deviation of each series so far.

        Left out are values that are missing or beyond the row's end, and positions without a scale: before `burn_in`
        values of a series, unless it continues a `state`, and where all its values are equal.

        Args:
            x: (B, L, F), NaN where a value is missing or hidden.
            values: (B, N, T) with N >= L, the series to forecast; None: the first T columns of x.
        """
        T = self._shape[0]
        known = True
        future = self.future(x[..., :T] if values is None else values)[:, : x.shape[1]]
        mean, deviation = self._scale(x, state)
        if state is None:
            known = (x[..., :T].isfinite().cumsum(1) > self.burn_in)[..., None]
        known = known & future.isfinite() & (deviation > _LEAST_DEVIATION)
        outputs = self.model(x, state=state).unflatten(-1, self._shape)
        error = ((future - mean) / deviation).where(known, 0)[..., None] - outputs
        losses = torch.maximum(self.levels * error, (self.levels - 1) * error)
        return (losses * known[..., None]).sum() / (known.sum() * len(self.levels)).clamp(min=1)

    def future(self, values: Tensor) -> Tensor:
        """Return the values (B, L, T, H) at each horizon after the positions of `values` (B, L, T), NaN after the end."""
        padded = nn.functional.pad(values, (0, 0, 0, max(self.horizons)), value=torch.nan)
        return torch.stack([padded[:, horizon : horizon + values.shape[1]] for horizon in self.horizons], -1)

    def known_ahead(self, covariates: Tensor) -> Tensor:
        """Return columns (B, L, K * H) for x: at each position, the covariates (B, L + max(horizons), K) at each horizon.

        For what is known in advance, such as the calendar or a price list.
        """
        return self.future(covariates)[:, : covariates.shape[1] - max(self.horizons)].flatten(2)

    def sample(self, quantiles: Tensor, num_samples: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw values (num_samples, ...) at each horizon, independently, from quantiles (..., Q).

        The distribution function is linear between neighbouring quantiles, and beyond the outermost by their slope.
        """
        quantiles, levels = quantiles.sort(-1).values, self.levels
        u = torch.rand(
            num_samples, *quantiles.shape[:-1], generator=generator, dtype=levels.dtype, device=levels.device
        )
        low = torch.searchsorted(levels[1:-1], u)
        share = (u - levels[low]) / (levels[low + 1] - levels[low])
        first, second = (quantiles.expand(*u.shape, -1).gather(-1, i[..., None])[..., 0] for i in (low, low + 1))
        return first + share * (second - first)

    def _scale(self, x: Tensor, state: MegalodonState | None) -> tuple[Tensor, Tensor]:
        """Return the mean and deviation (B, L, T, 1) of the series to forecast."""
        mean, deviation = self.model.input_scale(x, state=state)
        return mean[..., : self._shape[0], None], deviation[..., : self._shape[0], None]
