"""`History`: the last calls of a decoder, whose tokens can be taken back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils._pytree import tree_leaves

from ..model.config import MegalodonConfig
from ..model.model_state import MegalodonStateBase
from ..ops.common.checks import check_integer
from ..ops.linear_cross_entropy.linear_cross_entropy import has_integers

ReadTokens = Callable[..., MegalodonStateBase]
"""Function `read(tokens, state, lengths=...)` that returns the state after the tokens (B, L), or numbers (B, L, F).
It may overwrite `state`. `lengths` (B,) is given only if rows have different numbers of tokens."""


@dataclass
class _Call:
    """One call of the decoder: the tokens, and the state before them."""

    tokens: Tensor
    """(B, L), or numbers (B, L, F)"""
    lengths: Tensor
    """(B,), on the CPU: number of tokens of each row, 0 if they were taken back"""
    position: Tensor
    """(B,), on the CPU: number of positions in the attention's cache before the call"""
    small: list[Tensor]
    """tensors of :func:`_small_tensors` before the call, each list concatenated"""
    caches: list[list[Tensor]] | None
    """tensors of :func:`_cache` of each layer before the call; None: no row's cache becomes full in it"""


def check_history(history: History | None) -> History:
    if history is None:
        raise ValueError("Decoder: `undo` must be above 0 to take tokens back, got 0; make it by Decoder(..., undo=n).")
    return history


class History:
    """The last calls of a decoder, with at least `size` tokens of each row.

    The history keeps the small tensors of the state before each call. Keys and values stay in the decoder's cache.
    Only a call that fills a row's cache drops something, the cache's first chunk: for such a call the history keeps the
    cache before it, too. Tokens are taken back by restoring the state before their call. The call's other tokens are
    then pending: the next call reads them before its own.
    """

    def __init__(self, config: MegalodonConfig, state: MegalodonStateBase, size: int, most_tokens: int) -> None:
        """most_tokens: most tokens per row in a step."""
        self.size, self._config = size, config
        # Drafts of `size` tokens come in calls of size + 1, of which up to `size` are then pending. A step should take
        # the last size + 1 tokens of a call, which stay together; if it does, longer calls are split for it.
        self._longest = 2 * size + 1
        """largest number of tokens per row in a call, pending ones included"""
        if most_tokens > size:
            self._longest = min(self._longest, most_tokens)
        self._calls: list[_Call] = []
        self._pending: Tensor | None = None
        """(B, L) tokens or (B, L, F) numbers, right-padded"""
        self.forget(state)  # sets `_position`
        self._num_pending = torch.zeros_like(self._position)

    def run(self, tokens: Tensor, state: MegalodonStateBase, run: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the logits after `tokens`. run: returns the logits after its argument and updates `state`."""
        pending = [] if self._pending is None else [self._pending]
        num_pending = sum(tokens.shape[1] for tokens in pending)
        tokens = torch.cat([*pending, tokens], 1)  # a copy, as the caller may change `tokens` later
        logits = []
        if tokens.shape[1] > self._longest:
            first, tokens = tokens.split([tokens.shape[1] - self.size - 1, self.size + 1], 1)
            logits.append(run(first))
            self.forget(state)  # the other part alone has more than `size` tokens
        call = self._begin(state, tokens, torch.full_like(self._position, tokens.shape[1]))
        logits.append(run(tokens))
        self._end(call)
        return (torch.cat(logits, 1) if len(logits) > 1 else logits[0])[:, num_pending:]

    def read_pending(self, state: MegalodonStateBase, read: ReadTokens) -> None:
        """Read the pending tokens by a separate call, which updates `state`."""
        if self._pending is None:
            return
        call = self._begin(state, self._pending, self._num_pending)
        rows = self._num_pending.nonzero()[:, 0]  # the others have nothing to read
        lengths = self._num_pending[rows]
        index = rows.to(self._pending.device)
        options = {} if bool((lengths == lengths[0]).all()) else {"lengths": lengths.to(index.device)}
        after = read(self._pending[index], state[index], **options)
        for old, new in zip(tree_leaves(state), tree_leaves(after), strict=True):
            old[index] = new
        self._end(call)

    def _begin(self, state: MegalodonStateBase, tokens: Tensor, lengths: Tensor) -> _Call:
        """Return a call with `tokens`, which starts from `state`."""
        fills_cache = bool((self._position + lengths >= self._config.num_cached_positions).any())
        return _Call(
            tokens=tokens,
            lengths=lengths,
            position=self._position,
            small=[torch.cat(tensors) for tensors in _small_tensors(state)],
            caches=[[x.clone() for x in _cache(layer)] for layer in state.layers] if fills_cache else None,
        )

    def _end(self, call: _Call) -> None:
        """Add a call, which has read all pending tokens; drop calls that are too old.

        A call is too old if in each row the later calls have `size` tokens, or its own tokens were taken back.
        """
        cached, chunk = self._config.num_cached_positions, self._config.chunk_size
        position = call.position + call.lengths
        # A full cache drops its first chunk.
        self._position = position.where(position < cached, cached - chunk + (position - cached) % chunk)
        self._pending = None
        self._num_pending = torch.zeros_like(position)
        self._calls.append(call)
        total = sum(call.lengths for call in self._calls)
        while self._calls:
            oldest = self._calls[0].lengths
            if not bool(((total - oldest >= self.size) | (oldest == 0)).all()):
                break
            total = total - oldest
            self._calls.pop(0)

    def forget(self, state: MegalodonStateBase, rows: Tensor | slice = slice(None)) -> None:
        """Forget the tokens of `rows` so far: their sequences were replaced, or later tokens suffice. `state`: that of now."""
        for call in self._calls:
            call.lengths = call.lengths.clone()  # a copy of the history may share it
            call.lengths[rows] = 0
        self._position = state.layers[0].attention.position.to("cpu", copy=True)

    def copy(self) -> History:
        """Return a history that takes tokens back from a copy of the state."""
        other = copy.copy(self)
        other._calls = [replace(call) for call in self._calls]
        return other

    def take_back(self, state: MegalodonStateBase, counts: Tensor, read: ReadTokens) -> None:
        """Restore, in place, the state before the calls with the last `counts` (B,) tokens of each row.

        The other tokens of these calls are then pending or, if their number differs between rows, read at once.
        """
        if not bool(counts.any()):
            return
        # The first `num_pending` tokens of a row of `sources` stay. Pending tokens are taken back first, then those of
        # calls, the last call first. If nothing is pending, `sources` only has a place for each row.
        sources = list(self._calls[-1].tokens if self._pending is None else self._pending)
        num_pending = (self._num_pending - counts).clamp(min=0)
        remaining = (counts - self._num_pending).clamp(min=0)
        for call in reversed(self._calls):
            taken = torch.minimum(remaining, call.lengths)
            if bool((taken > 0).any()):
                for row in self._restore(state, call, taken > 0):
                    sources[row] = call.tokens[row]
                    num_pending[row] = call.lengths[row] - taken[row]
                call.lengths = call.lengths.where(taken == 0, 0)
                remaining = remaining - taken
        self._calls = [call for call in self._calls if bool(call.lengths.any())]
        kept = [tokens[:count] for tokens, count in zip(sources, num_pending.tolist(), strict=True)]
        self._pending = pad_sequence(kept, batch_first=True) if bool(num_pending.any()) else None
        self._num_pending = num_pending
        if bool((num_pending != num_pending[0]).any()):
            self.read_pending(state, read)

    def check_counts(self, counts: int | Tensor) -> Tensor:
        """Check the numbers of tokens to take back; return them as (B,) on the CPU."""
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
                f"Decoder: `counts` must be from 0 to {most.tolist()}, the tokens to take back, got {counts.tolist()}."
            )
        return counts

    def _restore(self, state: MegalodonStateBase, call: _Call, changes: Tensor) -> list[int]:
        """Restore the state before a call in the rows where `changes` (B,) is True, and return these rows."""
        was_full = changes & (call.position + call.lengths >= self._config.num_cached_positions)
        index = _row_index(changes, state)
        for tensors, before in zip(_small_tensors(state), call.small, strict=True):
            for tensor, old in zip(tensors, before.chunk(len(tensors)), strict=True):
                tensor[index] = old[index]
        if bool(was_full.any()):
            index = _row_index(was_full, state)
            for layer, before in zip(state.layers, call.caches, strict=True):
                for tensor, old in zip(_cache(layer), before, strict=True):
                    tensor[index] = old[index]
        self._position = call.position.where(changes, self._position)
        return changes.nonzero()[:, 0].tolist()


def _row_index(is_selected: Tensor, state: MegalodonStateBase) -> Tensor | slice:
    """Return the index of the rows where `is_selected` (B,) is True; for all rows a slice, which copies faster."""
    return slice(None) if bool(is_selected.all()) else is_selected.nonzero()[:, 0].to(state.norm.count.device)


def _small_tensors(state: MegalodonStateBase) -> list[list[Tensor]]:
    """Return the state's tensors except those of :func:`_cache`, in lists of tensors of one shape."""
    norms = [*(layer.norm for layer in state.layers), state.norm]
    counts_and_statistics = [list(tensors) for tensors in zip(*norms, strict=True)]  # all counts, all means, ...
    cema = [layer.cema for layer in state.layers]
    positions = [layer.attention.position for layer in state.layers]
    inputs = [[tensor] for tensor in state.inputs]
    return [*counts_and_statistics, cema, positions, *inputs]


def _cache(layer: tuple) -> tuple[Tensor, ...]:
    """Return the tensors of a layer's state that change when a full cache drops a chunk: keys, values, the memory."""
    return layer.attention.k, layer.attention.v, *layer[3:]
