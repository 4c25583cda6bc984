"""States of whole sequences, equal on all ranks, and what a rank's piece needs and makes of them."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._pytree import tree_map

from ..model.blocks import BlockState, MemoryBlockState
from ..model.config import MegalodonConfig
from ..model.model_state import MegalodonState, complete
from ..ops.adaptive_working_memory.adaptive_working_memory import kept_rows
from ..ops.common.states import AttentionState, TimestepNormState
from .exchange import rows_of_all
from .pieces import Pieces

Block = BlockState | MemoryBlockState


def state_of_piece(state: MegalodonState, pieces: Pieces) -> MegalodonState:
    """The state as the hooks of chunk parallel take it: of whole sequences, but for attention, which takes its piece's.

    Attention's is None where no sequence begins in the piece: a piece ends at a chunk boundary, with an empty chunk.
    """
    layers = [layer._replace(attention=_attention_of_piece(layer.attention, pieces)) for layer in state.layers]
    return MegalodonState(tuple(layers), state.norm)


def _attention_of_piece(attention: AttentionState, pieces: Pieces) -> AttentionState | None:
    if not pieces.begin_here():
        return None
    if not pieces.is_packed:
        return attention
    k, v, position = (tensor[pieces.first : pieces.first + pieces.count] for tensor in attention)
    if pieces.continues:
        position = position.index_fill(0, torch.zeros(1, dtype=torch.int64, device=position.device), 0)
    return AttentionState(k, v, position)


def whole_state(
    after: MegalodonState, before: MegalodonState | None, pieces: Pieces, config: MegalodonConfig, group: ProcessGroup
) -> MegalodonState:
    """The state after the whole sequences, equal on all ranks: each sequence's comes from the rank with its last step.

    Args:
        after: the state after the rank's piece.
        before: the state before the whole sequences; None: they begin here. An empty sequence keeps it.

    Gradients of the result go to the rank that a state comes from. Keys and values are sent as far as states are filled.
    """
    integers = partial(torch.tensor, dtype=torch.int64, device=after.norm.mean.device)
    own_rows, local = integers([*pieces.end_here]), integers([s - pieces.first for s in pieces.end_here])
    other_rows = integers([s for s, (begin, end) in enumerate(pieces.spans) if begin == end])
    lengths = integers([end - begin for begin, end in pieces.spans])

    def recurrent(
        norm: TimestepNormState, block: Block | None, old_norm: TimestepNormState | None, old_block: Block | None
    ) -> tuple[TimestepNormState, list[Tensor]]:
        """What recurs over steps, in one exchange: the state of a norm, and :func:`recurrent_fields` of a block."""
        flat, groups = _flat(norm, block), norm.mean.shape[1]
        others = flat.new_zeros((len(lengths), flat.shape[1])) if old_norm is None else _flat(old_norm, old_block)
        whole = rows_of_all(flat.index_select(0, local), own_rows, others, other_rows, group)
        sizes = [groups, groups, 2 * groups, whole.shape[1] - 4 * groups]
        mean, var, residual, rest = torch.split_with_sizes_copy(whole, sizes, 1)  # no views: FSDP2 warns of them
        count = lengths if old_norm is None else old_norm.count + lengths
        state = TimestepNormState(count, mean, var, residual.detach().unflatten(1, (2, groups)))
        return state, [] if block is None else recurrent_fields(rest, like=block)

    @torch.no_grad()
    def kept(new: Tensor, old: Tensor | None, filled: int) -> Tensor:
        """Keys or values, as far as the fullest state is filled."""
        others = new.new_zeros((len(lengths), *new.shape[1:])) if old is None else old
        sent = rows_of_all(new[local, :filled], own_rows, others[:, :filled], other_rows, group)
        return F.pad(sent, (0, 0, 0, 0, 0, config.kept_steps - filled))

    old = None if before is None else complete(before)
    layers = []
    for layer, of_old in zip(after.layers, (None,) * len(after.layers) if old is None else old.layers):
        norm, (cema, *memory) = recurrent(layer.norm, layer, None if of_old is None else of_old.norm, of_old)
        seen = lengths if of_old is None else of_old.attention.position + lengths
        position = kept_rows(seen, config.chunk_size, config.visible_chunks)
        filled = int(position.max())
        caches = zip(_caches(layer), [None] * 3 if of_old is None else _caches(of_old))
        k, v, *memory_k = (kept(new, others, filled) for new, others in caches)
        state = BlockState(norm, cema, AttentionState(k, v, position))
        if memory:
            matrix, mass = memory
            is_written = norm.count >= config.kept_steps
            state = MemoryBlockState(*state, matrix, mass.where(is_written[:, None, None], 0), *memory_k)
        layers.append(state)
    norm, _ = recurrent(after.norm, None, None if old is None else old.norm, None)
    return tree_map(torch.clone, MegalodonState(tuple(layers), norm))  # FSDP2 warns of outputs that are views


def flat_recurrent(block: Block) -> Tensor:
    """(S, F): CEMA's state and, if there is one, the memory and its mass."""
    memory = [block.memory.flatten(1), block.memory_mass.flatten(1)] if isinstance(block, MemoryBlockState) else []
    return torch.cat([torch.view_as_real(block.cema).flatten(1), *memory], 1)


def recurrent_fields(flat: Tensor, like: Block) -> list[Tensor]:
    """What :func:`flat_recurrent` has put together, for a block like this one: CEMA's state, the memory, its mass."""
    real = [torch.view_as_real(like.cema)]
    if isinstance(like, MemoryBlockState):
        real += [like.memory, like.memory_mass]
    parts = torch.split_with_sizes_copy(flat, [part.shape[1:].numel() for part in real], 1)
    cema, *memory = (part.unflatten(1, of.shape[1:]) for part, of in zip(parts, real))
    return [torch.view_as_complex(cema), *memory]


def _caches(block: Block) -> list[Tensor]:
    keys = [block.memory_k] if isinstance(block, MemoryBlockState) else []
    return [block.attention.k, block.attention.v, *keys]


def _flat(norm: TimestepNormState, block: Block | None) -> Tensor:
    """(S, F): mean, variance, of norms that have begun, their residuals and, of a block, :func:`flat_recurrent`."""
    begun = (norm.count > 0)[:, None]
    parts = [norm.mean.where(begun, 0), norm.var.where(begun, 0), norm.residual.detach().flatten(1)]
    return torch.cat([*parts, *([] if block is None else [flat_recurrent(block)])], 1)
