"""`History`: the last calls of a decoder, from which it takes tokens back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .model_state import MegalodonState
from .scale import standardize
from .sequences import Sequences
from ..ops.cema.cema import cema
from ..ops.common.checks import check_integer
from ..ops.common.states import TimestepNormState
from ..ops.linear_cross_entropy.linear_cross_entropy import has_integers
from ..ops.timestep_norm.timestep_norm import timestep_norm


@dataclass(frozen=True, eq=False)
class KeptSequences(Sequences):
    """Sequences of a call that keep the inputs of its recurrences, in the order of the layers."""

    norms: list[Tensor] = field(default_factory=list)
    """(B, L, D) of each timestep norm, the final one included"""
    averages: list[Tensor] = field(default_factory=list)
    """(B, L, D) of each CEMA"""

    def norm_state(self, norm: nn.Module, x: Tensor, given: TimestepNormState | None) -> TimestepNormState | None:
        if isinstance(norm, nn.Module):  # not the scale of numbers
            self.norms.append(x)
        return given

    def send_end(self, cema: nn.Module, t: Tensor, given: tuple) -> tuple:
        self.averages.append(t)
        return given


@dataclass
class _Call:
    """One call of the decoder: its past, and what it read."""

    kept: Tensor
    """(B,) tokens of each row that have not been taken back, on the CPU"""
    position: Tensor
    """(B,) positions in the attention's cache before the call, on the CPU"""
    norms: TimestepNormState
    """of the (layers + 1) B sequences of all timestep norms, before the call"""
    average: Tensor
    """(B, layers D, N) of all CEMA, before the call"""
    scale: TimestepNormState | tuple[()]
    caches: list[list[Tensor]] | None
    """the attention's and the memory's tensors of each layer before the call; None: no chunk ends in it"""
    tokens: Tensor
    """(B, L), or numbers (B, L, F)"""
    inputs: Sequence[Tensor] = ()
    """those of the norms and of CEMA, as :class:`KeptSequences` keeps them"""


def make_history(model: nn.Module, state: MegalodonState, size: int, changes: list[str]) -> History | None:
    """Return the history of a decoder with undo=`size`, if that is above 0; `changes`: names of the changed modules."""
    if check_integer("Decoder", "undo", size, "an integer in [0, 2^31)", 0, 2**31 - 1) == 0:
        return None
    names = [f"layers.{i}.mega.{name}." for i in range(model.config.num_layers) for name in ("timenorm", "cema")]
    names.append("output.final_norm.")
    for name in changes:
        if not name or any(recurrence.startswith(f"{name}.") for recurrence in names):
            raise NotImplementedError(
                f"Decoder: `undo` must be 0 where a recurrence was changed, got {size}; `{name or 'model'}` was wrapped, "
                "hooked or replaced."
            )
    return History(model, state, size)


def check_history(history: History | None) -> History:
    if history is None:
        raise ValueError("Decoder: `undo` must be above 0 to take tokens back, got 0; make it by Decoder(..., undo=n).")
    return history


class History:
    """The last calls of a decoder, at least `size` tokens of each row.

    Of a recurrence, the state before each call and the inputs are kept; the state between two tokens of a call is
    computed from them. Keys and values stay in their cache; of a call in which a chunk ends, the cache before it is kept.
    """

    def __init__(self, model: nn.Module, state: MegalodonState, size: int) -> None:
        self.size = size
        self._config, self._calls = model.config, []
        self.forget(state)
        coefficients = [layer.mega.cema.coefficients()[:2] for layer in model.layers]
        self._p, self._q = (torch.cat(tensors) for tensors in zip(*coefficients, strict=True))

    def run(
        self, tokens: Tensor, state: MegalodonState, run: Callable[[Tensor], Any], run_model: Callable[[Tensor], Any]
    ) -> Tensor:
        """Run the decoder's call with `tokens`, which updates `state`, and keep its last `size` + 1 tokens.

        `run` and `run_model` return logits and the tensors of :class:`KeptSequences`.
        """
        if (many := tokens.shape[1] - self.size - 1) > 0:
            logits, *_ = run_model(tokens[:, :many])
            self.forget(state)
            return torch.cat([logits, self.run(tokens[:, many:], state, run, run_model)], 1)
        # A token that ends a row's chunk begins a call, so the copy of the cache has all earlier rows of the chunk.
        before_end = self._config.num_cached_positions - 1 - self._position
        piece = min([tokens.shape[1], *(n or self._config.chunk_size for n in before_end.tolist())])
        if piece < tokens.shape[1]:
            parts = tokens[:, :piece], tokens[:, piece:]
            return torch.cat([self.run(part, state, run, run_model) for part in parts], 1)
        call = self._begin(state, tokens)
        logits, *call.inputs = run(tokens)
        self._end(call)
        return logits

    def _begin(self, state: MegalodonState, tokens: Tensor) -> _Call:
        """Return a call with `tokens`, (B, L) or numbers (B, L, F), from `state`."""
        norms = [*(layer.norm for layer in state.layers), state.norm]
        ends = self._position + tokens.shape[1]
        ends_chunk = bool((ends >= self._config.num_cached_positions).any())
        return _Call(
            kept=torch.full_like(ends, tokens.shape[1]),
            position=self._position,
            norms=TimestepNormState(*map(torch.cat, zip(*norms, strict=True))),
            average=torch.cat([layer.cema for layer in state.layers], 1),
            scale=TimestepNormState(*map(torch.clone, state.inputs)) if state.inputs else (),
            caches=[[x.clone() for x in _cache(layer)] for layer in state.layers] if ends_chunk else None,
            tokens=tokens,
        )

    def _end(self, call: _Call) -> None:
        """Add a call; drop those that are too old."""
        self._position = self._wrapped(call.position + call.kept)
        self._calls.append(call)
        later = sum(call.kept for call in self._calls)
        while bool(((later - self._calls[0].kept >= self.size) | (self._calls[0].kept == 0)).all()):
            later = later - self._calls.pop(0).kept

    def forget(self, state: MegalodonState, rows: Tensor | slice = slice(None)) -> None:
        """Forget the past of rows that other sequences have taken; `state` is the one after that."""
        for call in self._calls:
            call.kept = call.kept.clone()
            call.kept[rows] = 0
        self._position = state.layers[0].attention.position.to("cpu", copy=True)

    def copy(self) -> History:
        """Return a history that takes tokens back from a copy of the state."""
        other = copy.copy(self)
        other._calls = [replace(call) for call in self._calls]
        return other

    def take_back(self, state: MegalodonState, counts: int | Tensor) -> None:
        """Change the state, in place, to that before the last `counts` () or (B,) tokens of each row."""
        left, limit = self._check_counts(counts), self._config.num_cached_positions
        for call in reversed(self._calls):
            taken = torch.minimum(left, call.kept)
            end, left = call.position + call.kept, left - taken
            call.kept = call.kept - taken
            restored = (end >= limit) & (call.position + call.kept < limit)  # no longer end a chunk in this call
            if bool(restored.any()):
                at = _places(restored.nonzero()[:, 0], call)
                for layer, before in zip(state.layers, call.caches, strict=True):
                    for x, y in zip(_cache(layer), before, strict=True):
                        x[at] = y[at]
            rows = ((taken > 0) & (left == 0)).nonzero()[:, 0]
            if len(rows):
                self._restore_recurrences(state, call, rows)
        self._calls = [call for call in self._calls if bool(call.kept.any())]

    def _check_counts(self, counts: int | Tensor) -> Tensor:
        """Return the numbers of tokens to take back as (B,) on the CPU."""
        if not isinstance(counts, Tensor):
            counts = torch.tensor(check_integer("Decoder", "counts", counts, "an integer of at least 0", 0))
        if counts.shape not in ((), self._position.shape) or not has_integers(counts):
            raise ValueError(
                f"Decoder: `counts` must be integers ({len(self._position)},), got {counts.dtype} {tuple(counts.shape)}."
            )
        most = sum((call.kept for call in self._calls), torch.zeros_like(self._position)).clamp(max=self.size)
        counts = counts.cpu().long().expand_as(most)
        if bool(((counts < 0) | (counts > most)).any()):
            raise ValueError(
                f"Decoder: `counts` must be from 0 to {most.tolist()}, the tokens that can be taken back, got "
                f"{counts.tolist()}."
            )
        return counts

    def _wrapped(self, position: Tensor) -> Tensor:
        """Return positions in a cache that drops a chunk when it is full."""
        limit, size = self._config.num_cached_positions, self._config.chunk_size
        return position.where(position < limit, limit - size + (position - limit) % size)

    def _restore_recurrences(self, state: MegalodonState, call: _Call, rows: Tensor) -> None:
        """Compute the recurrences' states of some rows after the tokens of this call that they keep."""
        position = self._wrapped(call.position + call.kept)[rows]
        self._position = self._position.index_copy(0, rows, position)
        lengths, at = call.kept[rows].to(call.average.device), _places(rows, call)
        norms = TimestepNormState(*(x.unflatten(0, (-1, len(call.kept)))[:, at].flatten(0, 1) for x in call.norms))
        average, scale = call.average[at], TimestepNormState(*(x[at] for x in call.scale)) if call.scale else ()
        if bool(call.kept[rows].any()):
            norms, average, scale = self._recurrences(call, at, lengths, norms, average, scale)
        for layer, after in zip(state.layers, average.chunk(len(state.layers), 1), strict=True):
            layer.cema[at] = after
            layer.attention.position[at] = position.to(after.device)
        all_norms = [*(layer.norm for layer in state.layers), state.norm]
        for tensors, after in zip(zip(*all_norms, strict=True), norms, strict=True):
            for to, x in zip(tensors, after.unflatten(0, (-1, len(rows))), strict=True):
                to[at] = x
        for to, after in zip(state.inputs, scale, strict=True):
            to[at] = after

    def _recurrences(
        self,
        call: _Call,
        at: Tensor | slice,
        lengths: Tensor,
        norms: TimestepNormState,
        average: Tensor,
        scale: TimestepNormState | tuple[()],
    ) -> tuple[Any, Tensor, Any]:
        """Return the states of the norms, of CEMA and of the inputs' scale after the first `lengths` tokens of a call."""
        num_norms = len(call.norms.count) // len(call.kept)
        x = torch.stack(tuple(call.inputs[:num_norms]))[:, at]
        all_lengths, zeros = lengths.repeat(len(x)), call.norms.mean.new_zeros(x.shape[-1])
        options = dict(num_groups=self._config.norm_num_groups, state=norms, return_state=True, lengths=all_lengths)
        _, new_norms = timestep_norm(x.flatten(0, 1), zeros, zeros, **options)
        x = torch.cat(tuple(call.inputs[num_norms:]), 2)[at]
        options = dict(state=average, return_state=True, lengths=lengths)
        _, new_average = cema(x, self._p, self._q, self._q, self._p[:, 0], **options)
        new_scale = ()
        if scale:
            _, new_scale = standardize(call.tokens[at], self._config, scale, True, Sequences(lengths=lengths))
        return (
            _unless_empty(all_lengths, new_norms, norms),
            *_unless_empty(lengths, [new_average], [average]),
            _unless_empty(lengths, new_scale, scale),
        )


def _places(rows: Tensor, call: _Call) -> Tensor | slice:
    """Return the index of rows in tensors: a slice, which copies faster, for all of them."""
    return slice(None) if len(rows) == len(call.kept) else rows.to(call.average.device)


def _unless_empty(lengths: Tensor, after: Iterable[Tensor], before: Iterable[Tensor]) -> list[Tensor]:
    """Return the states after sequences of these lengths, `before` for empty ones, which an op may round."""
    return [x.where(lengths.view(-1, *(1,) * (x.dim() - 1)) > 0, y) for x, y in zip(after, before, strict=True)]


def _cache(layer: tuple) -> tuple[Tensor, ...]:
    """Tensors of a layer's state that change where a chunk ends, apart from the position."""
    return layer.attention.k, layer.attention.v, *layer[3:]
