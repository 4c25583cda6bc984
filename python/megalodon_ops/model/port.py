"""Checkpoints of the pure-PyTorch port `megalodon-hf` 0.1.5: what of them can be read, and how its function differs.

Renamed and rearranged, the port's parameters are the model's, and so is all that it computes but for its timestep norm:

    n_t = t;  gm_t: the mean of step t inside a group;  mean_t = mean of gm_1 .. gm_t
    var_t = max(1e-6, (1 + sum_{i <= t} (gm_i - mean_{i-1}) (gm_i - mean_i)) / n_t)        mean_0 = 0

The variance inside a group is left out, and a variance of 1 counts as one step. `difference` says what that does.

    ours (layers.i.)                    port (model.layers.i.)
    mega.timenorm.*                     attn.timenorm.*, left out where norm_affine is False (zeros)
    mega.cema.gamma[..., 0], [..., 1]   attn.cema.gamma_real, gamma_imag
    mega.cema.omega (D, 1)              attn.cema.omega (D,)
    mega.rmsnorm.weight                 attn.rmsnorm.gamma
    mega.{wz.*, gamma, beta}            the same, a head's even numbers first and then its odd ones (its rotary pairs)
    mega.wh1.bias                       attn.wh1.bias + attn.wh2.bias
    nffn.norm.weight                    ffn.norm.weight - 1
    nffn.alpha                          the constant 0.1 * 0.5^i
    output.final_norm.*                 model.norm.*

The biases of the port's fc1, fc2 and fc3 have no counterpart: a checkpoint in which one is not zero is refused. Its
`attention_dropout` is of probabilities after the softmax, here of keys (in training alone). Its `max_cache_len` and
`cache_unbounded` let decoding with a cache look beyond the chunk that training and whole sequences attend in: see
`looks_beyond_its_chunk`.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .checkpoint import CONFIG, check_folder, transformers_fields
from .config import MegalodonConfig
from .files import read_json
from .model import Megalodon
from .pth import check_tensor, read_pth
from .weights import INDEX, WHOLE, WeightFiles
from ..ops.memory import check_fits, is_finite
from ..ops.values import shown

_BIN = "pytorch_model.bin"
_LEAST_VARIANCE = 1e-6
_ROWS = 256  # of logits that are compared at once
_OF_THE_PORT = {
    "max_positions", "max_cache_len", "cache_unbounded", "efficient_attn", "gradient_checkpointing",
    "num_attention_heads",
}  # fmt: skip
_UNUSED = ("fc1.bias", "fc2.bias", "fc3.bias")


class Difference(NamedTuple):
    """How the port's function and the converted model differ on some tokens."""

    tokens: int
    spread: float
    """standard deviation of the model's logits"""
    largest: float
    """of the absolute differences of logits"""
    root_mean_square: float
    """of the differences of logits"""
    model_loss: float
    """nats a next token"""
    port_loss: float
    agreement: float
    """share of steps whose likeliest next token is the same"""

    def paragraph(self) -> str:
        """One paragraph that says what differs and by how much."""
        return (
            "The port's timestep norm is another function: it leaves out the variance inside a group and counts a variance "
            "of 1 as one step, so the converted weights do not compute what they were trained for. Everything else is the "
            f"same up to rounding. On {self.tokens} tokens the logits of the converted model, whose spread is "
            f"{self.spread:.4g}, differ from those under the port's norm by {self.root_mean_square:.4g} (root mean square) "
            f"and {self.largest:.4g} at most; a next token costs {self.model_loss:.4f} nats instead of "
            f"{self.port_loss:.4f}, and the likeliest next token is the same at {self.agreement:.1%} of the steps."
        )


def load_port(directory: Path, *, dtype: torch.dtype = torch.float32) -> Megalodon:
    """A model with the parameters of a folder that the port wrote, in evaluation mode; see :func:`difference`.

    The folder holds `config.json` and `model.safetensors`, or shards of it, or `pytorch_model.bin`. Faults are
    ValueErrors that name the file, or FileNotFoundErrors.
    """
    check_folder(directory)
    config = _config(directory / CONFIG)
    check_fits(config.num_parameters() * dtype.itemsize, f"{directory}: a model of its configuration")
    source = _Tensors(directory)
    plan = list(_plan(config, source))
    for name in source.left:
        raise ValueError(f"{directory}: {shown(name)} is no parameter of the port's version 0.1.5")
    with torch.device("meta"):
        model = Megalodon(config).to(dtype)
    kinds = {name: parameter.dtype for name, parameter in model.named_parameters()}
    values = {}
    for name, make in plan:
        values[name] = make().to(kinds[name]).contiguous()
        if not is_finite(values[name]):
            raise ValueError(f"{directory}: `{name}` must be finite as {kinds[name]}, got NaN or infinity")
    if config.share_emb:
        values["output.output.weight"] = values["embed.weight"]
    model.load_state_dict(values, strict=True, assign=True)
    model.tie_weights()
    return model.eval()


def looks_beyond_its_chunk(directory: Path) -> bool:
    """Whether the port, when it decodes with a cache, attends to earlier chunks; no model here and no training there does."""
    fields = read_json(directory / CONFIG)
    return fields.get("cache_unbounded") is True or fields.get("max_cache_len") not in (None, -1, fields["chunk_size"])


def difference(model: Megalodon, tokens: Tensor) -> Difference:
    """Compares the model's logits for tokens (1, L >= 2) with those that it has under the port's timestep norm."""
    with torch.inference_mode():
        logits = model(tokens)[0]
        norms = [(layer.mega, "timenorm") for layer in model.layers] + [(model.output, "final_norm")]
        before = [getattr(owner, name) for owner, name in norms]
        try:
            for (owner, name), norm in zip(norms, before, strict=True):
                setattr(owner, name, PortTimestepNorm(norm.weight, norm.bias, norm.num_groups, norm.eps))
            port = model(tokens)[0]
        finally:
            for (owner, name), norm in zip(norms, before, strict=True):
                setattr(owner, name, norm)
        return _compare(logits, port, tokens[0])


def _compare(logits: Tensor, port: Tensor, tokens: Tensor) -> Difference:
    """The figures of logits (L, V) after tokens (L,), a few rows at a time in float64."""
    targets = torch.cat([tokens[1:].where(tokens[1:] < logits.shape[-1], -100), tokens.new_tensor([-100])])
    mean, squares, gaps, largest, same = logits.mean(dtype=torch.float64), 0.0, 0.0, 0.0, 0
    losses = [0.0, 0.0]
    for rows in torch.arange(len(logits)).split(_ROWS):
        ours, theirs = logits[rows].double(), port[rows].double()
        squares += (ours - mean).square().sum().item()
        gaps += (ours - theirs).square().sum().item()
        largest = max(largest, (ours - theirs).abs().max().item())
        same += (ours.argmax(-1) == theirs.argmax(-1)).sum().item()
        for i, of_each in enumerate((ours, theirs)):
            losses[i] += nn.functional.cross_entropy(of_each, targets[rows], ignore_index=-100, reduction="sum").item()
    count = max(1, (targets >= 0).sum().item())
    return Difference(
        len(tokens), math.sqrt(squares / (logits.numel() - 1)), largest, math.sqrt(gaps / logits.numel()),
        losses[0] / count, losses[1] / count, same / len(tokens),
    )  # fmt: skip


def pseudo_text(vocab_size: int, length: int = 512) -> Tensor:
    """Tokens (1, length) as frequent as words of a text: token i with a probability in proportion to 1 / (i + 1)."""
    generator = torch.Generator().manual_seed(0)
    frequencies = 1 / torch.arange(1, vocab_size + 1, dtype=torch.float64)
    return torch.multinomial(frequencies, length, replacement=True, generator=generator)[None]


class PortTimestepNorm(nn.Module):
    """The port's timestep norm, of whole sequences from their start; its formula stands at the top of this file."""

    def __init__(self, weight: Tensor, bias: Tensor, num_groups: int, eps: float) -> None:
        super().__init__()
        self.weight, self.bias, self.num_groups, self.eps = weight, bias, num_groups, eps

    def forward(self, x: Tensor, **options: Any) -> tuple[Tensor, None]:
        """x (B, L, D) to (B, L, D) and no state."""
        if any(value is not None for name, value in options.items() if name != "return_state"):
            raise ValueError("PortTimestepNorm: takes whole sequences, without states, packing and padding.")
        B, L, D = x.shape
        groups = x.to(self.weight.dtype).reshape(B, L, self.num_groups, -1)
        step_mean = groups.mean(-1)  # (B, L, G)
        count = torch.arange(1, L + 1, device=x.device, dtype=step_mean.dtype)[:, None]
        mean = step_mean.cumsum(1) / count
        before = torch.cat([torch.zeros_like(mean[:, :1]), mean[:, :-1]], 1)
        var = ((1 + ((step_mean - before) * (step_mean - mean)).cumsum(1)) / count).clamp(min=_LEAST_VARIANCE)
        y = (groups - mean[..., None]) * (var[..., None] + self.eps).rsqrt()
        return (y.reshape(B, L, D) * (1 + self.weight) + self.bias).to(x.dtype), None


def _config(path: Path) -> MegalodonConfig:
    fields = read_json(path)
    known = {field.name for field in dataclasses.fields(MegalodonConfig)} - {"layerwise_ckpt", "init_mode", "share_emb"}
    try:
        if "max_positions" not in fields:
            raise ValueError("is not that of the port: `max_positions` is missing")
        if fields.get("efficient_attn") is not None:
            raise ValueError(f"`efficient_attn` must be null, got {shown(fields['efficient_attn'])}")
        for name in sorted(known - fields.keys()):
            raise ValueError(f"`{name}` is missing")
        allowed = known | _OF_THE_PORT | transformers_fields() | {"init_mode", "share_emb"}
        for name in fields:
            if name not in allowed:
                raise ValueError(f"{shown(name)} is an unknown field")
        values = {name: fields[name] for name in known}
        if values["output_size"] is None:
            values["output_size"] = -1
        tied = values["output_size"] in (-1, values["vocab_size"])  # whatever `share_emb` says
        recompute = fields.get("gradient_checkpointing") is True
        return MegalodonConfig(**values, share_emb=tied, layerwise_ckpt=recompute)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


class _Tensors:
    """The port's tensors by name, whatever kind of file they are in; `left` are those that nobody has asked for."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.files: WeightFiles | None = None
        self.loaded: dict[str, Tensor] = {}
        if any(os.path.lexists(directory / name) for name in (WHOLE, INDEX)):
            self.files = WeightFiles.of_folder(directory)
        else:
            self.loaded = read_pth(directory / _BIN)
        self.left = dict.fromkeys(self.files.found if self.files else self.loaded)

    def take(self, name: str, shape: tuple[int, ...]) -> Callable[[], Tensor]:
        """A function that reads the tensor, once its shape and dtype are right."""
        if name not in self.left:
            hint = "; checkpoints of older versions are not read" if "gamma_real" in name else ""
            raise ValueError(f"{self.directory}: `{name}` is missing{hint}")
        del self.left[name]
        if self.files is None:
            check_tensor(self.directory / _BIN, name, self.loaded[name], shape)
            return lambda: self.loaded[name].detach()
        self.files.check_one(name, shape)
        return lambda: self.files.get(name, self.files.found[name][0], torch.device("cpu"))


Plan = Iterator[tuple[str, Callable[[], Tensor]]]
"""A parameter's name and the function that makes it"""


def _plan(config: MegalodonConfig, source: _Tensors) -> Plan:
    D, V = config.model_dim, config.vocab_size
    yield "embed.weight", source.take("model.embed.weight", (V, D))
    for layer in range(config.num_layers):
        for name, make in _layer_plan(config, source, f"model.layers.{layer}.", layer):
            yield f"layers.{layer}.{name}", make
    yield from _norm_plan(config, source, "output.final_norm", "model.norm")
    head = "lm_head.weight"
    if not config.share_emb:
        yield "output.output.weight", source.take(head, (config.num_outputs, D))
    elif head in source.left and not torch.equal(source.take(head, (V, D))(), source_embedding(source, V, D)):
        raise ValueError(
            f"{source.directory}: `{head}` must be the embedding, which the port ties it to, got other values"
        )


def source_embedding(source: _Tensors, vocab_size: int, dim: int) -> Tensor:
    source.left["model.embed.weight"] = None
    return source.take("model.embed.weight", (vocab_size, dim))()


def _layer_plan(config: MegalodonConfig, source: _Tensors, prefix: str, layer: int) -> Plan:
    D, N, Z, V, F = config.model_dim, config.cema_ndim, config.z_dim, config.value_dim, config.ffn_hidden_dim
    attn, ffn, heads = f"{prefix}attn.", f"{prefix}ffn.", config.num_heads
    yield from _norm_plan(config, source, "mega.timenorm", f"{attn}timenorm")
    for name, shape in (("alpha", (D, N, 1)), ("delta", (D, N, 1)), ("theta", (D, 1, 1))):
        yield f"mega.cema.{name}", source.take(f"{attn}cema.{name}", shape)
    real, imaginary = (source.take(f"{attn}cema.gamma_{part}", (D, N)) for part in ("real", "imag"))
    yield "mega.cema.gamma", lambda: torch.stack([real(), imaginary()], -1)
    omega = source.take(f"{attn}cema.omega", (D,))
    yield "mega.cema.omega", lambda: omega()[:, None]
    if config.norm_affine:
        yield "mega.rmsnorm.weight", source.take(f"{attn}rmsnorm.gamma", (D,))
    for name, shape, dim in (("wz.weight", (Z, D), 0), ("wz.bias", (Z,), 0), ("gamma", (2, Z), 1), ("beta", (2, Z), 1)):
        make = source.take(f"{attn}{name}", shape)
        yield f"mega.{name}", lambda make=make, dim=dim: interleaved(make(), dim, heads)
    for name, rows in (("wv", V), ("wr", V)):
        yield f"mega.{name}.weight", source.take(f"{attn}{name}.weight", (rows, D))
        yield f"mega.{name}.bias", source.take(f"{attn}{name}.bias", (rows,))
    yield "mega.wh1.weight", source.take(f"{attn}wh1.weight", (D, D))
    one, two = (source.take(f"{attn}{name}.bias", (D,)) for name in ("wh1", "wh2"))
    yield "mega.wh1.bias", lambda: one() + two()
    yield "mega.wh2.weight", source.take(f"{attn}wh2.weight", (D, V))
    if config.norm_affine:
        gain = source.take(f"{ffn}norm.weight", (D,))
        yield "nffn.norm.weight", lambda: gain().float() - 1 if gain().dtype.itemsize < 4 else gain() - 1
        yield "nffn.norm.bias", source.take(f"{ffn}norm.bias", (D,))
    for name, shape in (("fc1", (F, D)), ("fc2", (D, F)), *((("fc3", (F, D)),) if config.swiglu else ())):
        bias = source.take(f"{ffn}{name}.bias", shape[:1])()
        if bias.count_nonzero():
            raise ValueError(
                f"{source.directory}: `{ffn}{name}.bias` must be zero, as this layer has no bias in the released code and "
                f"here, got values up to {bias.abs().max().item():.3g}"
            )
        yield f"nffn.{name}.weight", source.take(f"{ffn}{name}.weight", shape)
    if config.rescale_nffn:
        yield "nffn.alpha", lambda: torch.full((D,), 0.1 * 0.5**layer, dtype=torch.float64)


def _norm_plan(config: MegalodonConfig, source: _Tensors, ours: str, theirs: str) -> Plan:
    """A timestep norm's parameters; the port leaves them out with `norm_affine` False, and here they are zeros then."""
    for name in ("weight", "bias"):
        shape = (config.model_dim,)
        if config.norm_affine:
            yield f"{ours}.{name}", source.take(f"{theirs}.{name}", shape)
        else:
            yield f"{ours}.{name}", lambda shape=shape: torch.zeros(shape)


def interleaved(tensor: Tensor, dim: int, heads: int) -> Tensor:
    """Rotary pairs (i, i + K/2) of each head, along `dim`, as neighbours (2i, 2i + 1)."""
    return tensor.unflatten(dim, (heads, 2, -1)).transpose(dim + 1, dim + 2).flatten(dim, dim + 2)
