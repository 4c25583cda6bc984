"""Models of the claims by name: MEGALODON, the Llama of its size, MEGALODON with one part exchanged or with Gecko's parts.

Each exchange leaves the rest unchanged. "no ema" has more hidden units in the feed-forward half, to replace CEMA's
parameters. "ema" keeps the unused parameters of angles and imaginary parts, 1 % of the 1M model's.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import megalodon_ops as mo
from megalodon_ops.model.layers import StateSlot
from megalodon_ops.ops.common.states import TimestepNormState

from bench.plots import BLUE, ORANGE

from . import gecko
from .llama import Llama

MEGALODON, LLAMA = "megalodon", "llama"
COLOURS = {MEGALODON: BLUE, LLAMA: ORANGE}


def build(name: str, config: mo.MegalodonConfig, window: int, seed: int) -> nn.Module:
    """Build the model `name` in the size of `config`; `window`: tokens in the Llama's state."""
    torch.manual_seed(seed)
    if name == LLAMA:
        return Llama.sized_like(config, window)
    if name == MEGALODON:
        return mo.Megalodon(config)
    if name in gecko.PARTS:
        return gecko.Gecko(config, gecko.PARTS[name])
    if name not in ABLATIONS:
        raise ValueError(f"no model {name!r}: {', '.join((MEGALODON, LLAMA, *ABLATIONS, *gecko.PARTS))}")
    if name == NO_EMA:
        freed = config.model_dim * (4 * config.cema_ndim + 2)  # parameters of CEMA
        of_a_hidden_unit = (3 if config.swiglu else 2) * config.model_dim
        hidden = config.ffn_hidden_dim + round(freed / of_a_hidden_unit)
        config = dataclasses.replace(config, ffn_hidden_dim=hidden)
    return ABLATIONS[name](mo.Megalodon(config))


class PositionNorm(mo.TimestepNorm):
    """Layer norm in place of timestep norm: each position by its own mean and variance over all channels."""

    def forward(
        self, x: Tensor, *, new_state: StateSlot | None = None, spans: Tensor | None = None, **_: Any
    ) -> Tensor:
        sequences = x.shape[0] if spans is None else len(spans)
        zeros = torch.zeros(sequences, self.num_groups, device=x.device)
        count = torch.zeros(sequences, dtype=torch.int64, device=x.device)
        residual = zeros.new_zeros(sequences, 2, self.num_groups)
        if new_state is not None:
            new_state.state = TimestepNormState(count, zeros, zeros.clone(), residual)
        return mo.layer_norm(x, self.weight, self.bias, eps=self.eps)


class NoEMA(nn.Module):
    """Identity in place of CEMA."""

    def __init__(self, dim: int, ndim: int) -> None:
        super().__init__()
        self.shape = (dim, ndim)

    def forward(
        self, x: Tensor, *, new_state: StateSlot | None = None, spans: Tensor | None = None, **_: Any
    ) -> Tensor:
        sequences = x.shape[0] if spans is None else len(spans)
        if new_state is not None:
            new_state.state = torch.zeros(sequences, *self.shape, dtype=torch.complex64, device=x.device)
        return x


class OneHopBlock(mo.MegalodonBlock):
    """Block whose feed-forward half adds to its own input, not to the block's."""

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        y = self.mega(x, **options)
        return y + self.nffn(y)


class PlainGain(nn.Module):
    """Gain for scores q k / sqrt(K) of unnormalized z, with a kernel that divides z by sqrt(mean(z^2) + EPS).

    The mean is negligible beside EPS = 10^12, so the kernel divides every z by 10^6, and this gain multiplies by it.
    """

    EPS = 1e12

    def __init__(self, key_dim: int) -> None:
        super().__init__()
        self.factor = self.EPS**0.5 * key_dim**0.25

    def forward(self, gamma: Tensor) -> Tensor:
        return self.factor * (1 + gamma) - 1


def layer_norms(model: mo.Megalodon) -> mo.Megalodon:
    for module in [*model.modules()]:
        if type(module) is mo.TimestepNorm:
            module.__class__ = PositionNorm
    return model


def real_ema(model: mo.Megalodon) -> mo.Megalodon:
    """Set all angles to 0, so that q is real: the multi-dimensional damped EMA of Mega."""
    for layer in model.layers:
        theta = layer.mega.cema.theta.requires_grad_(False)
        theta.fill_(-1e4)  # sigmoid 0
    return model


def without_ema(model: mo.Megalodon) -> mo.Megalodon:
    for layer in model.layers:
        layer.mega.cema = NoEMA(model.config.model_dim, model.config.cema_ndim)
    return model


def plain_attention(model: mo.Megalodon) -> mo.Megalodon:
    """Use queries and keys of unnormalized z, with the gains and offsets of the normalized attention."""
    for layer in model.layers:
        config = layer.mega.config
        layer.mega.config = dataclasses.replace(config, norm_eps=PlainGain.EPS)  # read by the attention alone
        parametrize.register_parametrization(
            layer.mega, "gamma", PlainGain(config.z_dim // config.num_heads), unsafe=True
        )
    return model


def one_hop(model: mo.Megalodon) -> mo.Megalodon:
    for layer in model.layers:
        layer.__class__ = OneHopBlock
    return model


NO_EMA = "no ema"
ABLATIONS: dict[str, Callable[[mo.Megalodon], mo.Megalodon]] = {
    "layer norm": layer_norms,
    "ema": real_ema,
    NO_EMA: without_ema,
    "plain attention": plain_attention,
    "one hop": one_hop,
}
