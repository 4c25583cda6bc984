"""States of whole sequences, equal on all ranks, and what a rank's piece needs and makes of them."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._pytree import tree_map, tree_map_only

from ..model.blocks import BlockState
from ..model.config import MegalodonConfig
from ..model.gecko_block import MemoryBlockState
from ..model.model_state import MegalodonState, complete
from ..ops.adaptive_working_memory.adaptive_working_memory import kept_rows
from ..ops.common.states import AttentionState, TimestepNormState
from .exchange import rows_of_all
from .pieces import Pieces

Block = BlockState | MemoryBlockState


def state_of_piece(whole: Block, pieces: Pieces) -> Block:
    """The state of a block before the piece's sequences; that of one that began in a piece before is arbitrary.

    All fields are None where no sequence begins in the piece, or none of its fields is given.
    """
    if not pieces.begin_here() or whole.cema is None:
        return type(whole)(*(None,) * len(whole))
    if not pieces.is_packed:
        return whole
    own = slice(pieces.first, pieces.first + pieces.count)
    state = tree_map_only(Tensor, lambda tensor: tensor[own], whole)
    k, v, position = state.attention
    is_new = torch.arange(len(position), device=position.device) >= int(pieces.continues)
    return state._replace(attention=AttentionState(k, v, position.where(is_new, 0)))  # a piece begins with a new chunk


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
    ) -> tuple[TimestepNormState, Block | None]:
        """The whole state of a norm and, of a block, the fields that recur over positions, by one exchange."""
        flat, groups = _flat(norm, block), norm.mean.shape[1]
        others = flat.new_zeros((len(lengths), flat.shape[1])) if old_norm is None else _flat(old_norm, old_block)
        whole = rows_of_all(flat.index_select(0, local), own_rows, others, other_rows, group)
        sizes = [groups, groups, 2 * groups, whole.shape[1] - 4 * groups]
        mean, var, residual, rest = torch.split_with_sizes_copy(whole, sizes, 1)  # no views: FSDP2 warns of them
        count = lengths if old_norm is None else old_norm.count + lengths
        state = TimestepNormState(count, mean, var, residual.detach().unflatten(1, (2, groups)))
        return state, None if block is None else with_recurrent(block, rest)

    @torch.no_grad()
    def kept(new: Tensor, old: Tensor | None, filled: int) -> Tensor:
        """Keys or values, as far as the fullest state is filled."""
        others = new.new_zeros((len(lengths), *new.shape[1:])) if old is None else old
        sent = rows_of_all(new[local, :filled], own_rows, others[:, :filled], other_rows, group)
        return F.pad(sent, (0, 0, 0, 0, 0, config.kept_steps - filled))

    old = None if before is None else complete(before)
    layers = []
    for layer, of_old in zip(after.layers, (None,) * len(after.layers) if old is None else old.layers):
        norm, block = recurrent(layer.norm, layer, None if of_old is None else of_old.norm, of_old)
        seen = lengths if of_old is None else of_old.attention.position + lengths
        position = kept_rows(seen, config.chunk_size, config.visible_chunks)
        filled = int(position.max())
        caches = zip(_caches(layer), [None] * 3 if of_old is None else _caches(of_old))
        k, v, *memory_k = (kept(new, others, filled) for new, others in caches)
        block = block._replace(norm=norm, attention=AttentionState(k, v, position))
        if memory_k:
            is_written = (norm.count >= config.kept_steps)[:, None, None]
            block = block._replace(memory_mass=block.memory_mass.where(is_written, 0), memory_k=memory_k[0])
        layers.append(block)
    norm, _ = recurrent(after.norm, None, None if old is None else old.norm, None)
    return tree_map(torch.clone, MegalodonState(tuple(layers), norm))  # FSDP2 warns of outputs that are views


def flat_recurrent(block: Block) -> Tensor:
    """(S, F): CEMA's state and, if there is one, the memory and its mass."""
    return torch.cat([field.flatten(1) for field in _recurrent(block).values()], 1)


def with_recurrent(block: Block, flat: Tensor) -> Block:
    """The state of a block with what :func:`flat_recurrent` has put together of such a one."""
    fields = _recurrent(block)
    parts = torch.split_with_sizes_copy(flat, [field.shape[1:].numel() for field in fields.values()], 1)
    new = {name: part.unflatten(1, fields[name].shape[1:]) for name, part in zip(fields, parts)}
    return block._replace(**new | {"cema": torch.view_as_complex(new["cema"])})


def _recurrent(block: Block) -> dict[str, Tensor]:
    names = ("memory", "memory_mass") if isinstance(block, MemoryBlockState) else ()
    return {"cema": torch.view_as_real(block.cema), **{name: getattr(block, name) for name in names}}


def _caches(block: Block) -> list[Tensor]:
    keys = [block.memory_k] if isinstance(block, MemoryBlockState) else []
    return [block.attention.k, block.attention.v, *keys]


def _flat(norm: TimestepNormState, block: Block | None) -> Tensor:
    """(S, F): mean, variance, of norms that have begun, their residuals and, of a block, :func:`flat_recurrent`."""
    begun = (norm.count > 0)[:, None]
    parts = [norm.mean.where(begun, 0), norm.var.where(begun, 0), norm.residual.detach().flatten(1)]
    return torch.cat([*parts, *([] if block is None else [flat_recurrent(block)])], 1)
