"""Documents, the windows that they are cut into, and the segments of windows that one call of the model reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.loss import has_integers
from ..ops.values import check_integer, described, is_whole

ENDLESS = 2**62
"""More tokens than any window holds"""

# The released code's evaluation (its file megalodon/inference.py) reads CALL chunks a call. From RECALL chunks on it
# computes, after each call, the statistics of all timestep norms anew, from the last KEPT chunks alone.
CALL, RECALL = 2, 8
KEPT = RECALL - CALL


class Document(NamedTuple):
    """A document to predict.

    Example:
        >>> from megalodon_ops.evaluation import Document
        >>> text = b"abc"
        >>> Document([256, *text], len(text))
        Document(tokens=[256, 97, 98, 99], num_bytes=3)
    """

    tokens: Any
    """integers: a 1-D tensor, array or list, or an iterable of such pieces; the first token opens the document"""
    num_bytes: int | None = None
    """bytes of the text that the tokens after the first stand for, where bits per byte are wanted"""


class Segment(NamedTuple):
    """What one call of the model reads of one window."""

    inputs: Tensor
    """(n,) int64"""
    targets: Tensor
    """(n,) int64, the token after each input"""
    start: int
    """how many inputs of its window earlier segments hold"""
    ends: bool
    """whether it is the last of its window"""
    recall: Tensor | None
    """(KEPT * C,) the inputs before the segment that the norms' statistics must be of; None: those that they are of"""


class Lane:
    """Cuts documents, one after another, into windows and these into segments."""

    def __init__(self, queue: Iterator[Iterator[Tensor]], context: int, piece: int, recall_by: int | None):
        """`queue` gives the pieces of every document, to this lane or another; `recall_by` is the released code's C."""
        self.queue, self.context, self.piece, self.chunk = queue, context, piece, recall_by
        self.pieces: Iterator[Tensor] = iter(())  # of the document, those not read yet
        self.ahead = _no_tokens()  # read from the document, and inputs of no segment yet
        self.has_cut = False
        self._begin_window()

    def take(self) -> Iterator[Segment]:
        """The segments that the next call of the model reads: `piece` tokens, where there are as many.

        No window that one call can hold is cut; only the segments at both ends can be parts of windows.
        """
        room = self.piece
        while room and self._has_text():
            if self.position == 0 and room < self.context <= self.piece:
                return
            if self.position == self.recall_at and room < self.piece:  # the state before the segment must be known
                return
            segment = self._segment(room)
            room -= len(segment.inputs)
            yield segment

    def _segment(self, room: int) -> Segment:
        recall = None
        if self.position == self.recall_at:
            recall = self.past
            self.recall_at += self._call()
        size = min(room, self.context - self.position, self.recall_at - self.position)
        self._look(size + 2)
        size = min(size, len(self.ahead) - 1)
        inputs, targets, start = self.ahead[:size], self.ahead[1 : size + 1], self.position
        self.ahead, self.position = self.ahead[size:], start + size
        if self.chunk:
            self.past = torch.cat([self.past, inputs])[-KEPT * self.chunk :]
        document_ends = len(self.ahead) < 2
        ends = document_ends or self.position == self.context
        self.has_cut |= ends and not document_ends
        if ends:
            self._begin_window()
        return Segment(inputs, targets, start, ends, recall)

    def _begin_window(self) -> None:
        self.position = 0
        self.recall_at = RECALL * self.chunk if self.chunk else ENDLESS
        self.past = _no_tokens()

    def _call(self) -> int:
        """Tokens that the released code's next call reads: whole chunks, of which an odd one at the end is alone."""
        self._look(CALL * self.chunk + 1)
        left = min(len(self.ahead) - 1, self.context - self.position)
        return CALL * self.chunk if left >= CALL * self.chunk else self.chunk

    def _has_text(self) -> bool:
        """Whether there is a token to predict, in this document or else in the next that has one."""
        while self._look(2) < 2:
            pieces = next(self.queue, None)
            if pieces is None:
                return False
            self.pieces, self.ahead = pieces, self.ahead[:0]
        return True

    def _look(self, count: int) -> int:
        """Reads until `ahead` holds `count` tokens, or the rest of the document; how many it holds."""
        parts, held = [self.ahead], len(self.ahead)
        while held < count and (piece := next(self.pieces, None)) is not None:
            parts.append(piece)
            held += len(piece)
        if len(parts) > 1:
            self.ahead = torch.cat(parts)
        return held


def _no_tokens() -> Tensor:
    return torch.empty(0, dtype=torch.int64, device="cpu")


def opened(documents: Iterable[Any], count_bytes: Callable[[int | None], object]) -> Iterator[Iterator[Tensor]]:
    """The pieces of each document; `count_bytes` is told its bytes when its turn comes."""
    for document in documents:
        if not isinstance(document, Document):
            document = Document(document)
        size = document.num_bytes
        if size is not None:
            size = check_integer("evaluate", "num_bytes", size, "an integer of at least 0", 0)
        count_bytes(size)
        yield _pieces(document.tokens)


def _pieces(tokens: Any) -> Iterator[Tensor]:
    """Tokens in one piece or many, as (n,) int64 on the CPU."""
    if isinstance(tokens, (str, bytes)) or not (isinstance(tokens, Iterable) or hasattr(tokens, "__array__")):
        raise TypeError(f"evaluate: `tokens` must be integers, got {described(tokens)}; encode text by a tokenizer.")
    one = isinstance(tokens, Tensor) or hasattr(tokens, "__array__")
    if one or (isinstance(tokens, Sequence) and all(is_whole(token, 0) for token in tokens[:1])):
        tokens = [tokens]
    for piece in tokens:
        try:
            tensor = piece if isinstance(piece, Tensor) else torch.tensor(piece)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"evaluate: `tokens` must be integers, got {described(piece)}.") from None
        if tensor.dim() != 1 or not (has_integers(tensor) or not len(tensor)):
            raise ValueError(
                f"evaluate: `tokens` must be integers (n,) or pieces of them, got {tensor.dtype} {tuple(tensor.shape)}."
            )
        tensor = tensor.to("cpu", torch.int64)
        if len(tensor) and (least := int(tensor.min())) < 0:  # as a target, -100 would be left out
            raise IndexError(f"evaluate: `tokens` must be at least 0, got {least}.")
        yield tensor
