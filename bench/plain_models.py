"""Models in plain torch: MEGALODON and its encoder with our parameters; a Llama and a Transformer encoder of their size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import megalodon_ops as mo

from . import baselines


def megalodon(model: mo.Megalodon) -> mo.reference.Megalodon:
    """Return the reference with the model's own parameters, so that their gradients are the model's."""
    with torch.device("meta"):
        reference = mo.reference.Megalodon(model.config)
    reference.load_state_dict(dict(model.named_parameters(remove_duplicate=False)), assign=True)
    return reference


def megalodon_encoder(model: mo.MegalodonEncoder, numbers: Tensor) -> Tensor:
    """Features of one row of continuous input (1, L, F), by the ops of baselines.py.

    No dropout; L is at most the chunk size or a multiple of it.
    """
    x, config = _linear(model.embed, numbers), model.config
    chunk_size = min(config.chunk_size, x.shape[1])
    rotary = baselines.rotary(x.shape[1], chunk_size, config.z_dim // config.num_heads, x.device)
    for layer in model.layers:
        mega, nffn = layer.mega, layer.nffn
        t = _sequence_norm(mega.timenorm, x)
        c = baselines.bidirectional_cema(t, *mega.cema.coefficients())
        m = F.rms_norm(c.float(), (config.model_dim,), 1 + mega.rmsnorm.weight, config.norm_eps).to(x.dtype)
        q, k = baselines.normalized_qk(
            _linear(mega.wz, m), mega.gamma, mega.beta, num_heads=config.num_heads, rotary=rotary, eps=config.norm_eps
        )
        v = F.silu(_linear(mega.wv, t)).unflatten(-1, (config.num_heads, -1))
        a = baselines.attention_sdpa(q, k, v, chunk_size=chunk_size, causal=False).flatten(-2)
        y = x + _linear(mega.wh1, m) + _linear(mega.wh2, a * F.silu(_linear(mega.wr, m)))
        n = F.layer_norm(y.float(), (config.model_dim,), 1 + nffn.norm.weight, nffn.norm.bias, config.norm_eps)
        x = x + _linear(nffn.fc2, F.silu(_linear(nffn.fc1, n.to(x.dtype))))
    return _sequence_norm(model.final_norm, x)


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight, layer.bias)


def _sequence_norm(norm: mo.SequenceNorm, x: Tensor) -> Tensor:
    groups = x.float().unflatten(-1, (norm.num_groups, -1))  # (B, L, G, D / G)
    var, mean = torch.var_mean(groups, (1, 3), correction=0, keepdim=True)
    return (((groups - mean) * (var + norm.eps).rsqrt()).flatten(-2) * (1 + norm.weight) + norm.bias).to(x.dtype)


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
        """A Llama with the layers and width of `model`, and hidden units chosen so that the parameter counts match."""
        config = model.config
        fixed = 2 * config.vocab_size * config.model_dim + 4 * config.num_layers * config.model_dim**2
        hidden = (model.num_parameters() - fixed) / (3 * config.num_layers * config.model_dim)
        return cls(config.vocab_size, config.model_dim, config.num_layers, 64 * round(hidden / 64))

    def forward(self, tokens: Tensor, caches: list[tuple[Tensor, Tensor]] | None = None, past: int = 0) -> Tensor:
        """Logits of tokens (B, L) after `past` cached ones; caches: keys and values (B, H, capacity, 64) per layer."""
        x = self.embed(tokens)
        position = torch.arange(past, past + tokens.shape[1], dtype=torch.float32)
        angle = position[:, None] * 10000.0 ** (torch.arange(0, self.head_dim, 2) / -self.head_dim)
        cos, sin = (t.to(x.dtype) for t in (angle.cos(), angle.sin()))  # (L, 32)
        for index, layer in enumerate(self.layers):
            x = layer(x, cos, sin, None if caches is None else caches[index], past)
        return self.output(self.norm(x)).float()

    def caches(self, capacity: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of `capacity` positions for each layer, with random values."""
        weight = self.embed.weight
        pair = (2, 1, weight.shape[1] // self.head_dim, capacity, self.head_dim)
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
        causal = x.shape[1] > 1  # a call with a cache takes one token, or starts with an empty cache
        a = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        x = x + self.out(a.transpose(1, 2).flatten(-2))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


# torch's fast path for inference keeps all scores in memory, and takes five times as long on a CPU.
torch.backends.mha.set_fastpath_enabled(False)


class TransformerEncoder(nn.Module):
    """torch's Transformer encoder with the parameter count, inputs and outputs of a MEGALODON encoder of `config`.

    Positions are encoded by sines; a row is classified by a linear layer of its mean over positions. `patch` positions of
    continuous input are joined into one, as is usual for rows that are too long for full attention.
    """

    def __init__(self, config: mo.MegalodonEncoderConfig, *, heads: int = 4, patch: int = 1) -> None:
        super().__init__()
        D, layers, features = config.model_dim, config.num_layers, config.num_features
        self.patch = patch
        self.embed = nn.Embedding(config.vocab_size, D) if features is None else nn.Linear(patch * features, D)
        self.classes = None if config.num_classes is None else nn.Linear(D, config.num_classes)
        outside = sum(p.numel() for p in self.parameters()) + 2 * D  # including the last norm
        hidden = ((config.num_parameters() - outside) / layers - 4 * D**2 - 9 * D) / (2 * D + 1)
        layer = nn.TransformerEncoderLayer(D, heads, round(hidden), 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, nn.LayerNorm(D), enable_nested_tensor=False)
        for parameter in self.layers.parameters():  # all layers start as equal copies
            if parameter.ndim == 2:
                nn.init.xavier_uniform_(parameter)

    def features(self, inputs: Tensor, padding: Tensor | None = None) -> Tensor:
        """Features (B, L, D) of tokens (B, L) or numbers (B, L, F); padding (B, L): True where a position is padding."""
        x = self.embed(inputs)
        return self.layers(x + _sines(*x.shape[1:]), src_key_padding_mask=padding)

    def forward(self, inputs: Tensor, *, lengths: Tensor) -> Tensor:
        """Logits (B, classes) of rows with `lengths` (B,) positions each."""
        if self.patch > 1:
            inputs = F.pad(inputs, (0, 0, 0, -inputs.shape[1] % self.patch)).unflatten(1, (-1, self.patch)).flatten(2)
            lengths = -(-lengths // self.patch)
        padding = torch.arange(inputs.shape[1]) >= lengths[:, None]
        x = self.features(inputs, padding).masked_fill(padding[..., None], 0)
        return self.classes(x.sum(1) / lengths[:, None])


def _sines(length: int, dim: int) -> Tensor:
    """Positional encoding (L, D) of arXiv 1706.03762."""
    angle = torch.arange(length)[:, None] * 10000.0 ** (torch.arange(0, dim, 2) / -dim)
    return torch.stack((angle.sin(), angle.cos()), -1).flatten(1)
