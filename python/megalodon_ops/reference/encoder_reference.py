"""MEGALODON's encoder in plain PyTorch: real arithmetic, no kernels, no custom ops. Letters as in megalodon_reference.py.

An encoder has a norm by statistics of the whole row, CEMA in both directions and attention to the whole chunk."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalodon_ops.reference.megalodon_reference import CEMA, NFFN, Attention, TimestepNorm, _angle, _real, _wide
from megalodon_ops.reference.numbers_reference import sequence_scale

LONGEST = 1 << 17
"""Most positions of a row; with them, the scores of one head would take 64 GiB"""


class SequenceNorm(TimestepNorm):
    """Group norm by the statistics of a row."""

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """Normalize x (B, L, D) at the valid (B, L, 1) positions; the others become zero."""
        groups, inside = x.to(_wide(x)).unflatten(-1, (self.num_groups, -1)), valid[..., None].to(_wide(x))
        n = inside.sum(1, keepdim=True) * groups.shape[-1]
        mean = (groups * inside).sum((1, 3), keepdim=True) / n
        var = ((groups - mean) * inside).square().sum((1, 3), keepdim=True) / n
        y = ((groups - mean) * (var + self.eps).rsqrt()).flatten(-2).to(_real(x))
        return (y * (1 + self.weight) + self.bias).where(valid, 0).to(x.dtype)


class BidirectionalCEMA(CEMA):
    """CEMA of the positions up to each one, with the first D rows of the parameters, and of those after it."""

    def __init__(self, dim: int, ndim: int) -> None:
        super().__init__(2 * dim, ndim, LONGEST)
        self.omega = nn.Parameter(torch.randn(dim, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, L, D), zero after the end of a row, to y."""
        both = torch.cat((x, x.flip(1)), -1).to(self.alpha.dtype)
        h = both.new_zeros(x.shape[0], *self.alpha.shape[:2])
        y, _ = self.scan(both, (h, h), *self.matrices(both.shape[1]))
        before, after = y.chunk(2, -1)
        after = F.pad(after.flip(1)[:, 1:], (0, 0, 0, 1))  # without the position itself
        return (before + after + self.omega.squeeze(-1) * x).to(x.dtype)


class EncoderAttention(Attention):
    """First half of an encoder's block."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.timenorm = SequenceNorm(config.model_dim, config.norm_num_groups, config.norm_eps)
        self.cema = BidirectionalCEMA(config.model_dim, config.cema_ndim)

    def forward(self, x: Tensor, valid: Tensor, angle: Tensor, seen: Tensor) -> Tensor:
        """Map x (B, L, D) to y; seen (B, 1, L, L): the keys of each query."""
        t = self.timenorm(x, valid)
        m = self.rmsnorm(self.cema(t))
        q, k, v = self.heads(m, t, angle)
        scores = q @ k.mT
        a = scores.to(_real(scores)).masked_fill(~seen, -1e30).softmax(-1).to(v.dtype) @ v
        return x + self.wh1(m) + self.wh2(a.transpose(1, 2).flatten(-2) * F.silu(self.wr(m)))


class MegalodonEncoder(nn.Module):
    """The encoder of a :class:`MegalodonEncoderConfig`, with the parameters of :class:`megalodon_ops.MegalodonEncoder`.

    Scores take the memory of B L^2, as if attention saw whole rows.

    Example:
        >>> import torch, megalodon_ops as mo
        >>> config = mo.MegalodonEncoderConfig(num_layers=1, model_dim=32, z_dim=16, value_dim=32, ffn_hidden_dim=32, vocab_size=9)
        >>> encoder, reference = mo.MegalodonEncoder(config), mo.reference.MegalodonEncoder(config)
        >>> rows, lengths = torch.randint(9, (2, 20)), torch.tensor([20, 13])
        >>> _ = reference.load_state_dict(encoder.state_dict())
        >>> torch.allclose(reference(rows, lengths), encoder(rows, lengths=lengths), atol=1e-4)
        True
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        D, features, classes = config.model_dim, config.num_features, config.num_classes
        self.embed = nn.Embedding(config.vocab_size, D) if features is None else nn.Linear(config.input_width, D)
        blocks = (dict(mega=EncoderAttention(config), nffn=NFFN(config)) for _ in range(config.num_layers))
        self.layers = nn.ModuleList(map(nn.ModuleDict, blocks))
        self.final_norm = SequenceNorm(D, config.norm_num_groups, config.norm_eps)
        self.classifier = None
        if classes is not None:
            self.classifier = nn.ModuleDict(dict(proj=nn.Linear(D, D), classes=nn.Linear(D, classes)))

    def forward(self, inputs: Tensor, lengths: Tensor) -> Tensor:
        """Return the logits (B, classes) of rows (B, L) or (B, L, F) with `lengths` (B,) positions, or their features."""
        config, position = self.config, torch.arange(inputs.shape[1], device=inputs.device)
        valid = (position < lengths[:, None])[..., None]
        chunk = position // config.chunk_size
        seen = ((chunk[:, None] == chunk) & valid.mT)[:, None]
        x = self._embed(inputs, valid)
        angle = _angle(position[None, :, None], x, config)
        for layer in self.layers:
            y = layer["mega"](x, valid, angle, seen)
            x = x + layer["nffn"](y)
        x = self.final_norm(x, valid)
        if self.classifier is None:
            return x
        h = F.silu(self.classifier["proj"](x) + x).where(valid, 0)
        pooled = (h.sum(1, dtype=_wide(h)) / lengths[:, None]).to(x.dtype)
        return self.classifier["classes"](pooled).to(_real(x))

    def _embed(self, inputs: Tensor, valid: Tensor) -> Tensor:
        config = self.config
        if config.num_features is None:
            return self.embed(inputs) * (math.sqrt(config.model_dim) if config.scale_emb else 1.0)
        if config.scale_inputs:
            inputs = sequence_scale(inputs, valid, missing_values=config.missing_values)
        return self.embed(inputs.where(valid, 0).to(self.embed.weight.dtype))
