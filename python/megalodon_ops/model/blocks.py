"""The blocks of MEGALODON. Parameter names are those of the released checkpoints."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .config import MegalodonConfig, check_config, config_of_sizes
from .gecko_block import attend_with_gecko_parts, has_gecko_parts, initial_memory_gamma
from .layers import ComplexEMA, FusedLinear, LayerNorm, Linear, RMSNorm, SequenceNorm, StateSlot
from .layers import TimestepNorm, WideParameters, check_no_state, gated_product, reset_all_parameters
from .model_state import BlockState, CallOptions, MemoryBlockState, block_state_type
from .sequences import Sequences
from ..ops.common.definition import is_exporting
from ..ops.normalized_attention.normalized_attention import attend
from ..ops.normalized_qk.normalized_qk import rotary_table
from ..ops.common.states import TimestepNormState, accumulation_dtype, state_fields

_MAX_ROTARY_SIZE = 1 << 24  # elements, 64 MiB in float32; the released models' tables have 2^19 and 2^20


class NormalizedAttention(WideParameters):
    """The first half of a block: timestep norm, CEMA, gated normalized attention, its residual.

    t = timestep_norm(x);  m = rms_norm(cema(t))
    z = wz m;  v = silu(wv t);  r = silu(wr m);  a = normalized_attention(z, v)
    y = x + wh1 m + wh2 (a * r)

    An encoder has a sequence norm, bidirectional CEMA, attention to the whole chunk, and no state. Parts of MEGALODON's
    successor, `working_memory` and `visible_chunks`, are in gecko_block.py.

    Args:
        config: a configuration, or the width D of x; then fields of a :class:`MegalodonConfig` follow by name.
            `norm_num_groups` is by default gcd(D, 32).

    Example:
        >>> import torch, megalodon_ops as mo
        >>> mo.NormalizedAttention(64, z_dim=32, value_dim=64, chunk_size=16)(torch.randn(2, 10, 64)).shape
        torch.Size([2, 10, 64])
    """

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
        rows = 4 if config.working_memory else 2  # queries and keys of attention, then those of the memory
        self.gamma = nn.Parameter(torch.empty(rows, z_dim))
        self.beta = nn.Parameter(torch.empty(rows, z_dim))
        self.register_buffer("rotary", None, persistent=False)
        self._rotary_made_for = None  # the arguments of `rotary_table` that gave the buffer
        self._update_rotary()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise `gamma` and `beta`; submodules have their own `reset_parameters`."""
        nn.init.zeros_(self.gamma)
        nn.init.zeros_(self.beta)
        if self.config.working_memory:
            nn.init.constant_(self.gamma[2:], initial_memory_gamma(self.config))

    def _rotary_for(self, like: Tensor) -> tuple:
        """Arguments of :func:`rotary_table` for tensors of the dtype and device of `like`."""
        config = self.config
        key_dim, dtype = config.z_dim // config.num_heads, accumulation_dtype(like.dtype)
        return config.chunk_size, key_dim, config.rotary_base, dtype, like.device

    def _update_rotary(self) -> None:
        """Rebuild the buffer `rotary` for the parameters' device and dtype. Very large tables are not kept."""
        arguments = self._rotary_for(self.gamma)
        rows, key_dim, *_ = arguments
        if rows * key_dim <= _MAX_ROTARY_SIZE and arguments != self._rotary_made_for:
            self.rotary = rotary_table(*arguments)
            self._rotary_made_for = arguments

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
        state: BlockState | MemoryBlockState | None = None,
        return_state: bool = False,
        inplace_state: bool = False,
        cu_seqlens: Tensor | None = None,
        lengths: Tensor | None = None,
        starts: Tensor | None = None,
        spans: Tensor | None = None,
        options: CallOptions | None = None,
        new_state: StateSlot | None = None,
    ) -> Tensor | tuple[Tensor, BlockState | MemoryBlockState]:
        """Map x (B, L, D) to y (B, L, D); options as in :func:`normalized_attention`, `state` is the whole block's.

        A model passes `options`, all options as one value, and `new_state`, a place for the new state; then the result
        is y alone.
        """
        if options is None:
            where = dict(cu_seqlens=cu_seqlens, lengths=lengths, starts=starts, spans=spans)
            options = CallOptions(state, return_state, inplace_state, Sequences.of("MegalodonBlock", x, **where))
        if not self.config.causal:
            check_no_state("MegalodonBlock", options.state, options.return_state)
        return result_of(*self._compute(x, options), new_state)

    def _compute(self, x: Tensor, options: CallOptions) -> tuple[Tensor, BlockState | MemoryBlockState | None]:
        """Return y and, if wanted, the new state."""
        config, training, sequences = self.config, self.training, options.sequences
        new_norm, new_cema = StateSlot(), StateSlot()
        kind = block_state_type(config)
        past = kind(*state_fields("MegalodonBlock", options.state, kind))
        norm_state = sequences.norm_state(self.timenorm.num_groups, x, past.norm)
        t = self.timenorm(x, state=norm_state, new_state=new_norm, spans=sequences.spans)
        sent = sequences.send_end(self.cema, t, past)  # ranks that hold pieces of sequences exchange states
        v = gated_product(self.wv, t)  # overlaps with the exchange
        past = sequences.receive(sent)
        c = self.cema(t, state=past.cema, new_state=new_cema, spans=sequences.spans)
        m = F.dropout(self.rmsnorm(c), config.hidden_dropout, training)
        gated, other_fields = self._attend(m, self.wz(m), v, new_norm.state, past, options)
        gated = F.dropout(gated, config.hidden_dropout, training)
        if isinstance(self.wh1, FusedLinear) and isinstance(self.wh2, FusedLinear):
            y = self.wh2(gated, add=self.wh1(m, add=x))
        else:
            y = x + F.dropout(self.wh1(m) + self.wh2(gated), config.dropout, training)
        return y, (kind(new_norm.state, new_cema.state, *other_fields) if options.return_state else None)

    def _attend(
        self, m: Tensor, z: Tensor, v: Tensor, norm_state: TimestepNormState, past: BlockState | MemoryBlockState,
        options: CallOptions,
    ) -> tuple[Tensor, tuple]:  # fmt: skip
        """Return the input of `wh2`, and the new state's fields after `norm` and `cema`; `past`: the initial state."""
        config = self.config
        rotary = self.rotary if self._rotary_made_for == self._rotary_for(z) else None
        if has_gecko_parts(config):
            a, read, fields = attend_with_gecko_parts(self, rotary, z, v, norm_state, past, options)
            gated = gated_product(self.wr, m, a)
            return gated if read is None else gated + read, fields
        a = attend(
            z, v, self.gamma, self.beta, rotary,
            num_heads=config.num_heads, chunk_size=config.chunk_size, causal=config.causal, rope_base=config.rotary_base,
            eps=config.norm_eps, state=past.attention, return_state=options.return_state,
            inplace_state=options.inplace_state, dropkey=config.attention_dropout if self.training else 0.0,
            spans=options.sequences.spans,
        )  # fmt: skip
        a, state = a if options.return_state else (a, None)
        return gated_product(self.wr, m, a), (state,)


class NormalizedFFN(WideParameters):
    """The second half of a block: fc2(silu(fc1 n) [* fc3 n]) of n = layer_norm(y), without its residual.

    Args:
        config: a configuration, or the width D of y; then fields of a :class:`MegalodonConfig` follow by name.
        layer: index of the block in the model; with `rescale_nffn` the initial gain depends on it.

    Example:
        >>> import torch, megalodon_ops as mo
        >>> mo.NormalizedFFN(64, ffn_hidden_dim=96, swiglu=True)(torch.randn(2, 10, 64)).shape
        torch.Size([2, 10, 64])
    """

    def __init__(self, config: MegalodonConfig | int, layer: int = 0, **sizes: Any) -> None:
        config = config_of_sizes("NormalizedFFN", config, sizes)
        check_config("NormalizedFFN", config, accept_encoder=True)
        super().__init__()
        self.config = config
        self.layer = layer
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
        hidden = gated_product(self.fc1, n, None if self.fc3 is None else self.fc3(n))
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

    def __init__(self, config: MegalodonConfig, layer: int = 0) -> None:
        check_config("MegalodonBlock", config, accept_encoder=True)
        super().__init__()
        self.mega = NormalizedAttention(config)
        self.nffn = NormalizedFFN(config, layer)
        self.recompute: bool | Callable = config.layerwise_ckpt
        """True: in training, the block's activations are not kept; the backward recomputes them. In place of True, a
        function that does this in its own way, called as `recompute(function, x)`, such as
        :func:`torch.utils.checkpoint.checkpoint`"""

    def reset_parameters(self) -> None:
        """Initialise every parameter of the block."""
        reset_all_parameters(self)

    def forward(
        self,
        x: Tensor,
        *,
        state: BlockState | MemoryBlockState | None = None,
        return_state: bool = False,
        inplace_state: bool = False,
        cu_seqlens: Tensor | None = None,
        lengths: Tensor | None = None,
        starts: Tensor | None = None,
        spans: Tensor | None = None,
        options: CallOptions | None = None,
        new_state: StateSlot | None = None,
    ) -> Tensor | tuple[Tensor, BlockState | MemoryBlockState]:
        """Map x (B, L, D) to (B, L, D); arguments as in :meth:`NormalizedAttention.forward`."""
        if options is None:
            where = dict(cu_seqlens=cu_seqlens, lengths=lengths, starts=starts, spans=spans)
            options = CallOptions(state, return_state, inplace_state, Sequences.of("MegalodonBlock", x, **where))
        if not (self.recompute and self.training and torch.is_grad_enabled()) or is_exporting():
            return result_of(*self._compute(x, options), new_state)
        options = options._replace(inplace_state=False)  # the recomputation reads the old state
        if callable(self.recompute) and options.state is None and not options.return_state:
            return self.recompute(lambda x: self._compute(x, options)[0], x)
        # With a state, torch's function: another one may lose the state's gradient.
        return result_of(*checkpoint(self._compute, x, options, use_reentrant=False), new_state)

    def _compute(self, x: Tensor, options: CallOptions) -> tuple[Tensor, BlockState | MemoryBlockState | None]:
        """Return the block's output and, if wanted, the new state."""
        new_state = StateSlot() if options.return_state else None
        y = self.mega(x, options=options, new_state=new_state)
        return x + self.nffn(y), new_state and new_state.state


class Output(nn.Module):
    """Final timestep norm and output matrix."""

    def __init__(self, config: MegalodonConfig) -> None:
        super().__init__()
        self.final_norm = TimestepNorm(config.model_dim, config.norm_num_groups, config.norm_eps)
        self.output = Linear(config.model_dim, config.num_outputs, bias=False, token_rows=True)

    def reset_parameters(self) -> None:
        reset_all_parameters(self)


def at_least_float32(logits: Tensor) -> Tensor:
    """Cast 16-bit logits to float32."""
    return logits if logits.dtype in (torch.float32, torch.float64) else logits.float()


def result_of(y: Tensor, state: Any, new_state: StateSlot | None) -> Tensor | tuple[Tensor, Any]:
    """Put the state into the slot `new_state` and return y. Without a slot return (y, state), or y without a state."""
    if new_state is None:
        return y if state is None else (y, state)
    new_state.state = state
    return y
