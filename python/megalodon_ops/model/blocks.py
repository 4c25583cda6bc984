"""The blocks of MEGALODON. Parameter names are those of the released checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import MegalodonConfig, check_config
from ..ops.adaptive_working_memory.adaptive_working_memory import read_write_and_keep
from ..ops.chunked_attention.chunked_attention import chunked_attention
from ..ops.gated_silu.gated_silu import gated_silu
from .layers import (
    ComplexEMA, LayerNorm, Linear, RMSNorm, SequenceNorm, TimestepNorm, WideParameters, check_no_state,
    reset_all_parameters,
)  # fmt: skip
from ..ops.common.definition import accumulation_dtype, autocast, int64_or_none, is_exporting, num_steps
from ..ops.normalized_attention.normalized_attention import attend
from ..ops.normalized_qk.normalized_qk import normalized_qk, rotary_table
from ..ops.common.states import AttentionState, TimestepNormState, WorkingMemoryState, fields_of, named_in_programs


@named_in_programs
class BlockState(NamedTuple):
    """What one call of a block passes on to the next call.

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


@named_in_programs
class MemoryBlockState(NamedTuple):
    """What a block with a working memory passes on: a :class:`BlockState` and, of a :class:`WorkingMemoryState`, what it lacks.

    Example:
        >>> import torch, megalodon_ops as mo
        >>> config = mo.MegalodonConfig(model_dim=64, z_dim=32, value_dim=64, ffn_hidden_dim=96, working_memory=True)
        >>> _, state = mo.MegalodonBlock(config)(torch.randn(1, 10, 64), return_state=True)
        >>> state.memory.shape
        torch.Size([1, 1, 32, 64])
    """

    norm: TimestepNormState
    cema: Tensor
    attention: AttentionState
    memory: Tensor
    """(S, H, K, V)"""
    memory_mass: Tensor
    """(S, H, K)"""
    memory_k: Tensor
    """(S, C, H, K)"""

    def working_memory(self) -> WorkingMemoryState:
        """With the values of the attention, and the steps that the norm has counted."""
        return WorkingMemoryState(self.memory, self.memory_mass, self.memory_k, self.norm.count, self.attention.v)


def block_state_type(config: MegalodonConfig) -> type[BlockState] | type[MemoryBlockState]:
    """What a block of this configuration takes and returns for a state."""
    return MemoryBlockState if config.working_memory else BlockState


_MEMORY_LOGITS = 3.0  # root mean square of the working memory's queries and keys at the start: docs/claims.md
_LARGEST_ROTARY = 1 << 24  # numbers, 64 MiB in float32; the released models' tables have 2^19 and 2^20


class NormalizedAttention(WideParameters):
    """The first half of a block: timestep norm, CEMA, gated normalized attention, its residual.

    t = timestep_norm(x);  m = rms_norm(cema(t))
    z = wz m;  v = silu(wv t);  r = silu(wr m);  a = normalized_attention(z, v)
    y = x + wh1 m + wh2 (a * r)

    With `config.working_memory`, gamma and beta have two rows more, for queries and keys without rotary positions, and
    y = x + wh1 m + wh2 (a * r + adaptive_working_memory(q, k, v)), as in Gecko (arXiv 2601.06463), whose initial queries
    and keys are, however, 3 sqrt(K) times smaller: so small that no retrieval was learned. With `config.visible_chunks` of 2
    attention sees the chunk before a step's own, too, and rotary positions go on from chunk to chunk.

    An encoder's has the sequence norm, the bidirectional CEMA and an attention to whole chunks, and no state.

    Example:
        >>> import torch, megalodon_ops as mo
        >>> config = mo.MegalodonConfig(model_dim=64, z_dim=32, value_dim=64, ffn_hidden_dim=96)
        >>> mo.NormalizedAttention(config)(torch.randn(2, 10, 64)).shape
        torch.Size([2, 10, 64])
    """

    attention, memory = staticmethod(chunked_attention), staticmethod(read_write_and_keep)  # chunk parallel has others

    def __init__(self, config: MegalodonConfig) -> None:
        check_config("NormalizedAttention", config, any_form=True)
        super().__init__()
        self.config = config
        dim, z_dim, value_dim = config.model_dim, config.z_dim, config.value_dim
        norm = TimestepNorm if config.causal else SequenceNorm
        self.timenorm = norm(dim, config.norm_num_groups, config.norm_eps)
        self.cema = ComplexEMA(dim, config.cema_ndim, bidirectional=not config.causal)
        self.rmsnorm = RMSNorm(dim, config.norm_eps, config.norm_affine)
        self.wv = Linear(dim, value_dim)
        self.wz = Linear(dim, z_dim)
        self.wr = Linear(dim, value_dim)
        self.wh1 = Linear(dim, dim)
        self.wh2 = Linear(value_dim, dim, bias=False)
        self.gamma, self.beta = (nn.Parameter(torch.empty(4 if config.working_memory else 2, z_dim)) for _ in range(2))
        self.register_buffer("rotary", None, persistent=False)
        self._rotary_made_for = None
        self._keep_rotary()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises `gamma` and `beta`; the layers inside have a `reset_parameters` of their own."""
        nn.init.zeros_(self.gamma)
        nn.init.zeros_(self.beta)
        if self.config.working_memory:
            nn.init.constant_(self.gamma[2:], _MEMORY_LOGITS * (self.config.z_dim // self.config.num_heads) ** 0.5 - 1)

    def _rotary_for(self, like: Tensor) -> tuple:
        """The arguments of :func:`rotary_table` for a table that serves tensors like this one."""
        config = self.config
        key_dim, dtype = config.z_dim // config.num_heads, accumulation_dtype(like.dtype)
        return config.chunk_size, key_dim, config.rotary_base, dtype, like.device

    def _keep_rotary(self) -> None:
        """Makes the buffer `rotary` for the parameters' device and dtype; a very large table is made by each call instead."""
        rows, key_dim, *_ = wanted = self._rotary_for(self.gamma)
        if rows * key_dim <= _LARGEST_ROTARY and wanted != self._rotary_made_for:
            self.rotary, self._rotary_made_for = rotary_table(*wanted), wanted

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Moves and casts the parameters alone, then makes the rotary table anew.

        A table that was cast would be rounded twice, and `to_empty` would lose its values.
        """
        rotary = self._buffers.pop("rotary")
        try:
            super()._apply(fn, recurse)
        finally:
            self._buffers["rotary"] = rotary
        self._keep_rotary()
        return self

    def _load_from_state_dict(self, *args) -> None:
        super()._load_from_state_dict(*args)
        self._keep_rotary()  # assign=True may bring parameters of another device or dtype

    def forward(
        self,
        x: Tensor,
        *,
        state: BlockState | MemoryBlockState | None = None,
        return_state: bool = False,
        inplace_state: bool = False,
        **sequences: Tensor | None,
    ) -> Tensor | tuple[Tensor, BlockState | MemoryBlockState]:
        """x (B, L, D) to y (B, L, D); options as in :func:`normalized_attention`, `state` being the whole block's."""
        config, training = self.config, self.training
        if not config.causal:
            check_no_state("MegalodonBlock", state, return_state)
        norm_before, cema_state, attention_state, *_ = fields_of("MegalodonBlock", state, block_state_type(config))
        t, norm_state = self.timenorm(x, state=norm_before, return_state=True, **sequences)
        v = gated_silu(self.wv(t))  # before cema, whose state may still be on its way from other processes
        c, cema_state = self.cema(t, state=cema_state, return_state=True, **sequences)
        m = F.dropout(self.rmsnorm(c), config.hidden_dropout, training)
        z = self.wz(m)
        rotary = self.rotary if self._rotary_made_for == self._rotary_for(z) else None
        gamma, beta, read, seen = self.gamma, self.beta, None, None
        if config.visible_chunks > 1:
            seen = norm_state.count - num_steps(x, **sequences)
        if config.working_memory:  # before the attention, which may overwrite the values of its state
            gamma, beta = gamma[:2], beta[:2]
            read, memory = self._read_and_write(z, v, state, return_state, inplace_state, **sequences)
        a = attend(
            z, v, gamma, beta, rotary,
            num_heads=config.num_heads, chunk_size=config.chunk_size, causal=config.causal, rope_base=config.rotary_base,
            eps=config.norm_eps, state=attention_state, return_state=return_state, inplace_state=inplace_state,
            dropkey=config.attention_dropout if training else 0.0, visible_chunks=config.visible_chunks,
            seen=seen, attention=self.attention, **sequences,
        )  # fmt: skip
        if return_state:
            a, attention_state = a
        gated = gated_silu(self.wr(m), a)
        gated = F.dropout(gated if read is None else gated + read, config.hidden_dropout, training)
        y = x + F.dropout(self.wh1(m) + self.wh2(gated), config.dropout, training)
        if not return_state:
            return y
        state = BlockState(norm_state, cema_state, attention_state)
        return y, state if read is None else MemoryBlockState(*state, *memory)

    def _read_and_write(
        self, z: Tensor, v: Tensor, state: MemoryBlockState | None, with_state: bool, inplace: bool, **sequences
    ) -> tuple[Tensor, list[Tensor]]:
        """What z reads of the working memory (B, L, H * V), and the memory's fields of the state, if `with_state`."""
        config = self.config
        z, v = autocast(z, v)
        q, k = normalized_qk(  # in chunks of one step no position turns them
            z, self.gamma[2:], self.beta[2:], num_heads=config.num_heads, chunk_size=1, eps=config.norm_eps, **sequences
        )  # fmt: skip
        cu_seqlens, lengths = (int64_or_none(sequences.get(name)) for name in ("cu_seqlens", "lengths"))
        read, *memory = self.memory(
            q, k, v.unflatten(-1, (config.num_heads, -1)), config.chunk_size, config.visible_chunks,
            None if state is None else MemoryBlockState(*state).working_memory(), cu_seqlens, lengths, with_state, inplace,
        )  # fmt: skip
        return read.flatten(-2), memory


class NormalizedFFN(WideParameters):
    """The second half of a block: fc2(silu(fc1 n) [* fc3 n]) of n = layer_norm(y), without its residual.

    Example:
        >>> import torch, megalodon_ops as mo
        >>> config = mo.MegalodonConfig(model_dim=64, z_dim=32, value_dim=64, ffn_hidden_dim=96, swiglu=True)
        >>> mo.NormalizedFFN(config)(torch.randn(2, 10, 64)).shape
        torch.Size([2, 10, 64])
    """

    def __init__(self, config: MegalodonConfig, layer: int = 0) -> None:
        check_config("NormalizedFFN", config, any_form=True)
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
        """Initialises `alpha`; the layers inside have a `reset_parameters` of their own."""
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
        check_config("MegalodonBlock", config, any_form=True)
        super().__init__()
        self.mega = NormalizedAttention(config)
        self.nffn = NormalizedFFN(config, layer)

    def reset_parameters(self) -> None:
        """Initialises every parameter of the block."""
        reset_all_parameters(self)

    def forward(
        self, x: Tensor, *, state: BlockState | MemoryBlockState | None = None, return_state: bool = False, **options
    ) -> Tensor | tuple[Tensor, BlockState | MemoryBlockState]:
        """x (B, L, D); options as in :func:`normalized_attention`: inplace_state, cu_seqlens, lengths."""
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
        self.output = Linear(config.model_dim, config.num_outputs, bias=False, of_tokens=True)

    def reset_parameters(self) -> None:
        """Initialises the norm and the matrix."""
        reset_all_parameters(self)


def at_least_float32(logits: Tensor) -> Tensor:
    """Logits as a model returns them, whatever dtype the output matrix has."""
    return logits if logits.dtype in (torch.float32, torch.float64) else logits.float()


def recomputes_layers(model: nn.Module) -> bool:
    """Whether the backward of a call that begins now is to compute each layer again."""
    return model.config.layerwise_ckpt and model.training and torch.is_grad_enabled() and not is_exporting()
