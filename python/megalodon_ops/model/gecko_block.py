"""Parts of MEGALODON's successor, Gecko (arXiv 2601.06463), in a block: a working memory, two visible chunks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import BlockState, NormalizedAttention
from .config import MegalodonConfig
from .sequences import Sequences
from ..ops.adaptive_working_memory.adaptive_working_memory import read_write_and_keep
from ..ops.chunked_attention.chunked_attention import chunked_attention
from ..ops.common.definition import autocast, call
from ..ops.common.spans import num_positions, token_sequences
from ..ops.common.states import AttentionState, TimestepNormState, WorkingMemoryState, named_in_programs
from ..ops.gated_silu.gated_silu import gated_silu
from ..ops.normalized_qk.normalized_qk import normalized_qk, rotary_frequencies, rotary_rows
from ..ops.normalized_qk.normalized_qk import rotary_table_of, rotated_queries_and_keys

_MEMORY_RMS = 3.0  # initial root mean square of the working memory's queries and keys: docs/claims.md


@named_in_programs
class MemoryBlockState(NamedTuple):
    """State of a block with a working memory: the fields of a :class:`BlockState` and those of the memory.

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
        """State of :func:`adaptive_working_memory`: the memory, the attention's values, the norm's position count."""
        return WorkingMemoryState(self.memory, self.memory_mass, self.memory_k, self.norm.count, self.attention.v)


def block_state_type(config: MegalodonConfig) -> type[BlockState] | type[MemoryBlockState]:
    """Return the type of the state of a block with this configuration."""
    return MemoryBlockState if config.working_memory else BlockState


class GeckoAttention(NormalizedAttention):
    """First half of a block with a working memory, attention to two chunks, or both.

    With `config.working_memory`, y = x + wh1 m + wh2 (a * r + adaptive_working_memory(q, k, v)); gamma and beta have
    two more rows, for the memory's queries and keys, which have no rotary positions. Initially these are 3 sqrt(K)
    times as large as Gecko's, with which no model learned retrieval. With `config.visible_chunks` of 2, attention also
    sees the previous chunk, and rotary positions continue from chunk to chunk.
    """

    @staticmethod
    def serves(config: MegalodonConfig) -> bool:
        """Return True if a block of this configuration has a working memory or sees two chunks."""
        return config.working_memory or config.visible_chunks > 1

    def __init__(self, config: MegalodonConfig | int, **sizes: Any) -> None:
        super().__init__(config, **sizes)
        config = self.config
        self.state_type = block_state_type(config)
        if config.working_memory:
            self.gamma, self.beta = (nn.Parameter(torch.empty(4, config.z_dim)) for _ in range(2))
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise `gamma` and `beta` of attention and memory; submodules have their own `reset_parameters`."""
        super().reset_parameters()
        nn.init.constant_(self.gamma[2:], _MEMORY_RMS * (self.config.z_dim // self.config.num_heads) ** 0.5 - 1)

    def _attend(
        self, m: Tensor, z: Tensor, v: Tensor, norm_state: TimestepNormState, past: BlockState | MemoryBlockState,
        return_state: bool, inplace_state: bool, sequences: Sequences,
    ) -> tuple[Tensor, tuple]:  # fmt: skip
        config = self.config
        rotary = self.rotary if self._rotary_made_for == self._rotary_for(z) else None
        z, v = autocast(z, v)
        v = v.unflatten(-1, (config.num_heads, -1))
        read, memory = None, []
        if config.working_memory:  # before the attention, which may overwrite the values of its state
            read, *memory = self._read_and_write(z, v, past, return_state, inplace_state, sequences)
        row_options = {
            "chunk_size": config.chunk_size,
            "position": None if past.attention is None else past.attention[2],
        }
        if config.visible_chunks > 1:
            rotary, row_options = self._rotary_over_chunks(z, norm_state.count, sequences)
        qk_options = dict(num_heads=config.num_heads, rope_base=config.rotary_base, eps=config.norm_eps)
        q, k = rotated_queries_and_keys(
            z, self.gamma[:2], self.beta[:2], rotary, **qk_options, **row_options, spans=sequences.spans
        )
        chunks = dict(chunk_size=config.chunk_size, visible_chunks=config.visible_chunks)
        states = dict(state=past.attention, return_state=return_state, inplace_state=inplace_state)
        dropkey = config.attention_dropout if self.training else 0.0
        a = sequences.carry(chunked_attention, q, k, v, dropkey=dropkey, **chunks, **states)
        a, state = a if return_state else (a, None)
        gated = gated_silu(self.wr(m), a.flatten(-2))
        return gated if read is None else gated + read, (state, *memory)

    def _read_and_write(
        self,
        z: Tensor,
        v: Tensor,
        past: MemoryBlockState,
        return_state: bool,
        inplace_state: bool,
        sequences: Sequences,
    ) -> tuple[Tensor, ...]:
        """Return the working memory's output (B, L, H * V) and its fields of the new state."""
        config = self.config
        unrotated = dict(num_heads=config.num_heads, eps=config.norm_eps, chunk_size=1)  # all rotary angles are 0
        q, k = normalized_qk(z, self.gamma[2:], self.beta[2:], **unrotated, spans=sequences.spans)
        chunks = dict(chunk_size=config.chunk_size, visible_chunks=config.visible_chunks)
        state = None if past.memory is None else past.working_memory()
        cached_rows = past.attention[2] if inplace_state and past.attention is not None else None
        states = dict(state=state, to_end=return_state, inplace=inplace_state, cached_rows=cached_rows)
        read, *memory = sequences.carry(read_write_and_keep, q, k, v, **chunks, **states)
        return read.flatten(-2), *memory

    def _rotary_over_chunks(self, z: Tensor, end: Tensor, sequences: Sequences) -> tuple[Tensor, dict]:
        """Return a rotary table with a row for each token of z (B, L, ...), and the op's options that select the rows.

        end: (S,) position after the last token of each sequence.
        """
        (B, L), (_, key_dim, rotary_base, dtype, device) = z.shape[:2], self._rotary_for(z)
        rows, spans = max(B * L, 1), sequences.spans  # at least one row
        if spans is None or spans.dim() == 3:
            starts, frequencies = torch.arange(B, device=device) * L, rotary_frequencies(key_dim, rotary_base, device)
            end = end if spans is None else end + L - num_positions(z, spans)
            table = call(rotary_rows, end, frequencies, L, dtype == torch.float64)
        else:
            (starts, ends), positions = spans.unbind(1), torch.arange(rows, device=device)
            positions[: B * L] -= F.pad(ends - end, (0, 1))[token_sequences(z, spans).flatten()]
            table = rotary_table_of(positions, key_dim, rotary_base, dtype)
        return table, {"chunk_size": rows, "position": starts.clamp(max=rows - 1)}


NormalizedAttention.other_forms.append(
    GeckoAttention
)  # `NormalizedAttention(config)` creates it if it `serves` the config
