"""The blocks of MEGALODON. Parameter names are those of the released checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .config import MegalodonConfig, check_config, config_of_sizes
from ..ops.gated_silu.gated_silu import gated_silu
from .layers import ComplexEMA, LayerNorm, Linear, RMSNorm, SequenceNorm
from .layers import TimestepNorm, WideParameters, check_no_state, reset_all_parameters
from .sequences import Sequences
from ..ops.common.definition import accumulation_dtype, is_exporting
from ..ops.normalized_attention.normalized_attention import attend
from ..ops.normalized_qk.normalized_qk import rotary_table
from ..ops.common.states import AttentionState, TimestepNormState, state_fields, named_in_programs


@named_in_programs
class BlockState(NamedTuple):
    """State of one block, passed from one call to the next.

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


_MAX_ROTARY_SIZE = 1 << 24  # elements, 64 MiB in float32; the released models' tables have 2^19 and 2^20


class NormalizedAttention(WideParameters):
    """The first half of a block: timestep norm, CEMA, gated normalized attention, its residual.

    t = timestep_norm(x);  m = rms_norm(cema(t))
    z = wz m;  v = silu(wv t);  r = silu(wr m);  a = normalized_attention(z, v)
    y = x + wh1 m + wh2 (a * r)

    An encoder has a sequence norm, bidirectional CEMA, attention to the whole chunk, and no state. With parts of
    MEGALODON's successor, this class creates an instance of its subclass in gecko_block.py.

    Args:
        config: a configuration, or the width D of x; then fields of a :class:`MegalodonConfig` follow by name.
            `norm_num_groups` is by default gcd(D, 32).

    Example:
        >>> import torch, megalodon_ops as mo
        >>> mo.NormalizedAttention(64, z_dim=32, value_dim=64, chunk_size=16)(torch.randn(2, 10, 64)).shape
        torch.Size([2, 10, 64])
    """

    other_forms: ClassVar[list[type[NormalizedAttention]]] = []
    """Subclasses that `NormalizedAttention(config)` creates instead, each for the configurations that it `serves`.
    They register themselves, because gecko_block.py imports this file, which thus cannot import gecko_block.py."""
    state_type: ClassVar[type[tuple]] = BlockState

    def __new__(cls, config: MegalodonConfig | int | None = None, *_: Any, **sizes: Any) -> NormalizedAttention:
        # Unpickling passes no configuration.
        config = config_of_sizes(cls.__name__, config, sizes)
        forms = cls.other_forms if cls is NormalizedAttention and isinstance(config, MegalodonConfig) else ()
        return super().__new__(next((form for form in forms if form.serves(config)), cls))

    def __init__(self, config: MegalodonConfig | int, **sizes: Any) -> None:
        config = config_of_sizes("NormalizedAttention", config, sizes)
        check_config("NormalizedAttention", config, accept_encoder=True)
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
        self.gamma, self.beta = (nn.Parameter(torch.empty(2, z_dim)) for _ in range(2))
        self.register_buffer("rotary", None, persistent=False)
        self._rotary_made_for = None
        self._update_rotary()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise `gamma` and `beta`; submodules have their own `reset_parameters`."""
        nn.init.zeros_(self.gamma)
        nn.init.zeros_(self.beta)

    def _rotary_for(self, like: Tensor) -> tuple:
        """Arguments of :func:`rotary_table` for tensors of the dtype and device of `like`."""
        config = self.config
        key_dim, dtype = config.z_dim // config.num_heads, accumulation_dtype(like.dtype)
        return config.chunk_size, key_dim, config.rotary_base, dtype, like.device

    def _update_rotary(self) -> None:
        """Rebuild the buffer `rotary` for the parameters' device and dtype; each call recomputes a very large table."""
        rows, key_dim, *_ = arguments = self._rotary_for(self.gamma)
        if rows * key_dim <= _MAX_ROTARY_SIZE and arguments != self._rotary_made_for:
            self.rotary, self._rotary_made_for = rotary_table(*arguments), arguments

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Move and cast the parameters, then recompute the rotary table.

        A cast table would be rounded twice, and `to_empty` would lose its values.
        """
        rotary = self._buffers.pop("rotary")
        try:
            super()._apply(fn, recurse)
        finally:
            self._buffers["rotary"] = rotary
        self._update_rotary()
        return self

    def _load_from_state_dict(self, *args) -> None:
        super()._load_from_state_dict(*args)
        self._update_rotary()  # assign=True may bring parameters of another device or dtype

    def forward(
        self,
        x: Tensor,
        *,
        state: BlockState | None = None,
        return_state: bool = False,
        inplace_state: bool = False,
        cu_seqlens: Tensor | None = None,
        lengths: Tensor | None = None,
        starts: Tensor | None = None,
        spans: Tensor | None = None,
        sequences: Sequences | None = None,
    ) -> Tensor | tuple[Tensor, BlockState]:
        """Map x (B, L, D) to y (B, L, D); options as in :func:`normalized_attention`, `state` is the whole block's.

        sequences: passed by a model instead of cu_seqlens, lengths, starts and spans.
        """
        config, training = self.config, self.training
        if not config.causal:
            check_no_state("MegalodonBlock", state, return_state)
        if sequences is None:
            where = dict(cu_seqlens=cu_seqlens, lengths=lengths, starts=starts, spans=spans)
            sequences = Sequences.of("MegalodonBlock", x, **where)
        past = self.state_type(*state_fields("MegalodonBlock", state, self.state_type))
        norm_state = sequences.norm_state(self.timenorm, x, past.norm)
        t, norm_state = self.timenorm(x, state=norm_state, return_state=True, spans=sequences.spans)
        sent = sequences.send_end(self.cema, t, past)
        v = gated_silu(self.wv(t))  # overlaps with the exchange
        past = sequences.receive(sent)
        c, cema_state = self.cema(t, state=past.cema, return_state=True, spans=sequences.spans)
        m = F.dropout(self.rmsnorm(c), config.hidden_dropout, training)
        gated, other_fields = self._attend(m, self.wz(m), v, norm_state, past, return_state, inplace_state, sequences)
        gated = F.dropout(gated, config.hidden_dropout, training)
        y = x + F.dropout(self.wh1(m) + self.wh2(gated), config.dropout, training)
        return (y, self.state_type(norm_state, cema_state, *other_fields)) if return_state else y

    def _attend(
        self, m: Tensor, z: Tensor, v: Tensor, norm_state: TimestepNormState, past: BlockState, return_state: bool,
        inplace_state: bool, sequences: Sequences,
    ) -> tuple[Tensor, tuple]:  # fmt: skip
        """Return the input of `wh2`, and the new state's fields after the first two; `past`: the initial state."""
        config, rotary = self.config, self.rotary if self._rotary_made_for == self._rotary_for(z) else None
        a = attend(
            z, v, self.gamma, self.beta, rotary,
            num_heads=config.num_heads, chunk_size=config.chunk_size, causal=config.causal, rope_base=config.rotary_base,
            eps=config.norm_eps, state=past.attention, return_state=return_state, inplace_state=inplace_state,
            dropkey=config.attention_dropout if self.training else 0.0, spans=sequences.spans,
        )  # fmt: skip
        a, state = a if return_state else (a, None)
        return gated_silu(self.wr(m), a), (state,)


class NormalizedFFN(WideParameters):
    """The second half of a block: fc2(silu(fc1 n) [* fc3 n]) of n = layer_norm(y), without its residual.

    Args:
        config: a configuration, or the width D of y; then fields of a :class:`MegalodonConfig` follow by name.

    Example:
        >>> import torch, megalodon_ops as mo
        >>> mo.NormalizedFFN(64, ffn_hidden_dim=96, swiglu=True)(torch.randn(2, 10, 64)).shape
        torch.Size([2, 10, 64])
    """

    def __init__(self, config: MegalodonConfig | int, layer: int = 0, **sizes: Any) -> None:
        config = config_of_sizes("NormalizedFFN", config, sizes)
        check_config("NormalizedFFN", config, accept_encoder=True)
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
        """Initialise `alpha`; submodules have their own `reset_parameters`."""
        if self.alpha is not None:
            nn.init.constant_(self.alpha, 0.1 * 0.5**self.layer)

    def forward(self, y: Tensor) -> Tensor:
        """Map the first half's output y (B, L, D) to (B, L, D)."""
        config, training = self.config, self.training
        n = self.norm(y)
        hidden = gated_silu(self.fc1(n), None if self.fc3 is None else self.fc3(n))
        f = F.dropout(self.fc2(F.dropout(hidden, config.hidden_dropout, training)), config.dropout, training)
        return f if self.alpha is None else (self.alpha * f).to(f.dtype)


class MegalodonBlock(nn.Module):
    """One layer. Two-hop residual: the FFN reads the attention's output; its result is added to the block's input.

    Example:
        >>> import torch, megalodon_ops as mo
        >>> config = mo.MegalodonConfig(model_dim=64, z_dim=32, value_dim=64, ffn_hidden_dim=96, chunk_size=16)
        >>> block = mo.MegalodonBlock(config)
        >>> y, state = block(torch.randn(2, 10, 64), return_state=True)
        >>> y, state = block(torch.randn(2, 7, 64), state=state, return_state=True)
        >>> state.attention.position
        tensor([1, 1])
    """

    gradient_checkpointing = False
    """If True, training computes the block by `_gradient_checkpointing_func`, which recomputes it in the backward;
    transformers sets both attributes"""
    _gradient_checkpointing_func: Callable

    def __init__(self, config: MegalodonConfig, layer: int = 0) -> None:
        check_config("MegalodonBlock", config, accept_encoder=True)
        super().__init__()
        self.mega = NormalizedAttention(config)
        self.nffn = NormalizedFFN(config, layer)

    def reset_parameters(self) -> None:
        """Initialise every parameter of the block."""
        reset_all_parameters(self)

    def forward(
        self, x: Tensor, *, state: BlockState | None = None, return_state: bool = False, **options
    ) -> Tensor | tuple[Tensor, BlockState]:
        """Map x (B, L, D) to (B, L, D); options as in :meth:`NormalizedAttention.forward`."""
        options |= dict(state=state, return_state=return_state)
        if not (self.gradient_checkpointing and self.training and torch.is_grad_enabled()) or is_exporting():
            return self._compute(x, **options)
        options.pop("inplace_state", None)
        if state is None and not return_state:
            return self._gradient_checkpointing_func(partial(self._compute, **options), x)
        return checkpoint(
            self._compute, x, use_reentrant=False, **options
        )  # other functions may lose the state's gradient

    def _compute(
        self, x: Tensor, *, state: BlockState | None, return_state: bool, **options
    ) -> Tensor | tuple[Tensor, BlockState]:
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
        self.output = Linear(config.model_dim, config.num_outputs, bias=False, token_rows=True)

    def reset_parameters(self) -> None:
        """Initialise the norm and the matrix."""
        reset_all_parameters(self)


def at_least_float32(logits: Tensor) -> Tensor:
    """Cast 16-bit logits to float32."""
    return logits if logits.dtype in (torch.float32, torch.float64) else logits.float()


def recomputes_layers(model: nn.Module) -> bool:
    """Return True if the backward of a call that begins now recomputes each layer."""
    return model.config.layerwise_ckpt and model.training and torch.is_grad_enabled() and not is_exporting()
