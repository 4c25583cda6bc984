"""Parts of MEGALODON's successor, Gecko (arXiv 2601.06463), in a block: a working memory, two visible chunks.

With `config.working_memory`, a block computes y = x + wh1 m + wh2 (a * r + adaptive_working_memory(q, k, v)). gamma and
beta have two more rows, for the memory's queries and keys, which have no rotary positions. These queries and keys are
initially 3 sqrt(K) times as large as Gecko's, with which no model learned retrieval.

With `config.visible_chunks` of 2, attention also sees the previous chunk, and rotary positions continue from chunk to
chunk.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import MegalodonConfig
from .model_state import BlockState, CallOptions, MemoryBlockState
from .sequences import Sequences
from ..ops.adaptive_working_memory.adaptive_working_memory import read_write_and_keep
from ..ops.chunked_attention.chunked_attention import chunked_attention
from ..ops.common.definition import autocast, call
from ..ops.common.spans import num_positions, pairs_of, token_sequences
from ..ops.common.states import TimestepNormState, accumulation_dtype
from ..ops.normalized_qk.normalized_qk import normalized_qk, rotary_frequencies, rotary_rows
from ..ops.normalized_qk.normalized_qk import rotary_table_of, rotated_queries_and_keys

_MEMORY_RMS = 3.0
"""Initial root mean square of the working memory's queries and keys: docs/claims.md"""


def has_gecko_parts(config: MegalodonConfig) -> bool:
    """Return True if a block of this configuration has a working memory or sees two chunks."""
    return config.working_memory or config.visible_chunks > 1


def initial_memory_gamma(config: MegalodonConfig) -> float:
    """Return the initial value of the memory's two rows of gamma."""
    return _MEMORY_RMS * (config.z_dim // config.num_heads) ** 0.5 - 1


def attend_with_gecko_parts(
    block: nn.Module, rotary: Tensor | None, z: Tensor, v: Tensor, norm_state: TimestepNormState,
    past: BlockState | MemoryBlockState, options: CallOptions,
) -> tuple[Tensor, Tensor | None, tuple]:  # fmt: skip
    """Return what attention and memory read, each (B, L, H * V), and the new state's fields after `norm` and `cema`.

    Without a memory, its output is None.

    Args:
        block: a :class:`NormalizedAttention`, for its configuration, gamma and beta.
        rotary: the block's rotary table, or None.
        z, v: (B, L, H * K) and (B, L, H * V), before their heads are split.
        norm_state: the new state of the block's timestep norm, with the position after each sequence's last token.
        past: the block's initial state.
    """
    config, sequences = block.config, options.sequences
    z, v = autocast(z, v)
    v = v.unflatten(-1, (config.num_heads, -1))
    read, memory = None, []
    if config.working_memory:  # before the attention, which may overwrite the values of its state
        read, *memory = _read_and_write(block, z, v, past, options)
    if config.visible_chunks > 1:
        rotary, rows, position = _rotary_over_chunks(config, z, norm_state.count, sequences)
    else:
        rows, position = config.chunk_size, None if past.attention is None else past.attention[2]
    q, k = rotated_queries_and_keys(
        z,
        block.gamma[:2],
        block.beta[:2],
        rotary,
        num_heads=config.num_heads,
        chunk_size=rows,
        rope_base=config.rotary_base,
        eps=config.norm_eps,
        position=position,
        spans=sequences.spans,
    )
    a = sequences.carry(
        chunked_attention,
        q,
        k,
        v,
        chunk_size=config.chunk_size,
        visible_chunks=config.visible_chunks,
        state=past.attention,
        return_state=options.return_state,
        inplace_state=options.inplace_state,
        dropkey=config.attention_dropout if block.training else 0.0,
    )
    a, state = a if options.return_state else (a, None)
    return a.flatten(-2), read, (state, *memory)


def _read_and_write(
    block: nn.Module, z: Tensor, v: Tensor, past: MemoryBlockState, options: CallOptions
) -> tuple[Tensor, ...]:
    """Return the working memory's output (B, L, H * V) and its fields of the new state."""
    config, sequences, inplace = block.config, options.sequences, options.inplace_state
    q, k = normalized_qk(
        z,
        block.gamma[2:],
        block.beta[2:],
        num_heads=config.num_heads,
        eps=config.norm_eps,
        spans=sequences.spans,
        chunk_size=1,  # every position is the first of its chunk, where rotary angles are 0
    )
    read, *memory = sequences.carry(
        read_write_and_keep,
        q,
        k,
        v,
        chunk_size=config.chunk_size,
        visible_chunks=config.visible_chunks,
        state=None if past.memory is None else past.working_memory(),
        to_end=options.return_state,
        inplace=inplace,
        cached_rows=past.attention[2] if inplace and past.attention is not None else None,
    )
    return read.flatten(-2), *memory


def _rotary_over_chunks(
    config: MegalodonConfig, z: Tensor, end: Tensor, sequences: Sequences
) -> tuple[Tensor, int, Tensor]:
    """Return a rotary table with a row for each token of z (B, L, ...), its number of rows, and each sequence's first.

    end: (S,) position after the last token of each sequence.
    """
    B, L = z.shape[:2]
    dtype, spans = accumulation_dtype(z.dtype), sequences.spans
    key_dim, rotary_base = config.z_dim // config.num_heads, config.rotary_base
    num_rows = max(B * L, 1)
    if spans is None or spans.dim() == 3:  # each row of the batch starts with its sequence
        starts = torch.arange(B, device=z.device) * L
        row_end = end if spans is None else end + L - num_positions(z, spans)
        frequencies = rotary_frequencies(key_dim, rotary_base, z.device)
        table = call(rotary_rows, row_end, frequencies, L, dtype == torch.float64)
    else:
        starts, ends = pairs_of(spans).unbind(1)
        offsets = F.pad(ends - end, (0, 1))  # place in the flattened batch minus position in the sequence; padding: 0
        positions = torch.arange(num_rows, device=z.device)
        positions[: B * L] -= offsets[token_sequences(z, spans).flatten()]
        table = rotary_table_of(positions, key_dim, rotary_base, dtype)
    return table, num_rows, starts.clamp(max=num_rows - 1)
