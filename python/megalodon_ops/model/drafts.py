"""Drafts for `generate`: guesses of the next tokens, which the model reads in one call and keeps up to the first wrong one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .decoder import Decoder
from .model_state import MegalodonState
from ..ops.common.checks import describe

_LONGEST_MATCH, _SHORTEST_MATCH = 5, 2
Choose = Callable[[int, Tensor], Tensor]
"""Function that chooses the i-th next token (rows,) from logits (rows, tokens), as the model's token is chosen"""


class ModelDraft:
    """Guesses of a smaller model."""

    def __init__(self, model: nn.Module, state: MegalodonState, last: Tensor, size: int) -> None:
        """state: after the prompts but for their `last` tokens (rows,). size: the most guesses at once."""
        self._decoder, self._unread, self._num_read = Decoder(model, state, undo=size), last[:, None], 0

    def guess(self, count: int, choose: Choose) -> Tensor:
        """Return guesses (rows, count) of the next tokens."""
        tokens = [self._unread]
        for i in range(count):
            tokens.append(choose(i, self._decoder(tokens[-1])[:, -1])[:, None])
        self._num_read = self._unread.shape[1] + count - 1
        return torch.cat(tokens[1:], 1)

    def accept(self, tokens: Tensor) -> None:
        """Go on after the `tokens` (rows, k) that the model has chosen: guesses that were right, and one more."""
        tokens = torch.cat([self._unread, tokens], 1)
        num_right = min(self._num_read, tokens.shape[1] - 1)
        self._decoder.undo(self._num_read - num_right)
        self._unread, self._num_read = tokens[:, num_right:], 0


class PromptDraft:
    """Guesses that repeat a row's text: the tokens after the last place that reads as its end does."""

    def __init__(self, texts: list[Tensor]) -> None:
        self._texts = texts

    def guess(self, count: int, choose: Choose) -> Tensor:
        """Return guesses (rows, n <= count), none if the end of a row is new."""
        guesses = [_continuation(text, count) for text in self._texts]
        shortest = min(map(len, guesses))
        return torch.stack([guess[:shortest] for guess in guesses])

    def accept(self, tokens: Tensor) -> None:
        self._texts = [torch.cat(pair) for pair in zip(self._texts, tokens, strict=True)]


def _continuation(text: Tensor, count: int) -> Tensor:
    """Return up to `count` tokens after the longest and last match of the end of a text (n,)."""
    windows = torch.nn.functional.pad(text, (_LONGEST_MATCH - 1, 0), value=-1).unfold(0, _LONGEST_MATCH, 1)
    lengths = (windows[:-1] == windows[-1]).flip(1).cumprod(1).sum(1)
    longest = int(lengths.max()) if len(lengths) else 0
    if longest < _SHORTEST_MATCH:
        return text[:0]
    after = int((lengths == longest).nonzero()[-1]) + 1
    return text[after : after + count]


def check_draft(model: nn.Module, draft: object) -> None:
    """Raise unless `draft` can guess tokens of the model."""
    if draft is None or (isinstance(draft, str) and draft == "prompt"):
        return
    if not hasattr(draft, "_reference"):
        raise TypeError(f'generate: `draft` must be a Megalodon, "prompt" or None, got {describe(draft)}.')
    sizes = [(m.config.num_features, m.config.vocab_size, m.config.num_outputs) for m in (model, draft)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"generate: `draft` must read and predict the model's {sizes[0][1:]} tokens, got one of {sizes[1][1:]}."
        )
