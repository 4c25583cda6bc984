"""Drafts for `generate`: guesses of next tokens. The model reads them in one call and keeps those before an error."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .decoder import Decoder
from ..model.model_state import MegalodonStateBase
from ..ops.common.checks import describe

_LONGEST_MATCH, _SHORTEST_MATCH = 5, 2  # tokens of a text's end that must occur earlier
Choose = Callable[[int, Tensor], Tensor]
"""Function (i, logits (rows, tokens)) -> (rows,): chooses the i-th next token as `generate` chooses the model's"""


class ModelDraft:
    """Guesses by a smaller model."""

    def __init__(self, model: nn.Module, state: MegalodonStateBase, last: Tensor, size: int) -> None:
        """Args:
        state: state after the prompts without their last tokens.
        last: (rows,) these last tokens.
        size: largest number of guesses at a time.
        """
        self._decoder = Decoder(model, state, undo=size)
        self._unread = last[:, None]
        self._num_read = 0  # guesses that the decoder has read

    def guess(self, count: int, choose: Choose) -> Tensor:
        """Return guesses (rows, count) of the next tokens."""
        tokens = [self._unread]
        for i in range(count):
            tokens.append(choose(i, self._decoder(tokens[-1])[:, -1])[:, None])
        self._num_read = self._unread.shape[1] + count - 1
        return torch.cat(tokens[1:], 1)

    def accept(self, tokens: Tensor) -> None:
        """Continue after the `tokens` (rows, k) that the model has chosen: the right guesses and one more token."""
        tokens = torch.cat([self._unread, tokens], 1)
        num_right = min(self._num_read, tokens.shape[1] - 1)
        self._decoder.undo(self._num_read - num_right)
        self._unread, self._num_read = tokens[:, num_right:], 0


class PromptDraft:
    """Guesses that repeat a row's text: the tokens that followed an earlier occurrence of its last tokens."""

    def __init__(self, texts: list[Tensor]) -> None:
        self._texts = texts

    def guess(self, count: int, choose: Choose) -> Tensor:
        """Return guesses (rows, n <= count); n is 0 if the last tokens of a row do not occur earlier."""
        guesses = [_continuation(text, count) for text in self._texts]
        shortest = min(map(len, guesses))
        return torch.stack([guess[:shortest] for guess in guesses])

    def accept(self, tokens: Tensor) -> None:
        self._texts = [torch.cat(pair) for pair in zip(self._texts, tokens, strict=True)]


def _continuation(text: Tensor, count: int) -> Tensor:
    """Return up to `count` tokens after the longest match of the end of a text (n,), the last one among equals."""
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
        raise ValueError(f"generate: `draft` must read and predict {sizes[0][1:]} tokens, got {sizes[1][1:]}.")
