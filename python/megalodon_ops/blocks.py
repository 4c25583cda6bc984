"""The blocks of MEGALODON, and all of them in one call. Parameter names are those of the released checkpoints."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as _global_hooks

from . import _C
from .blocks_few_rows import blocks_few_rows_
from .config import MegalodonConfig
from .gated_silu import gated_silu
from .layers import ComplexEMA, LayerNorm, Linear, RMSNorm, TimestepNorm, WideParameters
from .library import call
from .linear import suits_few_rows
from .normalized_attention import normalized_attention
from .states import AttentionState, TimestepNormState


class BlockState(NamedTuple):
    """What one block passes on to the next call.

    Example:
        >>> import torch, megalodon_ops as mo
        >>> config = mo.MegalodonConfig(model_dim=64, z_dim=32, value_dim=64, ffn_hidden_dim=96, cema_ndim=4)
        >>> _, state = mo.MegalodonBlock(config)(torch.randn(1, 10, 64), return_state=True)
        >>> state.cema.shape
        torch.Size([1, 64, 4])
    """

    norm: TimestepNormState
    cema: Tensor
    """(S, D, N) complex"""
    attention: AttentionState


class NormalizedAttention(WideParameters):
    """The first half of a block: timestep norm, CEMA, gated normalized attention, its residual.

    t = timestep_norm(x);  m = rms_norm(cema(t))
    z = wz m;  v = silu(wv t);  r = silu(wr m);  a = normalized_attention(z, v)
    y = x + wh1 m + wh2 (a * r)

    Example:
        >>> import torch, megalodon_ops as mo
        >>> config = mo.MegalodonConfig(model_dim=64, z_dim=32, value_dim=64, ffn_hidden_dim=96)
        >>> mo.NormalizedAttention(config)(torch.randn(2, 10, 64)).shape
        torch.Size([2, 10, 64])
    """

    def __init__(self, config: MegalodonConfig) -> None:
        super().__init__()
        self.config = config
        dim, z_dim, value_dim = config.model_dim, config.z_dim, config.value_dim
        self.timenorm = TimestepNorm(dim, config.norm_num_groups, config.norm_eps)
        self.cema = ComplexEMA(dim, config.cema_ndim)
        self.rmsnorm = RMSNorm(dim, config.norm_eps, config.norm_affine)
        self.wv = Linear(dim, value_dim)
        self.wz = Linear(dim, z_dim)
        self.wr = Linear(dim, value_dim)
        self.wh1 = Linear(dim, dim)
        self.wh2 = Linear(value_dim, dim, bias=False)
        self.gamma = nn.Parameter(torch.empty(2, z_dim))
        self.beta = nn.Parameter(torch.empty(2, z_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.gamma)
        nn.init.zeros_(self.beta)

    def forward(
        self,
        x: Tensor,
        *,
        state: BlockState | None = None,
        return_state: bool = False,
        inplace_state: bool = False,
        **sequences: Tensor | None,
    ) -> Tensor | tuple[Tensor, BlockState]:
        """x (B, L, D) to y (B, L, D); options as in :func:`normalized_attention`, `state` being the whole block's."""
        config, training = self.config, self.training
        norm_state, cema_state, attention_state = state or (None, None, None)
        t, norm_state = self.timenorm(x, state=norm_state, return_state=True, **sequences)
        c, cema_state = self.cema(t, state=cema_state, return_state=True, **sequences)
        m = F.dropout(self.rmsnorm(c), config.hidden_dropout, training)
        a = normalized_attention(
            self.wz(m), gated_silu(self.wv(t)), self.gamma, self.beta,
            num_heads=config.num_heads, chunk_size=config.chunk_size, rope_base=config.rotary_base,
            eps=config.norm_eps, state=attention_state, return_state=return_state, inplace_state=inplace_state,
            dropkey=config.attention_dropout if training else 0.0, **sequences,
        )  # fmt: skip
        if return_state:
            a, attention_state = a
        gated = F.dropout(gated_silu(self.wr(m), a), config.hidden_dropout, training)
        y = x + F.dropout(self.wh1(m) + self.wh2(gated), config.dropout, training)
        return (y, BlockState(norm_state, cema_state, attention_state)) if return_state else y


class NormalizedFFN(WideParameters):
    """The second half of a block: fc2(silu(fc1 n) [* fc3 n]) of n = layer_norm(y), without its residual.

    Example:
        >>> import torch, megalodon_ops as mo
        >>> config = mo.MegalodonConfig(model_dim=64, z_dim=32, value_dim=64, ffn_hidden_dim=96, swiglu=True)
        >>> mo.NormalizedFFN(config)(torch.randn(2, 10, 64)).shape
        torch.Size([2, 10, 64])
    """

    def __init__(self, config: MegalodonConfig, layer: int = 0) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        dim, hidden = config.model_dim, config.ffn_hidden_dim
        self.norm = LayerNorm(dim, config.norm_eps, config.norm_affine)
        self.fc1 = Linear(dim, hidden, bias=False)
        self.fc2 = Linear(hidden, dim, bias=False)
        self.fc3 = Linear(dim, hidden, bias=False) if config.swiglu else None
        self.register_parameter("alpha", nn.Parameter(torch.empty(dim)) if config.rescale_nffn else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.alpha is not None:
            nn.init.constant_(self.alpha, 0.1 * 0.5**self.layer)

    def forward(self, y: Tensor) -> Tensor:
        """y (B, L, D), the first half's output, to (B, L, D)."""
        config, training = self.config, self.training
        n = self.norm(y)
        hidden = gated_silu(self.fc1(n), None if self.fc3 is None else self.fc3(n))
        f = F.dropout(self.fc2(F.dropout(hidden, config.hidden_dropout, training)), config.dropout, training)
        return f if self.alpha is None else (self.alpha * f).to(f.dtype)


class MegalodonBlock(nn.Module):
    """One layer. Two-hop residual: the FFN reads the attention's output, and adds to the block's input.

    Example:
        >>> import torch, megalodon_ops as mo
        >>> config = mo.MegalodonConfig(model_dim=64, z_dim=32, value_dim=64, ffn_hidden_dim=96, chunk_size=16)
        >>> block = mo.MegalodonBlock(config)
        >>> y, state = block(torch.randn(2, 10, 64), return_state=True)
        >>> y, state = block(torch.randn(2, 7, 64), state=state, return_state=True)
        >>> state.attention.position
        tensor([1, 1])
    """

    def __init__(self, config: MegalodonConfig, layer: int = 0) -> None:
        super().__init__()
        self.mega = NormalizedAttention(config)
        self.nffn = NormalizedFFN(config, layer)

    def forward(
        self, x: Tensor, *, state: BlockState | None = None, return_state: bool = False, **options
    ) -> Tensor | tuple[Tensor, BlockState]:
        """x (B, L, D); options as in :func:`normalized_attention`: inplace_state, cu_seqlens, lengths."""
        if return_state and (result := _run_block_in_one_call(self, x, state, **options)) is not None:
            y, (state,), _ = result
            return y, state
        y = self.mega(x, state=state, return_state=return_state, **options)
        if return_state:
            y, state = y
            return x + self.nffn(y), state
        return x + self.nffn(y)


class Output(nn.Module):
    """Final timestep norm and the output matrix."""

    def __init__(self, config: MegalodonConfig) -> None:
        super().__init__()
        self.final_norm = TimestepNorm(config.model_dim, config.norm_num_groups, config.norm_eps)
        self.output = Linear(config.model_dim, config.num_outputs, bias=False)


_Result = tuple[Tensor, tuple[BlockState, ...], TimestepNormState | None]


def run_model_in_one_call(
    model: nn.Module,
    tokens: Tensor,
    states: tuple[BlockState, ...],
    norm: TimestepNormState,
    **options,
) -> _Result | None:
    """Logits of a few tokens in the embedding's dtype, and the states of the model's layers and final norm after them.

    None where that would not give what the modules do: with other options than `inplace_state`, for more than a few tokens,
    with gradients, or where somebody has changed a module.
    """
    modules = model._modules
    weight = embed._parameters.get("weight") if (embed := modules.get("embed")) is not None else None
    if weight is None or tokens.dtype not in (torch.int64, torch.int32):
        return None
    tokens = tokens if tokens.dtype == torch.int64 else tokens.long()
    described = [
        (embed, _EMBEDDING), (modules.get("layers"), _layers(len(states))), (modules.get("output"), _OUTPUT)
    ]  # fmt: skip
    return _run_in_one_call(described, model.config, tokens, weight, states, norm, **options)


def _run_block_in_one_call(block: MegalodonBlock, x: Tensor, state: BlockState | None, **options) -> _Result | None:
    """The same of x through a block, whatever is wrapped around that itself."""
    modules = block._modules
    if not isinstance(mega := modules.get("mega"), NormalizedAttention):
        return None
    described = [(modules.get(name), half) for name, half in _HALVES.items()]
    return _run_in_one_call(described, mega.config, x, x, (state,), **options)


def _run_in_one_call(
    described: list[tuple[nn.Module | None, tuple]],
    config: MegalodonConfig,
    x: Tensor,
    like: Tensor,
    states: tuple[BlockState | None, ...],
    norm: TimestepNormState | None = None,
    *,
    inplace_state: bool = False,
    cu_seqlens: Tensor | None = None,
    lengths: Tensor | None = None,
) -> _Result | None:
    """Of tokens x (B, L) through a model, or x (B, L, D) through blocks, in the dtype of `like` (any, D)."""
    whole = like is not x
    if cu_seqlens is not None or lengths is not None or x.dim() != (2 if whole else 3):
        return None
    if not all(map(_is_complete, states)) or (whole and not isinstance(norm, TimestepNormState)):
        return None
    if any(kind.forward is not forward for kind, forward in _FORWARDS.items()):
        return None
    if torch.compiler.is_compiling() or _global_hooks._global_forward_hooks or _global_hooks._global_forward_pre_hooks:
        return None
    if not suits_few_rows(x.shape[:2].numel(), like, like):
        return None
    expected = dict(config=config, eps=config.norm_eps, num_groups=config.norm_num_groups, max_norm=None)
    if config.dropout or config.hidden_dropout or config.attention_dropout:
        expected["training"] = False
    parameters = _C.take_parameters(described, expected)
    if parameters is None or parameters[_WV + whole].dtype != like.dtype:
        return None
    tensors = _tensors_of(states, norm)
    if not _C.are_contiguous(tensors):
        return None
    if not inplace_state:
        states, norm = tuple(map(_copy, states)), norm and _copy(norm)
        tensors = _tensors_of(states, norm)
    y = like.new_empty((*x.shape[:2], len(parameters[-2]) if whole else x.shape[2]))
    call(
        blocks_few_rows_, x, parameters, tensors, y, config.num_heads, config.norm_num_groups, config.chunk_size,
        config.rotary_base, config.norm_eps, config.embedding_scale,
    )  # fmt: skip
    return y, states, norm


# Modules as _C.take_parameters knows them: class, modules inside, names of its own parameters, and of attributes that
# must be as its configuration says.
_NORM = (TimestepNorm, {}, ("weight", "bias"), ("eps", "num_groups"))
_LINEAR = (Linear, {}, ("weight", "bias"), ())
_HALVES = dict(
    mega=(
        NormalizedAttention,
        dict(
            timenorm=_NORM, cema=(ComplexEMA, {}, ("alpha", "delta", "theta", "gamma", "omega"), ()),
            rmsnorm=(RMSNorm, {}, ("weight",), ("eps",)), wv=_LINEAR, wz=_LINEAR, wr=_LINEAR, wh1=_LINEAR, wh2=_LINEAR,
        ),
        ("gamma", "beta"),
        ("config", "training"),
    ),
    nffn=(
        NormalizedFFN,
        dict(norm=(LayerNorm, {}, ("weight", "bias"), ("eps",)), fc1=_LINEAR, fc2=_LINEAR, fc3=_LINEAR),
        ("alpha",),
        ("config", "training"),
    ),
)  # fmt: skip
_WV = 8  # where a block's parameters have wv.weight, the first that has the dtype of activations
_EMBEDDING = (nn.Embedding, {}, ("weight",), ("max_norm",))
_OUTPUT = (Output, dict(final_norm=_NORM, output=_LINEAR), (), ())
_KINDS = (
    TimestepNorm, ComplexEMA, RMSNorm, LayerNorm, Linear, NormalizedAttention, NormalizedFFN, MegalodonBlock, nn.Embedding
)  # fmt: skip
_FORWARDS = {kind: kind.forward for kind in _KINDS}  # which somebody may have patched


@functools.cache
def _layers(count: int) -> tuple:
    return nn.ModuleList, {str(layer): (MegalodonBlock, _HALVES, (), ()) for layer in range(count)}, (), ()


def _is_complete(state: BlockState | None) -> bool:
    if not isinstance(state, BlockState):
        return False
    return isinstance(state.norm, TimestepNormState) and isinstance(state.attention, AttentionState)


def _tensors_of(states: tuple[BlockState, ...], norm: TimestepNormState | None) -> list[Tensor | None]:
    tensors = [tensor for state in states for tensor in (*state.norm, state.cema, *state.attention)]
    return tensors if norm is None else [*tensors, *norm]


def _copy(state: NamedTuple | Tensor) -> NamedTuple | Tensor:
    if isinstance(state, Tensor):
        return state.clone(memory_format=torch.contiguous_format)
    return state._make(map(_copy, state))
