"""Models in plain torch to compare with: MEGALODON from the same parameters, and a Llama of the same size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import megalodon_ops as mo

from . import baselines


def megalodon(model: mo.Megalodon, tokens: Tensor) -> Tensor:
    """Logits of `model` by the ops of baselines.py; no dropout, L at most the chunk size or a multiple of it."""
    config = model.config
    chunk_size = min(config.chunk_size, tokens.shape[1])
    key_dim = config.z_dim // config.num_heads
    rotary = baselines.rotary(tokens.shape[1], chunk_size, key_dim, tokens.device)
    x = F.embedding(tokens, model.embed.weight)
    for layer in model.layers:
        mega, nffn = layer.mega, layer.nffn
        t = _timestep_norm(mega.timenorm, x)
        c = baselines.cema_blocks(t, *mega.cema.coefficients())
        m = F.rms_norm(c.float(), (config.model_dim,), 1 + mega.rmsnorm.weight, config.norm_eps).to(x.dtype)
        q, k = baselines.normalized_qk(
            _linear(mega.wz, m), mega.gamma, mega.beta, num_heads=config.num_heads, rotary=rotary, eps=config.norm_eps
        )  # fmt: skip
        v = F.silu(_linear(mega.wv, t)).unflatten(-1, (config.num_heads, -1))
        a = baselines.attention_row_blocks(q, k, v, chunk_size=chunk_size).flatten(-2)
        y = x + _linear(mega.wh1, m) + _linear(mega.wh2, a * F.silu(_linear(mega.wr, m)))
        n = F.layer_norm(y.float(), (config.model_dim,), 1 + nffn.norm.weight, nffn.norm.bias, config.norm_eps)
        x = x + _linear(nffn.fc2, F.silu(_linear(nffn.fc1, n.to(x.dtype))))
    return F.linear(_timestep_norm(model.output.final_norm, x), model.output.output.weight).float()


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight, layer.bias)


def _timestep_norm(norm: mo.TimestepNorm, x: Tensor) -> Tensor:
    return baselines.timestep_norm(x, norm.weight, norm.bias, num_groups=norm.num_groups, eps=norm.eps)


class Llama(nn.Module):
    """RMS norm, rotary attention by SDPA with heads of 64, SwiGLU; optionally a cache of keys and values."""

    head_dim = 64

    def __init__(self, vocab: int, dim: int, num_layers: int, hidden: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, dim)
        self.layers = nn.ModuleList(_LlamaLayer(dim, hidden, dim // self.head_dim) for _ in range(num_layers))
        self.norm = nn.RMSNorm(dim)
        self.output = nn.Linear(dim, vocab, bias=False)

    @classmethod
    def sized_like(cls, model: mo.Megalodon) -> Llama:
        """A Llama with the layers and width of `model`, and hidden units until the numbers of parameters are equal."""
        config = model.config
        fixed = 2 * config.vocab_size * config.model_dim + 4 * config.num_layers * config.model_dim**2
        hidden = (model.num_parameters() - fixed) / (3 * config.num_layers * config.model_dim)
        return cls(config.vocab_size, config.model_dim, config.num_layers, 64 * round(hidden / 64))

    def forward(self, tokens: Tensor, caches: list[tuple[Tensor, Tensor]] | None = None, past: int = 0) -> Tensor:
        """Logits of tokens (B, L) after `past` cached ones; caches: keys and values (B, H, room, 64) a layer."""
        x = self.embed(tokens)
        position = torch.arange(past, past + tokens.shape[1], dtype=torch.float32)
        angle = position[:, None] * 10000.0 ** (torch.arange(0, self.head_dim, 2) / -self.head_dim)
        cos, sin = (t.to(x.dtype) for t in (angle.cos(), angle.sin()))  # (L, 32)
        for index, layer in enumerate(self.layers):
            x = layer(x, cos, sin, None if caches is None else caches[index], past)
        return self.output(self.norm(x)).float()

    def caches(self, room: int) -> list[tuple[Tensor, Tensor]]:
        weight = self.embed.weight
        pair = (2, 1, weight.shape[1] // self.head_dim, room, self.head_dim)
        return [torch.randn(pair, dtype=weight.dtype).unbind() for _ in self.layers]


class _LlamaLayer(nn.Module):
    def __init__(self, dim: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.gate_up = nn.Linear(dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: tuple[Tensor, Tensor] | None, past: int) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        q, k = _rotated(q, cos, sin), _rotated(k, cos, sin)
        if cache is not None:
            end = past + x.shape[1]
            cache[0][:, :, past:end], cache[1][:, :, past:end] = k, v
            k, v = cache[0][:, :, :end], cache[1][:, :, :end]
        causal = x.shape[1] > 1  # a call with a cache takes one token, or starts from nothing
        a = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        x = x + self.out(a.transpose(1, 2).flatten(-2))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)
