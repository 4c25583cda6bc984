"""The blocks of MEGALODON, and all of them in one call. Parameter names are those of the released checkpoints."""

from __future__ import annotations

from collections.abc import Iterable
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
from .linear import takes_few_rows
from .normalized_attention import normalized_attention
from .states import AttentionState, TimestepNormState


class BlockState(NamedTuple):
    """What one block passes on to the next call."""

    norm: TimestepNormState
    cema: Tensor
    """(S, D, N) complex"""
    attention: AttentionState


class NormalizedAttention(WideParameters):
    """The first half of a block: timestep norm, CEMA, gated normalized attention, its residual.

    t = timestep_norm(x);  m = rms_norm(cema(t))
    z = wz m;  v = silu(wv t);  r = silu(wr m);  a = normalized_attention(z, v)
    y = x + wh1 m + wh2 (a * r)
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
        config, training = self.config, self.training
        norm_state, cema_state, attention_state = state or (None, None, None)
        t, norm_state = self.timenorm(x, state=norm_state, return_state=True, **sequences)
        c, cema_state = self.cema(t, state=cema_state, return_state=True, **sequences)
        m = F.dropout(self.rmsnorm(c), config.hidden_dropout, training)
        a = normalized_attention(
            self.wz(m), gated_silu(self.wv(t)), self.gamma, self.beta,
            num_heads=config.num_heads, chunk_size=config.chunk_size, rope_base=config.rope_base or 10000.0,
            eps=config.norm_eps, state=attention_state, return_state=return_state, inplace_state=inplace_state,
            dropkey=config.attention_dropout if training else 0.0, **sequences,
        )  # fmt: skip
        if return_state:
            a, attention_state = a
        gated = F.dropout(gated_silu(self.wr(m), a), config.hidden_dropout, training)
        y = x + F.dropout(self.wh1(m) + self.wh2(gated), config.dropout, training)
        return (y, BlockState(norm_state, cema_state, attention_state)) if return_state else y


class NormalizedFFN(WideParameters):
    """The second half of a block: fc2(silu(fc1 n) [* fc3 n]) of n = layer_norm(y), without its residual."""

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
        if return_state and (result := _run_in_one_call((self,), x, (state,), **options)) is not None:
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


def run_in_one_call(
    blocks: Iterable[nn.Module],
    x: Tensor,
    states: Iterable[BlockState | None],
    output: Output | None = None,
    norm: TimestepNormState | None = None,
    **options,
) -> _Result | None:
    """x through blocks one after another and, if given, the output, of which `norm` is the state; and the states after.

    With an output, logits in x's dtype. None where that would not give what the modules do: with other options than
    `inplace_state`, for more than a few rows, with gradients, or where somebody has changed a module.
    """
    return _run_in_one_call(tuple(blocks), x, tuple(states), output, norm, whole=True, **options)


def _run_in_one_call(
    blocks: tuple[nn.Module, ...],
    x: Tensor,
    states: tuple[BlockState | None, ...],
    output: Output | None = None,
    norm: TimestepNormState | None = None,
    *,
    whole: bool = False,
    inplace_state: bool = False,
    cu_seqlens: Tensor | None = None,
    lengths: Tensor | None = None,
) -> _Result | None:
    """The same; unless `whole`, whatever is wrapped around the blocks themselves."""
    if cu_seqlens is not None or lengths is not None or not blocks or None in states:
        return None
    if torch.compiler.is_compiling() or not takes_few_rows(x, x):
        return None
    if _global_hooks._global_forward_hooks or _global_hooks._global_forward_pre_hooks:
        return None
    config = getattr(getattr(blocks[0], "mega", None), "config", None)
    parameters, eps = [], []
    for block, state in zip(blocks, states, strict=True):
        if not _is_writable(*state.norm, state.cema) or not _take_parameters(block, whole, config, parameters, eps):
            return None
    width = x.shape[2]
    if output is not None:
        if not _is_writable(*norm) or not _C.take_parameters(output, _OUTPUT, parameters):
            return None
        final = output.final_norm
        if final.num_groups != config.norm_num_groups:
            return None
        eps.append(final.eps)
        width = output.output.weight.shape[0]
    if blocks[0].mega.wv.weight.dtype != x.dtype:
        return None
    if not inplace_state:
        states, norm = tuple(map(_copy, states)), None if output is None else _copy(norm)
    tensors = [tensor for state in states for tensor in (*state.norm, state.cema, *state.attention)]
    if output is not None:
        tensors += norm
    y = x.new_empty((*x.shape[:2], width))
    call(
        blocks_few_rows_, x, parameters, tensors, y, config.num_heads, config.norm_num_groups, config.chunk_size,
        config.rope_base or 10000.0, eps,
    )  # fmt: skip
    return y, states, norm


# Modules as _C.take_parameters knows them: class, modules inside, names of its own parameters.
_NORM = (TimestepNorm, {}, ("weight", "bias"))
_LINEAR = (Linear, {}, ("weight", "bias"))
_HALVES = dict(
    mega=(
        NormalizedAttention,
        dict(
            timenorm=_NORM, cema=(ComplexEMA, {}, ("alpha", "delta", "theta", "gamma", "omega")),
            rmsnorm=(RMSNorm, {}, ("weight",)), wv=_LINEAR, wz=_LINEAR, wr=_LINEAR, wh1=_LINEAR, wh2=_LINEAR,
        ),
        ("gamma", "beta"),
    ),
    nffn=(
        NormalizedFFN,
        dict(norm=(LayerNorm, {}, ("weight", "bias")), fc1=_LINEAR, fc2=_LINEAR, fc3=_LINEAR),
        ("alpha",),
    ),
)  # fmt: skip
_BLOCK = (MegalodonBlock, _HALVES, ())
_OUTPUT = (Output, dict(final_norm=_NORM, output=_LINEAR), ())


def _take_parameters(
    block: nn.Module, whole: bool, config: MegalodonConfig, tensors: list[Tensor | None], eps: list[float]
) -> bool:
    """Appends them in the order of cpp/blocks_few_rows_bind.cpp, if the block is as it was built with that configuration.

    That is: nobody has replaced a module inside, hooked into it or wrapped its forward.
    """
    modules = block._modules
    parts = [(block, _BLOCK)] if whole else [(modules[name], half) for name, half in _HALVES.items()]
    if not all(_C.take_parameters(module, description, tensors) for module, description in parts):
        return False
    if any(modules[name].config not in (config,) for name in _HALVES):  # mostly the same object
        return False
    mega, norm = modules["mega"]._modules, modules["nffn"]._modules["norm"]
    eps += (mega["timenorm"].eps, mega["rmsnorm"].eps, config.norm_eps, norm.eps)
    dropout = config.dropout or config.hidden_dropout or config.attention_dropout
    return mega["timenorm"].num_groups == config.norm_num_groups and not (block.training and dropout)


def _copy(state: NamedTuple | Tensor) -> NamedTuple | Tensor:
    if isinstance(state, Tensor):
        return state.clone(memory_format=torch.contiguous_format)
    return state._make(map(_copy, state))


def _is_writable(*state: Tensor | None) -> bool:
    return all(tensor is not None and tensor.is_contiguous() for tensor in state)
