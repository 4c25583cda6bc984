"""States of whole sequences, equal on all ranks, and what a rank's piece needs and makes of them."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._pytree import tree_map

from ..model.blocks import BlockState
from ..model.config import MegalodonConfig
from ..model.states import MegalodonState, complete
from ..ops.adaptive_working_memory import kept_rows
from ..ops.states import AttentionState, TimestepNormState
from .exchange import rows_of_all
from .pieces import Pieces


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
        norm: TimestepNormState, cema: Tensor | None, old: tuple[TimestepNormState, Tensor | None] | None
    ) -> tuple[TimestepNormState, Tensor | None]:
        """What recurs over steps, in one exchange."""
        flat, groups = _flat(norm, cema), norm.mean.shape[1]
        others = flat.new_zeros((len(lengths), flat.shape[1])) if old is None else _flat(*old)
        whole = rows_of_all(flat.index_select(0, local), own_rows, others, other_rows, group)
        sizes = [groups, groups, 2 * groups, whole.shape[1] - 4 * groups]
        mean, var, residual, rest = torch.split_with_sizes_copy(whole, sizes, 1)  # no views: FSDP2 warns of them
        count = lengths if old is None else old[0].count + lengths
        state = TimestepNormState(count, mean, var, residual.detach().unflatten(1, (2, groups)))
        return state, None if cema is None else torch.view_as_complex(rest.unflatten(1, (*cema.shape[1:], 2))).clone()

    @torch.no_grad()
    def attention(new: AttentionState, old: AttentionState | None) -> AttentionState:
        """Keys and values, as far as the fullest state is filled, and positions."""
        seen = lengths if old is None else old.position + lengths
        position = kept_rows(seen, config.chunk_size, config.visible_chunks)
        whole, filled = [], int(position.max())
        for name in ("k", "v"):
            own = getattr(new, name)
            others = own.new_zeros((len(lengths), *own.shape[1:])) if old is None else getattr(old, name)
            sent = rows_of_all(own[local, :filled], own_rows, others[:, :filled], other_rows, group)
            whole.append(F.pad(sent, (0, 0, 0, 0, 0, config.kept_steps - filled)))
        return AttentionState(*whole, position=position)

    old = None if before is None else complete(before)
    layers = []
    for i, layer in enumerate(after.layers):
        of_old = None if old is None else old.layers[i]
        norm, cema = recurrent(layer.norm, layer.cema, None if old is None else (of_old.norm, of_old.cema))
        layers.append(BlockState(norm, cema, attention(layer.attention, None if old is None else of_old.attention)))
    norm, _ = recurrent(after.norm, None, None if old is None else (old.norm, None))
    return tree_map(torch.clone, MegalodonState(tuple(layers), norm))  # FSDP2 warns of outputs that are views


def _flat(norm: TimestepNormState, cema: Tensor | None) -> Tensor:
    """(S, F): mean, variance, their residuals and, if there is one, CEMA's state."""
    parts = [norm.mean, norm.var, norm.residual.detach().flatten(1)]
    return torch.cat([*parts, *([] if cema is None else [torch.view_as_real(cema).flatten(1)])], 1)
