"""Chunk parallel: each rank of a group holds a piece of the sequence, and states cross ranks inside of every block.

A block is not changed: hooks of torch give `timestep_norm` and `cema` the states that their piece begins with. Before
an op's own pass, each rank makes the state that its piece ends with when begun from nothing, sends it to all, and merges
what the pieces before its own have sent (merge.py). No rank waits for another one's pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..model.blocks import BlockState, NormalizedAttention
from ..model.layers import ComplexEMA, TimestepNorm
from ..ops.cema import cema_end_state
from ..ops.library import accumulation_dtype
from ..ops.states import TimestepNormState
from ..ops.timestep_norm import timestep_norm_end_state
from .exchange import Arriving, send_to_all
from .merge import merged_cema, merged_norm, norm_in_float64
from .pieces import Pieces
from .vote import Members


class Hooks:
    """The hooks in a model's blocks and on its final norm.

    A call's `pieces` travel as an argument of the blocks, so that a block which is computed once more in the backward
    finds those of its own call. A block that is called without them computes as ever.
    """

    def __init__(self, model: nn.Module, members: Members) -> None:
        self._members = members
        self._pieces: Pieces | None = None
        self._start: BlockState | None = None
        self._arriving: tuple[Tensor, Arriving] | None = None  # the poles, and the ends of cema
        for block in model.layers:
            half: NormalizedAttention = block.mega
            half.register_forward_pre_hook(self.enter_block, with_kwargs=True)
            half.timenorm.register_forward_pre_hook(self.before_norm, with_kwargs=True)
            half.timenorm.register_forward_hook(_After(self, half.cema))
            half.cema.register_forward_pre_hook(self.before_cema, with_kwargs=True)
        model.output.final_norm.register_forward_pre_hook(self.before_final_norm, with_kwargs=True)

    @staticmethod
    def owns(hooks: Hooks | None, hook: Any) -> bool:
        """Whether `hook`, of a module, is one of these hooks."""
        return hooks is not None and hooks in (getattr(hook, "__self__", None), getattr(hook, "hooks", None))

    def forget(self) -> None:
        """Drops what the block that runs now has begun."""
        self._pieces = self._start = self._arriving = None

    def enter_block(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Takes the pieces, and the states of all whole sequences; the block keeps the attention's, for this piece."""
        kwargs = dict(kwargs)
        self._pieces, self._start = kwargs.pop("pieces", None), None
        if self._pieces is not None and kwargs.get("state") is not None:
            self._start = kwargs["state"]
            kwargs["state"] = None if self._start.attention is None else self._start
        return args, kwargs

    def before_norm(self, module: TimestepNorm, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        """Gives the norm of a block the state that its piece begins with."""
        if self._pieces is None:
            return None
        start = None if self._start is None else self._start.norm
        return args, kwargs | {"state": self._norm_before(self._pieces, module, args[0], start)}

    def before_final_norm(self, module: TimestepNorm, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        """Gives the final norm the state that its piece begins with."""
        if (pieces := kwargs.get("pieces")) is None:
            return None
        kwargs = {name: value for name, value in kwargs.items() if name != "pieces"}
        return args, kwargs | {"state": self._norm_before(pieces, module, args[0], kwargs["state"])}

    def after_norm(self, layer: ComplexEMA, t: Tensor) -> None:
        """Sends off the end of `cema` over the norm's output."""
        if self._pieces is not None:
            p, q, _, _ = layer.coefficients()
            t, options = _exchanged(self._pieces, t)
            ends = cema_end_state(t, p, q, **options)
            start = None if self._start is None else torch.view_as_real(self._start.cema)
            self._arriving = q, send_to_all(torch.view_as_real(ends), start, self._members)

    def before_cema(self, module: ComplexEMA, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        """Waits for what `after_norm` has sent, and gives `cema` the state that its piece begins with."""
        pieces = self._pieces
        if pieces is None:
            return None
        q, arriving = self._arriving
        self.forget()  # the block needs them no more
        ends, start = arriving.wait()
        ends, start = torch.view_as_complex(ends), None if start is None else torch.view_as_complex(start)
        state = merged_cema(q, ends, pieces.sources, pieces.steps, _of_open(pieces, start))
        return args, kwargs | {"state": _with_rest(pieces, state, start)}

    def _norm_before(
        self, pieces: Pieces, module: TimestepNorm, x: Tensor, start: TimestepNormState | None
    ) -> TimestepNormState:
        real = accumulation_dtype(x.dtype)
        part, options = _exchanged(pieces, x)
        ends = timestep_norm_end_state(part, num_groups=module.num_groups, **options)
        given, count = (None, None) if start is None else (norm_in_float64(start), start.count)
        ends, given = send_to_all(norm_in_float64(ends), given, self._members).wait()
        open_count = _of_open(pieces, count)
        merged = merged_norm(ends, pieces.sources, pieces.steps, _of_open(pieces, given), open_count, dtype=real)
        if not pieces.is_packed:
            return merged
        rest = None if given is None else merged_norm(given[None], [], [], given, count, dtype=real)
        fields = zip(merged, rest or (None,) * len(merged))
        return TimestepNormState(*(_with_rest(pieces, field, others) for field, others in fields))


class _After:
    """The hook after a block's norm, which knows the block's CEMA."""

    def __init__(self, hooks: Hooks, layer: ComplexEMA) -> None:
        self.hooks, self._layer = hooks, layer

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.hooks.after_norm(self._layer, output[0] if isinstance(output, tuple) else output)


def _exchanged(pieces: Pieces, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The steps of a piece (B, L, D) whose end the ranks exchange, as arguments of an op."""
    if pieces.is_packed:
        return x[:, slice(*pieces.tail)], {}
    return x, {} if pieces.lengths is None else {"lengths": torch.tensor(pieces.lengths, device=x.device)}


def _of_open(pieces: Pieces, start: Tensor | None) -> Tensor | None:
    """The states (R, ...) before the sequences that are open at the beginning of the piece, of those of all (S, ...)."""
    if start is None or not pieces.is_packed:
        return start
    return start[pieces.first : pieces.first + 1] if pieces.continues else start.new_zeros((1, *start.shape[1:]))


def _with_rest(pieces: Pieces, of_open: Tensor, start: Tensor | None) -> Tensor:
    """The states of all sequences of the piece: of the one that was open before (1, ...), and of those that begin here."""
    if not pieces.is_packed:
        return of_open
    known = int(pieces.continues)
    begin = slice(pieces.first + known, pieces.first + pieces.count)
    shape = (pieces.count - known, *of_open.shape[1:])
    return torch.cat([of_open[:known], of_open.new_zeros(shape) if start is None else start[begin]])
