"""Chunk parallel: each rank of a group holds a piece of the sequence, and states cross ranks inside of every block.

A block is not changed: hooks of torch give `timestep_norm` and `cema` the states that their piece begins with. Before
an op's own pass, each rank makes the state that its piece ends with when begun from nothing, sends it to all, and
merges what the pieces before its own have sent (merge.py). No rank waits for another one's pass, but for the first one's
over a working memory (memory.py). Where attention sees two chunks, each rank hands the keys and values of its last
chunk on to the next.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ..model.layers import ComplexEMA, TimestepNorm
from ..ops.adaptive_working_memory.adaptive_working_memory import kept_rows, read_write_and_keep
from ..ops.cema.cema import cema_end_state
from ..ops.chunked_attention.chunked_attention import chunked_attention
from ..ops.common.definition import accumulation_dtype
from ..ops.common.states import AttentionState, TimestepNormState, WorkingMemoryState
from ..ops.timestep_norm.timestep_norm import timestep_norm_end_state
from .exchange import hand_on, send_to_all
from .shard_memory import memory_of_piece
from .merge import merged_cema, merged_norm, norm_in_float64
from .pieces import Pieces
from .shard_states import Block, flat_recurrent, recurrent_fields


class Hooks:
    """The hooks in a model's blocks and on its final norm.

    A call's `pieces` travel as an argument of the blocks, so that a block which is computed once more in the backward
    finds those of its own call. A block that is called without them computes as ever.
    """

    def __init__(self, model: nn.Module, group: ProcessGroup) -> None:
        self._group = group
        self._pieces: Pieces | None = None
        self._start: Block | None = None
        self._arriving: tuple | None = None  # the poles, and the ends of cema on their way
        self._memory: list[Tensor] | None = None  # memory and mass of the state
        for block in model.layers:
            half = block.mega
            half.register_forward_pre_hook(self.enter_block, with_kwargs=True)
            half.timenorm.register_forward_pre_hook(self.before_norm, with_kwargs=True)
            half.timenorm.register_forward_hook(partial(self.after_norm, half.cema))
            half.cema.register_forward_pre_hook(self.before_cema, with_kwargs=True)
            if half.config.visible_chunks > 1:
                half.attention = self.attention_behind
            if half.config.working_memory:
                half.memory = self.memory_behind
            half.register_forward_hook(self.leave_block, always_call=True)
        model.output.final_norm.register_forward_pre_hook(self.before_norm, with_kwargs=True)

    def enter_block(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Takes the pieces, and the states of all whole sequences; the block keeps the attention's, for this piece."""
        kwargs = dict(kwargs)
        self._pieces, self._start = kwargs.pop("pieces", None), None
        if self._pieces is not None and kwargs.get("state") is not None:
            self._start = kwargs["state"]
            kwargs["state"] = None if self._start.attention is None else self._start
        return args, kwargs

    def before_norm(self, module: TimestepNorm, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        """Gives a norm the state that its piece begins with; the final norm has the pieces among its arguments."""
        pieces = kwargs.get("pieces", self._pieces)
        if pieces is None:
            return None
        x, start = args[0], kwargs["state"] if self._start is None else self._start.norm
        part, options = _exchanged(pieces, x)
        ends = timestep_norm_end_state(part, num_groups=module.num_groups, **options)
        given, count = (None, None) if start is None else (norm_in_float64(start), start.count)
        ends, given, work = send_to_all(norm_in_float64(ends), given, self._group)
        work.wait()
        real, of_open = accumulation_dtype(x.dtype), (_of_open(pieces, given), _of_open(pieces, count))
        state = merged_norm(ends, pieces.sources, pieces.steps, *of_open, dtype=real)
        if pieces.is_packed:
            rest = None if given is None else merged_norm(given[None], [], [], given, count, dtype=real)
            fields = zip(state, rest or (None,) * len(state))
            state = TimestepNormState(*(_with_rest(pieces, field, others) for field, others in fields))
        return args, {name: value for name, value in kwargs.items() if name != "pieces"} | {"state": state}

    def after_norm(self, layer: ComplexEMA, norm: TimestepNorm, args: tuple, output: tuple) -> None:
        """Sends off the end of `cema` over the norm's output."""
        if self._pieces is not None:
            p, q, _, _ = layer.coefficients()
            t, options = _exchanged(self._pieces, output[0])
            ends = cema_end_state(t, p, q, **options)
            start = None if self._start is None else flat_recurrent(self._start)
            self._arriving = q, *send_to_all(torch.view_as_real(ends), start, self._group)

    def before_cema(self, module: ComplexEMA, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        """Waits for what `after_norm` has sent, and gives `cema` the state that its piece begins with."""
        pieces = self._pieces
        if pieces is None:
            return None
        q, ends, start, work = self._arriving
        self._arriving = None
        work.wait()
        ends = torch.view_as_complex(ends)
        start, *self._memory = (None,) * 3 if start is None else recurrent_fields(start, like=self._start)
        state = merged_cema(q, ends, pieces.sources, pieces.steps, _of_open(pieces, start))
        return args, kwargs | {"state": _with_rest(pieces, state, start)}

    def attention_behind(
        self, q: Tensor, k: Tensor, v: Tensor, *, chunk_size: int, state: AttentionState | None, return_state: bool,
        cu_seqlens: Tensor | None, lengths: Tensor | None, **options: Any,
    ) -> Tensor | tuple[Tensor, AttentionState]:  # fmt: skip
        """`chunked_attention` of the piece, behind the last chunk of the piece before."""
        added = 0
        if self._pieces is not None:
            (q, k, v), added, (cu_seqlens, lengths) = self._behind(q, k, v, state, chunk_size, cu_seqlens, lengths)
        result = chunked_attention(
            q, k, v, chunk_size=chunk_size, state=state, cu_seqlens=cu_seqlens, lengths=lengths,
            return_state=return_state, **options,
        )  # fmt: skip
        return (result[0][:, added:], result[1]) if return_state else result[:, added:]

    def memory_behind(
        self, q: Tensor, k: Tensor, v: Tensor, chunk_size: int, visible_chunks: int, state: WorkingMemoryState | None,
        cu_seqlens: Tensor | None, lengths: Tensor | None, to_end: bool, inplace: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """`read_write_and_keep` of the piece, from the memory that the pieces before it have written."""
        if (pieces := self._pieces) is None:
            return read_write_and_keep(
                q, k, v, chunk_size, visible_chunks, state, cu_seqlens, lengths, to_end, inplace
            )  # fmt: skip
        kept, added = None, 0
        if state is not None:
            memory, mass = self._memory
            rows = slice(pieces.first, pieces.first + pieces.count) if pieces.is_packed else slice(None)
            state = WorkingMemoryState(memory[rows], mass[rows], state.k[rows], state.position[rows], state.v)
            kept = AttentionState(state.k, state.v, kept_rows(state.position, chunk_size, visible_chunks))
        if visible_chunks > 1:
            (q, k, v), added, (cu_seqlens, lengths) = self._behind(q, k, v, kept, chunk_size, cu_seqlens, lengths)
        o, *after = memory_of_piece(
            q, k, v, chunk_size, visible_chunks, state, cu_seqlens, lengths, inplace, pieces, self._group
        )  # fmt: skip
        return o[:, added:], *after

    def _behind(
        self, q: Tensor, k: Tensor, v: Tensor, kept: AttentionState | None, chunk_size: int,
        cu_seqlens: Tensor | None, lengths: Tensor | None,
    ) -> tuple[tuple[Tensor, Tensor, Tensor], int, tuple[Tensor | None, Tensor | None]]:  # fmt: skip
        """q, k, v behind the last chunk of the piece before, whose q is 0; how many steps that is; where sequences end.

        kept: what the state of the piece's sequences has kept of the steps before them.
        """
        pieces = self._pieces
        last = [_last_steps(pieces, x, kept, name, chunk_size) for name, x in (("k", k), ("v", v))]
        before = hand_on(torch.cat(last, -1), pieces.after, pieces.before, self._group)
        before = before if pieces.sources else before[:, :0]
        added, sizes = before.shape[1], [k.shape[-1], v.shape[-1]]
        k, v = (torch.cat(parts, 1) for parts in zip(before.split(sizes, -1), (k, v)))
        cu_seqlens = None if cu_seqlens is None else torch.cat([cu_seqlens[:1], cu_seqlens[1:] + added])
        lengths = None if lengths is None else lengths + added * (lengths > 0)
        return (F.pad(q, (0, 0, 0, 0, added, 0)), k, v), added, (cu_seqlens, lengths)

    def leave_block(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Forgets what the block needs no more."""
        self._pieces = self._start = self._memory = None


def _exchanged(pieces: Pieces, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The steps of a piece (B, L, D) whose end the ranks exchange, as arguments of an op."""
    if pieces.is_packed:
        return x[:, slice(*pieces.tail)], {}
    return x, {} if pieces.lengths is None else {"lengths": torch.tensor(pieces.lengths, device=x.device)}


def _last_steps(pieces: Pieces, x: Tensor, kept: AttentionState | None, name: str, chunk_size: int) -> Tensor:
    """(R, C, ...): the last chunk of the sequences that are open where the piece ends, of x, which `kept` has under a name.

    A chunk that began before the whole batch has its first steps in `kept`. Of sequences that end in the piece, of which no
    other piece reads, the steps are any.
    """
    begin, end = pieces.tail or (0, x.shape[1])
    own = x[:, max(begin, end - chunk_size) : end]
    missing = chunk_size - own.shape[1]
    if kept is None or not missing:
        return F.pad(own, (0, 0, 0, 0, missing, 0))
    cache, count = getattr(kept, name), kept.position
    if pieces.is_packed:
        cache, count = cache[-1:], count[-1:]
    rows = (count[:, None] + torch.arange(-missing, 0, device=count.device)).clamp(min=0)
    return torch.cat([cache[torch.arange(len(cache), device=count.device)[:, None], rows], own], 1)


def _of_open(pieces: Pieces, start: Tensor | None) -> Tensor | None:
    """The states (R, ...) before the sequences that are open where the piece begins, of those of all (S, ...)."""
    if start is None or not pieces.is_packed:
        return start
    return start[pieces.first : pieces.first + 1] if pieces.continues else start.new_zeros((1, *start.shape[1:]))


def _with_rest(pieces: Pieces, of_open: Tensor, start: Tensor | None) -> Tensor:
    """The states of the piece's sequences: of the one that was open before (1, ...), and of those that begin here."""
    if not pieces.is_packed:
        return of_open
    known = int(pieces.continues)
    begin = slice(pieces.first + known, pieces.first + pieces.count)
    shape = (pieces.count - known, *of_open.shape[1:])
    return torch.cat([of_open[:known], of_open.new_zeros(shape) if start is None else start[begin]])
