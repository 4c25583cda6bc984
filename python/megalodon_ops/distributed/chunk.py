"""Chunk parallel: each rank of a group holds a piece of the sequence; ranks exchange states inside every block.

A block asks its :class:`Sequences` for the initial states of `timestep_norm` and `cema`. Before an op's own pass, each
rank computes the end state of its piece from zero, sends it to all ranks, and merges the end states of earlier pieces
(merge.py). No rank waits for another rank's pass, except with a working memory: then all wait for rank 0's
(shard_memory.py). If attention sees two chunks, each rank sends the keys and values of its last chunk to the next rank.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from ..model.layers import ComplexEMA
from ..model.sequences import Sequences
from ..ops.adaptive_working_memory.adaptive_working_memory import num_cached_rows, read_write_and_keep
from ..ops.cema.cema import cema_end_state
from ..ops.common.spans import num_positions
from ..ops.common.states import AttentionState, TimestepNormState, WorkingMemoryState, accumulation_dtype
from ..ops.timestep_norm.timestep_norm import timestep_norm_end_state
from .exchange import send_to_all, send_to_next
from .merge import merged_cema, merged_norm, norm_in_float64
from .pieces import Pieces
from .shard_memory import memory_of_piece
from .shard_states import Block, flat_recurrent, state_of_piece, with_recurrent


@dataclass(frozen=True, eq=False, kw_only=True)
class ShardedSequences(Sequences):
    """The sequences in a rank's piece, and the exchanges that give the rank their initial states.

    The `given` states are those of the whole sequences. This object is an argument of the block, so a block that is
    recomputed in the backward uses the pieces of its call.
    """

    pieces: Pieces
    group: ProcessGroup

    def norm_state(self, num_groups: int, x: Tensor, given: TimestepNormState | None) -> TimestepNormState:
        """Return a norm's initial state over the piece x; every rank sends its end state and waits for the others'."""
        pieces = self.pieces
        part, options = self._carried_part(x)
        end = timestep_norm_end_state(part, num_groups=num_groups, **options)
        start = None if given is None else norm_in_float64(given)
        count = None if given is None else given.count
        ends, start, work = send_to_all(norm_in_float64(end), start, self.group)
        work.wait()
        merge = partial(merged_norm, dtype=accumulation_dtype(x.dtype))
        state = merge(ends, pieces.sources, pieces.source_lengths, self._open_rows(start), self._open_rows(count))
        if not pieces.is_packed:
            return state
        whole = (None,) * len(state) if start is None else merge(start[None], [], [], start, count)
        return TimestepNormState(*map(self._with_new_rows, state, whole))

    def send_end(self, cema: ComplexEMA, t: Tensor, given: Block) -> tuple:
        """Send the end state of `cema` over the piece t to all ranks; return what :meth:`receive` needs."""
        p, q, _, _ = cema.coefficients()
        part, options = self._carried_part(t)
        ends = cema_end_state(part, p, q, **options)
        recurrent = None if given.cema is None else flat_recurrent(given)
        return given, q, *send_to_all(torch.view_as_real(ends), recurrent, self.group)

    def receive(self, sent: tuple) -> Block:
        """Wait for the end states of all ranks; return the block's initial state."""
        whole, q, ends, recurrent, work = sent
        work.wait()
        pieces = self.pieces
        whole = whole if recurrent is None else with_recurrent(whole, recurrent)
        ends, initial = torch.view_as_complex(ends), self._open_rows(whole.cema)
        cema = merged_cema(q, ends, pieces.sources, pieces.source_lengths, initial)
        return state_of_piece(whole, pieces)._replace(cema=self._with_new_rows(cema, whole.cema))

    def carry(self, op: Callable, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        """Call an op with the previous piece's last chunk, if it sees two chunks, and the memory of earlier pieces."""
        (q, k, v), added, sequences = self._with_previous_chunk(q, k, v, **options)
        if op is read_write_and_keep:
            op = partial(memory_of_piece, pieces=self.pieces, group=self.group)
        result = op(q, k, v, **options, spans=sequences.spans)
        return (result[0][:, added:], *result[1:]) if isinstance(result, tuple) else result[:, added:]

    def _with_previous_chunk(
        self, q: Tensor, k: Tensor, v: Tensor, *, chunk_size: int, visible_chunks: int,
        state: AttentionState | WorkingMemoryState | None, **_: Any,
    ) -> tuple[tuple[Tensor, Tensor, Tensor], int, Sequences]:  # fmt: skip
        """Put the previous piece's last chunk before k and v, and zeros before q; also return the added length."""
        if visible_chunks == 1:
            return (q, k, v), 0, self
        last_k = _last_chunk(self.pieces, k, state, "k", chunk_size)
        last_v = _last_chunk(self.pieces, v, state, "v", chunk_size)
        last = torch.cat([last_k, last_v], -1)
        previous = send_to_next(last, self.pieces.next_rank, self.pieces.previous_rank, self.group)
        previous = previous if self.pieces.sources else previous[:, :0]
        added, spans = previous.shape[1], self.spans
        previous_k, previous_v = previous.split([k.shape[-1], v.shape[-1]], -1)
        k, v = torch.cat([previous_k, k], 1), torch.cat([previous_v, v], 1)
        sequences = Sequences(spans)
        if self.pieces.is_packed and added:  # the first sequence continues, and begins with the added chunk
            sequences = Sequences(torch.cat([spans[:1] + spans.new_tensor([0, added]), spans[1:] + added]))
        elif added and spans is not None:
            lengths = num_positions(k, spans)
            sequences = Sequences.of("Megalodon", k, lengths=lengths + added * (lengths > 0))
        return (F.pad(q, (0, 0, 0, 0, added, 0)), k, v), added, sequences

    def _carried_part(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor | None]]:
        """Return the part of x (B, L, D) whose end state the ranks exchange, and the options of an op on this part."""
        return (x[:, slice(*self.pieces.tail)], {}) if self.pieces.is_packed else (x, {"spans": self.spans})

    def _open_rows(self, start: Tensor | None) -> Tensor | None:
        """Select the states (R, ...) of sequences that are open where the piece begins from those of all (S, ...)."""
        first = self.pieces.first_sequence
        if start is None or not self.pieces.is_packed:
            return start
        return start[first : first + 1] if self.pieces.is_continuation else start.new_zeros((1, *start.shape[1:]))

    def _with_new_rows(self, carried: Tensor, start: Tensor | None) -> Tensor:
        """Return the states of the piece's sequences: `carried` (1, ...) of a continued one, `start` of new ones."""
        pieces = self.pieces
        if not pieces.is_packed:
            return carried
        num_continued, first = int(pieces.is_continuation), pieces.first_sequence
        shape = (pieces.num_sequences - num_continued, *carried.shape[1:])
        new = carried.new_zeros(shape) if start is None else start[first + num_continued : first + pieces.num_sequences]
        return torch.cat([carried[:num_continued], new])


def _last_chunk(
    pieces: Pieces, x: Tensor, cache: AttentionState | WorkingMemoryState | None, name: str, chunk_size: int
) -> Tensor:
    """Return the last chunk (R, C, ...) of x, k or v by `name`, of the sequences that are open where the piece ends.

    The first positions of a chunk that began before the whole batch are in `cache`. For sequences that end in the piece
    the values are arbitrary: no other rank reads them.
    """
    begin, end = pieces.tail or (0, x.shape[1])
    own = x[:, max(begin, end - chunk_size) : end]
    missing = chunk_size - own.shape[1]
    if cache is None or not missing:
        return F.pad(own, (0, 0, 0, 0, missing, 0))
    cached, count = getattr(cache, name), num_cached_rows(cache.position, chunk_size, visible_chunks=2)
    if pieces.is_packed:
        cached, count = cached[-1:], count[-1:]
    rows = (count[:, None] + torch.arange(-missing, 0, device=count.device)).clamp(min=0)
    return torch.cat([cached[torch.arange(len(cached), device=count.device)[:, None], rows], own], 1)
