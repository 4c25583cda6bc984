"""Chunk parallel: each rank of a group holds a piece of the sequence, and states cross ranks inside of every block.

A block asks its :class:`Sequences` for the states that `timestep_norm` and `cema` begin with. Before an op's own pass,
each rank makes the state that its piece ends with when begun from nothing, sends it to all, and merges those of earlier
pieces (merge.py). No rank waits for another one's pass, but for rank 0's over a working memory (shard_memory.py). Where
attention sees two chunks, each rank hands the keys and values of its last chunk on to the next.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from ..model.layers import ComplexEMA, TimestepNorm
from ..model.sequences import Sequences
from ..ops.adaptive_working_memory.adaptive_working_memory import kept_rows, read_write_and_keep
from ..ops.cema.cema import cema_end_state
from ..ops.common.definition import accumulation_dtype
from ..ops.common.states import AttentionState, TimestepNormState, WorkingMemoryState
from ..ops.timestep_norm.timestep_norm import timestep_norm_end_state
from .exchange import hand_on, send_to_all
from .shard_memory import memory_of_piece
from .merge import merged_cema, merged_norm, norm_in_float64
from .pieces import Pieces
from .shard_states import Block, flat_recurrent, state_of_piece, with_recurrent


@dataclass(frozen=True, eq=False, kw_only=True)
class ShardedSequences(Sequences):
    """The sequences in a rank's piece, and the exchanges by which the rank learns the states that they begin with.

    States that are given are those of all whole sequences. A call's pieces travel with its arguments, so that a block
    which is computed once more in the backward finds those of its own call.
    """

    pieces: Pieces
    group: ProcessGroup

    def norm_state(self, norm: TimestepNorm, x: Tensor, given: TimestepNormState | None) -> TimestepNormState:
        """The state that a norm begins the piece x with; every rank sends its end, and waits for those of the others."""
        pieces, real = self.pieces, accumulation_dtype(x.dtype)
        part, options = self._exchanged(x)
        ends = timestep_norm_end_state(part, num_groups=norm.num_groups, **options)
        start, count = (None, None) if given is None else (norm_in_float64(given), given.count)
        ends, start, work = send_to_all(norm_in_float64(ends), start, self.group)
        work.wait()
        begun = self._before_piece(start), self._before_piece(count)
        state = merged_norm(ends, pieces.sources, pieces.steps, *begun, dtype=real)
        if not pieces.is_packed:
            return state
        rest = (None,) * 4 if start is None else merged_norm(start[None], [], [], start, count, dtype=real)
        return TimestepNormState(*map(self._with_rest, state, rest))

    def send_end(self, cema: ComplexEMA, t: Tensor, given: Block) -> tuple:
        p, q, _, _ = cema.coefficients()
        part, options = self._exchanged(t)
        ends = cema_end_state(part, p, q, **options)
        recurrent = None if given.cema is None else flat_recurrent(given)
        return given, q, *send_to_all(torch.view_as_real(ends), recurrent, self.group)

    def receive(self, sent: tuple) -> Block:
        whole, q, ends, recurrent, work = sent
        work.wait()
        pieces = self.pieces
        whole = whole if recurrent is None else with_recurrent(whole, recurrent)
        ends, begun = torch.view_as_complex(ends), self._before_piece(whole.cema)
        cema = merged_cema(q, ends, pieces.sources, pieces.steps, begun)
        return state_of_piece(whole, pieces)._replace(cema=self._with_rest(cema, whole.cema))

    def carry(self, op: Callable, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        """Call an op behind the last chunk of the piece before, if it sees two; a memory is that of all pieces before."""
        (q, k, v), added, sequences = self._behind(q, k, v, **options)
        if op is read_write_and_keep:
            op = partial(memory_of_piece, pieces=self.pieces, group=self.group)
        result = op(q, k, v, **options, **sequences.keywords)
        return (result[0][:, added:], *result[1:]) if isinstance(result, tuple) else result[:, added:]

    def _behind(
        self, q: Tensor, k: Tensor, v: Tensor, *, chunk_size: int, visible_chunks: int,
        state: AttentionState | WorkingMemoryState | None, **_: Any,
    ) -> tuple[tuple[Tensor, Tensor, Tensor], int, Sequences]:  # fmt: skip
        """q, k, v behind the last chunk of the piece before, with zeros for its q; its length; where sequences lie then."""
        if visible_chunks == 1:
            return (q, k, v), 0, self
        last = [_last_chunk(self.pieces, x, state, name, chunk_size) for name, x in (("k", k), ("v", v))]
        before = hand_on(torch.cat(last, -1), self.pieces.after, self.pieces.before, self.group)
        before = before if self.pieces.sources else before[:, :0]
        added, sizes, offsets = before.shape[1], [k.shape[-1], v.shape[-1]], self.cu_seqlens
        k, v = (torch.cat(parts, 1) for parts in zip(before.split(sizes, -1), (k, v)))
        offsets = None if offsets is None else torch.cat([offsets[:1], offsets[1:] + added])
        lengths = None if self.lengths is None else self.lengths + added * (self.lengths > 0)
        return (F.pad(q, (0, 0, 0, 0, added, 0)), k, v), added, Sequences(offsets, lengths)

    def _exchanged(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor | None]]:
        """The positions of x (B, L, D) whose end the ranks exchange, as arguments of an op."""
        return (x[:, slice(*self.pieces.tail)], {}) if self.pieces.is_packed else (x, {"lengths": self.lengths})

    def _before_piece(self, start: Tensor | None) -> Tensor | None:
        """The states (R, ...) before the sequences that are open where the piece begins, of those of all (S, ...)."""
        pieces = self.pieces
        if start is None or not pieces.is_packed:
            return start
        return start[pieces.first : pieces.first + 1] if pieces.continues else start.new_zeros((1, *start.shape[1:]))

    def _with_rest(self, carried: Tensor, start: Tensor | None) -> Tensor:
        """The states of the piece's sequences: of the one that was open before (1, ...), and of those that begin here."""
        pieces = self.pieces
        if not pieces.is_packed:
            return carried
        known = int(pieces.continues)
        begin = slice(pieces.first + known, pieces.first + pieces.count)
        shape = (pieces.count - known, *carried.shape[1:])
        return torch.cat([carried[:known], carried.new_zeros(shape) if start is None else start[begin]])


def _last_chunk(
    pieces: Pieces, x: Tensor, kept: AttentionState | WorkingMemoryState | None, name: str, chunk_size: int
) -> Tensor:
    """(R, C, ...): the last chunk of the sequences that are open where the piece ends, of x, whose name in `kept` is given.

    A chunk that began before the whole batch has its first rows in `kept`. Of sequences that end in the piece the values
    are arbitrary: no other rank reads them.
    """
    begin, end = pieces.tail or (0, x.shape[1])
    own = x[:, max(begin, end - chunk_size) : end]
    missing = chunk_size - own.shape[1]
    if kept is None or not missing:
        return F.pad(own, (0, 0, 0, 0, missing, 0))
    cache, count = getattr(kept, name), kept_rows(kept.position, chunk_size, visible_chunks=2)
    if pieces.is_packed:
        cache, count = cache[-1:], count[-1:]
    rows = (count[:, None] + torch.arange(-missing, 0, device=count.device)).clamp(min=0)
    return torch.cat([cache[torch.arange(len(cache), device=count.device)[:, None], rows], own], 1)
