"""States of whole sequences, equal on all ranks, and what a rank's piece needs and makes of them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..model.blocks import BlockState
from ..model.states import MegalodonState, complete
from ..ops.states import AttentionState, TimestepNormState
from .exchange import broadcast_rows, rows_of_owners
from .pieces import Pieces
from .vote import Members


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
    after: MegalodonState, before: MegalodonState | None, pieces: Pieces, chunk_size: int, members: Members
) -> MegalodonState:
    """The state after the whole sequences, equal on all ranks: each sequence's comes from the rank with its last step.

    Args:
        after: the state after the rank's piece.
        before: the state before the whole sequences; None: they begin here. An empty sequence keeps it.

    Gradients of the result go to the rank that a state comes from. Keys and values are sent where a chunk is unfinished.
    """
    before = None if before is None else complete(before)
    own = torch.tensor(
        [pieces.local(s) for s in pieces.owners.get(pieces.rank, ())], dtype=torch.int64, device=after.norm.mean.device
    )
    lengths = torch.tensor([end - begin for begin, end in pieces.spans], device=own.device)
    exchange = _Exchange(pieces, own, lengths, members)
    layers = []
    for i, layer in enumerate(after.layers):
        old = None if before is None else before.layers[i]
        norm, cema = exchange.recurrent(
            layer.norm, layer.cema, None if old is None else old.norm, None if old is None else old.cema
        )
        attention = exchange.attention(layer.attention, None if old is None else old.attention, chunk_size)
        layers.append(BlockState(norm, cema, attention))
    norm, _ = exchange.recurrent(after.norm, None, None if before is None else before.norm, None)
    return tree_map(torch.clone, MegalodonState(tuple(layers), norm))  # FSDP2 warns of outputs that are views


class _Exchange:
    """How the states of a batch's sequences come together."""

    def __init__(self, pieces: Pieces, own: Tensor, lengths: Tensor, members: Members) -> None:
        self.own, self.lengths, self.members, self.owners = own, lengths, members, pieces.owners
        owned = [s for rows in pieces.owners.values() for s in rows]
        self.of_none = [s for s in range(len(pieces.spans)) if s not in {*owned}]

    def recurrent(
        self,
        norm: TimestepNormState,
        cema: Tensor | None,
        norm_before: TimestepNormState | None,
        cema_before: Tensor | None,
    ) -> tuple[TimestepNormState, Tensor | None]:
        """What recurs over steps, in one exchange."""
        rows, groups = len(self.lengths), norm.mean.shape[1]
        flat = _flat(norm, cema)
        others = flat.new_zeros((rows, flat.shape[1])) if norm_before is None else _flat(norm_before, cema_before)
        whole = rows_of_owners(flat.index_select(0, self.own), others, self.owners, self.members)
        sizes = [groups, groups, 2 * groups, whole.shape[1] - 4 * groups]
        mean, var, residual, rest = torch.split_with_sizes_copy(whole, sizes, 1)  # no views: FSDP2 warns of them
        count = self.lengths if norm_before is None else norm_before.count + self.lengths
        state = TimestepNormState(count, mean, var, residual.detach().unflatten(1, (2, groups)))
        return state, None if cema is None else torch.view_as_complex(rest.unflatten(1, (*cema.shape[1:], 2))).clone()

    @torch.no_grad()
    def attention(self, after: AttentionState, before: AttentionState | None, chunk_size: int) -> AttentionState:
        """Keys, values and positions; the owner's positions say how much of an unfinished chunk there is to send."""
        position = self.lengths % chunk_size if before is None else (before.position + self.lengths) % chunk_size
        filled = position.tolist()
        whole = []
        for name in ("k", "v"):
            own = getattr(after, name)
            result = own.new_zeros((len(filled), *own.shape[1:]))
            if before is not None:
                result[self.of_none] = getattr(before, name)[self.of_none]
            for owner, rows in self.owners.items():
                if most := max(filled[s] for s in rows):
                    sent = own[self.own, :most]
                    broadcast_rows(result[:, :most], sent, {owner: rows}, self.members)
            whole.append(result)
        return AttentionState(*whole, position=position)


def _flat(norm: TimestepNormState, cema: Tensor | None) -> Tensor:
    """(S, F): mean, variance, their residuals and, if there is one, CEMA's state."""
    parts = [norm.mean, norm.var, norm.residual.detach().flatten(1)]
    return torch.cat([*parts, *([] if cema is None else [torch.view_as_real(cema).flatten(1)])], 1)
