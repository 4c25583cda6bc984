"""`History`: the last calls of a decoder, from which it takes tokens back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils._pytree import tree_leaves

from .config import MegalodonConfig
from .model_state import MegalodonState
from ..ops.common.checks import check_integer
from ..ops.linear_cross_entropy.linear_cross_entropy import has_integers

ReadTokens = Callable[..., MegalodonState]
"""Function that returns the state after tokens (B, L) or numbers (B, L, F), from these, a state that it may overwrite
and, where rows have different numbers of tokens, their `lengths` (B,)"""


@dataclass
class _Call:
    """One call of the decoder: the tokens, and the state before them."""

    tokens: Tensor
    """(B, L), or numbers (B, L, F)"""
    lengths: Tensor
    """(B,) tokens of each row, 0 if they were taken back, on the CPU"""
    position: Tensor
    """(B,) positions in the attention's cache before the call, on the CPU"""
    small: list[Tensor]
    """tensors of :func:`_small_tensors`, those of all layers in one, before the call"""
    caches: list[list[Tensor]] | None
    """the attention's and the memory's tensors of each layer before the call; None: no chunk ends in it"""


def make_history(config: MegalodonConfig, state: MegalodonState, size: int, most_tokens: int) -> History | None:
    """Return the history of a decoder with undo=`size`, if that is above 0; `most_tokens`: of a row in a step."""
    if check_integer("Decoder", "undo", size, "an integer in [0, 2^31)", 0, 2**31 - 1) == 0:
        return None
    return History(config, state, size, most_tokens)


def check_history(history: History | None) -> History:
    if history is None:
        raise ValueError("Decoder: `undo` must be above 0 to take tokens back, got 0; make it by Decoder(..., undo=n).")
    return history


class History:
    """The last calls of a decoder, at least `size` tokens of each row.

    Each call has the small states before it. Keys and values stay in their cache; of a call in which a chunk ends, the
    cache before it is kept. Tokens are taken back by returning to the state before their call. The call's other tokens
    are pending then: the next call reads them in front of its own.
    """

    def __init__(self, config: MegalodonConfig, state: MegalodonState, size: int, most_tokens: int) -> None:
        self.size, self._config = size, config
        self._longest = min(2 * size + 1, most_tokens) if most_tokens > size else 2 * size + 1
        """the most tokens of a row in a call, pending ones included"""
        self._calls: list[_Call] = []
        self._pending: Tensor | None = None
        """(B, L) tokens or (B, L, F) numbers, right-padded"""
        self.forget(state)
        self._num_pending = torch.zeros_like(self._position)

    def run(self, tokens: Tensor, state: MegalodonState, run: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the logits after `tokens`; `run` returns those of its tokens and updates `state`."""
        num_pending = 0 if self._pending is None else self._pending.shape[1]
        # A copy, as the caller may change the tokens.
        tokens, logits = torch.cat([tokens] if self._pending is None else [self._pending, tokens], 1), []
        if tokens.shape[1] > self._longest:
            first, tokens = tokens.split([tokens.shape[1] - self.size - 1, self.size + 1], 1)
            logits = [run(first)]
            self.forget(state)
        call = self._begin(state, tokens, torch.full_like(self._position, tokens.shape[1]))
        logits.append(run(tokens))
        self._end(call)
        return (torch.cat(logits, 1) if len(logits) > 1 else logits[0])[:, num_pending:]

    def read_pending(self, state: MegalodonState, read: ReadTokens) -> None:
        """Read the pending tokens, by a call of their own, which updates `state`."""
        if self._pending is None:
            return
        call, rows = self._begin(state, self._pending, self._num_pending), self._num_pending.nonzero()[:, 0]
        lengths, at = self._num_pending[rows], rows.to(self._pending.device)
        options = {} if bool((lengths == lengths[0]).all()) else {"lengths": lengths.to(at.device)}
        after = read(self._pending[at], state[at], **options)
        for to, x in zip(tree_leaves(state), tree_leaves(after), strict=True):
            to[at] = x
        self._end(call)

    def _begin(self, state: MegalodonState, tokens: Tensor, lengths: Tensor) -> _Call:
        """Return a call with `tokens` from `state`."""
        ends_chunk = bool((self._position + lengths >= self._config.num_cached_positions).any())
        return _Call(
            tokens=tokens,
            lengths=lengths,
            position=self._position,
            small=[torch.cat(tensors) for tensors in _small_tensors(state)],
            caches=[[x.clone() for x in _cache(layer)] for layer in state.layers] if ends_chunk else None,
        )

    def _end(self, call: _Call) -> None:
        """Add a call, which has read what was pending; drop those that are too old."""
        limit, size = self._config.num_cached_positions, self._config.chunk_size
        position = call.position + call.lengths
        # A full cache drops a chunk.
        self._position = position.where(position < limit, limit - size + (position - limit) % size)
        self._pending, self._num_pending = None, torch.zeros_like(position)
        self._calls.append(call)
        later = sum(call.lengths for call in self._calls)
        while bool(((later - self._calls[0].lengths >= self.size) | (self._calls[0].lengths == 0)).all()):
            later = later - self._calls.pop(0).lengths

    def forget(self, state: MegalodonState, rows: Tensor | slice = slice(None)) -> None:
        """Forget the past of rows that other sequences have taken; `state` is the one after that."""
        for call in self._calls:
            call.lengths = call.lengths.clone()
            call.lengths[rows] = 0
        self._position = state.layers[0].attention.position.to("cpu", copy=True)

    def copy(self) -> History:
        """Return a history that takes tokens back from a copy of the state."""
        other = copy.copy(self)
        other._calls = [replace(call) for call in self._calls]
        return other

    def take_back(self, state: MegalodonState, counts: Tensor, read: ReadTokens) -> None:
        """Change the state, in place, to that before the calls of the last `counts` (B,) tokens of each row.

        The other tokens of these calls are pending afterwards or, where rows have different numbers of them, read.
        """
        if not bool(counts.any()):
            return
        sources = list(self._calls[-1].tokens if self._pending is None else self._pending)
        num_pending, left = (self._num_pending - counts).clamp(min=0), (counts - self._num_pending).clamp(min=0)
        for call in reversed(self._calls):
            taken = torch.minimum(left, call.lengths)
            if bool((taken > 0).any()):
                for row in self._restore(state, call, taken > 0):
                    sources[row], num_pending[row] = call.tokens[row], call.lengths[row] - taken[row]
                call.lengths, left = call.lengths.where(taken == 0, 0), left - taken
        self._calls = [call for call in self._calls if bool(call.lengths.any())]
        kept = [tokens[:count] for tokens, count in zip(sources, num_pending.tolist(), strict=True)]
        self._pending, self._num_pending = pad_sequence(kept, True) if bool(num_pending.any()) else None, num_pending
        if bool((num_pending != num_pending[0]).any()):
            self.read_pending(state, read)

    def check_counts(self, counts: int | Tensor) -> Tensor:
        """Return the numbers of tokens to take back as (B,) on the CPU."""
        if not isinstance(counts, Tensor):
            counts = torch.tensor(check_integer("Decoder", "counts", counts, "an integer of at least 0", 0))
        if counts.shape not in ((), self._position.shape) or not has_integers(counts):
            raise ValueError(
                f"Decoder: `counts` must be integers ({len(self._position)},), got {counts.dtype} {tuple(counts.shape)}."
            )
        most = sum((call.lengths for call in self._calls), self._num_pending).clamp(max=self.size)
        counts = counts.cpu().long().expand_as(most)
        if bool(((counts < 0) | (counts > most)).any()):
            raise ValueError(
                f"Decoder: `counts` must be from 0 to {most.tolist()}, the tokens that can be taken back, got "
                f"{counts.tolist()}."
            )
        return counts

    def _restore(self, state: MegalodonState, call: _Call, changes: Tensor) -> list[int]:
        """Restore the state before a call in the rows of which `changes` (B,) is True, and return these."""
        ended = changes & (call.position + call.lengths >= self._config.num_cached_positions)
        at = _places(changes, state)
        for tensors, before in zip(_small_tensors(state), call.small, strict=True):
            for x, y in zip(tensors, before.chunk(len(tensors)), strict=True):
                x[at] = y[at]
        if bool(ended.any()):
            at = _places(ended, state)
            for layer, before in zip(state.layers, call.caches, strict=True):
                for x, y in zip(_cache(layer), before, strict=True):
                    x[at] = y[at]
        self._position = call.position.where(changes, self._position)
        return changes.nonzero()[:, 0].tolist()


def _places(rows: Tensor, state: MegalodonState) -> Tensor | slice:
    """Return the index of rows (B,), bools on the CPU: a slice, which copies faster, for all of them."""
    return slice(None) if bool(rows.all()) else rows.nonzero()[:, 0].to(state.norm.count.device)


def _small_tensors(state: MegalodonState) -> list[list[Tensor]]:
    """Return the state's tensors apart from the caches, those of one shape together."""
    norms = [*(layer.norm for layer in state.layers), state.norm]
    layers = [[layer.cema for layer in state.layers], [layer.attention.position for layer in state.layers]]
    return [*map(list, zip(*norms, strict=True)), *layers, *([x] for x in state.inputs)]


def _cache(layer: tuple) -> tuple[Tensor, ...]:
    """Tensors of a layer's state that change where a chunk ends, apart from the position."""
    return layer.attention.k, layer.attention.v, *layer[3:]
