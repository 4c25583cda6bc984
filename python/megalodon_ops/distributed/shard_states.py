"""Conversion between the states of whole sequences, equal on all ranks, and those of a rank's piece."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._pytree import tree_map, tree_map_only

from ..model.config import MegalodonConfig
from ..public_models import MegalodonState
from ..model.model_state import BlockState, MemoryBlockState, complete
from ..ops.adaptive_working_memory.adaptive_working_memory import num_cached_rows
from ..ops.common.states import AttentionState, TimestepNormState
from .exchange import gather_rows
from .pieces import Pieces

Block = BlockState | MemoryBlockState


def state_of_piece(whole: Block, pieces: Pieces) -> Block:
    """Select a block's state before the piece's sequences; it is arbitrary for one that began in an earlier piece.

    All fields are None if no sequence begins in the piece or those of `whole` are None.
    """
    if not pieces.has_new_sequence() or whole.cema is None:
        return type(whole)(*(None,) * len(whole))
    if not pieces.is_packed:
        return whole
    sequences = slice(pieces.first_sequence, pieces.first_sequence + pieces.num_sequences)
    state = tree_map_only(Tensor, lambda tensor: tensor[sequences], whole)
    k, v, position = state.attention
    is_new = torch.arange(len(position), device=position.device) >= int(pieces.is_continuation)
    return state._replace(attention=AttentionState(k, v, position.where(is_new, 0)))  # a piece begins with a new chunk


def whole_state(
    after: MegalodonState, before: MegalodonState | None, pieces: Pieces, config: MegalodonConfig, group: ProcessGroup
) -> MegalodonState:
    """Return the state after the whole sequences, equal on all ranks.

    A sequence's state comes from the rank with its last position, to which gradients return. Only filled rows of keys
    and values are sent.

    Args:
        after: the state after the rank's piece.
        before: the state before the whole sequences; None: zero. An empty sequence keeps this state.
    """
    integers = partial(torch.tensor, dtype=torch.int64, device=after.norm.mean.device)
    own_rows = integers([*pieces.ending_sequences])
    local_rows = own_rows - pieces.first_sequence
    other_rows = integers([s for s, (begin, end) in enumerate(pieces.spans) if begin == end])
    lengths = integers([end - begin for begin, end in pieces.spans])

    def whole_recurrent(
        norm: TimestepNormState, block: Block | None, old_norm: TimestepNormState | None, old_block: Block | None
    ) -> tuple[TimestepNormState, Block | None]:
        """Return a norm's whole state and a block's whole recurrent fields, by one exchange."""
        flat, groups = _flat(norm, block), norm.mean.shape[1]
        others = flat.new_zeros((len(lengths), flat.shape[1])) if old_norm is None else _flat(old_norm, old_block)
        whole = gather_rows(flat.index_select(0, local_rows), own_rows, others, other_rows, group)
        sizes = [groups, groups, 2 * groups, whole.shape[1] - 4 * groups]
        mean, var, residual, rest = torch.split_with_sizes_copy(whole, sizes, 1)  # no views: FSDP2 warns of them
        count = lengths if old_norm is None else old_norm.count + lengths
        state = TimestepNormState(count, mean, var, residual.detach().unflatten(1, (2, groups)))
        return state, None if block is None else with_recurrent(block, rest)

    @torch.no_grad()
    def whole_cache(new: Tensor, old: Tensor | None, filled: int) -> Tensor:
        """Return keys or values of the whole sequences; `filled`: the largest number of rows that a sequence fills."""
        others = new.new_zeros((len(lengths), *new.shape[1:])) if old is None else old
        sent = gather_rows(new[local_rows, :filled], own_rows, others[:, :filled], other_rows, group)
        return F.pad(sent, (0, 0, 0, 0, 0, config.num_cached_positions - filled))

    old = None if before is None else complete(before)
    layers = []
    for layer, old_layer in zip(after.layers, (None,) * len(after.layers) if old is None else old.layers):
        norm, block = whole_recurrent(layer.norm, layer, None if old_layer is None else old_layer.norm, old_layer)
        end_position = lengths if old_layer is None else old_layer.attention.position + lengths
        position = num_cached_rows(end_position, config.chunk_size, config.visible_chunks)
        filled = int(position.max())
        caches = zip(_caches(layer), [None] * 3 if old_layer is None else _caches(old_layer))
        k, v, *memory_k = (whole_cache(new, others, filled) for new, others in caches)
        block = block._replace(norm=norm, attention=AttentionState(k, v, position))
        if memory_k:
            is_written = (norm.count >= config.num_cached_positions)[:, None, None]
            block = block._replace(memory_mass=block.memory_mass.where(is_written, 0), memory_k=memory_k[0])
        layers.append(block)
    norm, _ = whole_recurrent(after.norm, None, None if old is None else old.norm, None)
    inputs = after.inputs
    if inputs:
        inputs, _ = whole_recurrent(inputs, None, None if old is None else old.inputs, None)
    return tree_map(torch.clone, MegalodonState(tuple(layers), norm, inputs))  # FSDP2 warns of outputs that are views


def flat_recurrent(block: Block) -> Tensor:
    """CEMA's state and, if there is one, the memory and its mass, as a matrix with a row for each of S sequences."""
    return torch.cat([field.flatten(1) for field in _recurrent(block).values()], 1)


def with_recurrent(block: Block, flat: Tensor) -> Block:
    """Return a block's state with its recurrent fields from `flat`; the inverse of :func:`flat_recurrent`."""
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
    """Mean and variance (0 if the count is 0), their residuals, and :func:`flat_recurrent`: a row for each sequence."""
    has_past = (norm.count > 0)[:, None]
    parts = [norm.mean.where(has_past, 0), norm.var.where(has_past, 0), norm.residual.detach().flatten(1)]
    return torch.cat([*parts, *([] if block is None else [flat_recurrent(block)])], 1)
