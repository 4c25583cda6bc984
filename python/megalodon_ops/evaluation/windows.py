"""Documents, the windows that they are cut into, and the segments of windows that one call of the model reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.linear_cross_entropy.linear_cross_entropy import has_integers
from ..ops.common.checks import check_integer, described, is_whole


class Document(NamedTuple):
    """A document to predict.

    Example:
        >>> from megalodon_ops.evaluation import Document
        >>> text = b"abc"
        >>> Document([256, *text], len(text))
        Document(tokens=[256, 97, 98, 99], num_bytes=3)
    """

    tokens: Any
    """integers: a 1-D tensor, array or list, or an iterable of such pieces; the first token opens the document. The
    token that ends a document counts where it is given as the last one, and is no part of the text"""
    num_bytes: int | None = None
    """bytes of the text that the tokens after the first stand for, where bits per byte are wanted"""


class Segment(NamedTuple):
    """What one call of the model reads of one window."""

    inputs: Tensor  # (n,) int64
    targets: Tensor  # (n,) int64, the token after each input
    start: int  # how many inputs of its window earlier segments hold
    ends: bool  # whether it is the last of its window
    ends_document: bool


def segments_of(documents: Iterator[Iterator[Tensor]], context: int, piece: int) -> Iterator[list[Segment]]:
    """The segments of documents, one document after another, in lists of what one call of the model reads.

    A list is of `piece` tokens where there are as many. No window that one call can hold is cut; only the segments at
    both ends of a list can be parts of windows. Documents are taken from their iterator, which others may share, when
    their turn comes.
    """
    segments: list[Segment] = []
    room = piece
    for pieces in documents:
        ahead, position = _read(torch.empty(0, dtype=torch.int64, device="cpu"), pieces, 2), 0
        while len(ahead) > 1:
            if position == 0 and room < context <= piece:
                yield segments
                segments, room = [], piece
            size = min(room, context - position)
            ahead = _read(ahead, pieces, size + 2)  # enough to know whether a token is left to predict
            inputs, targets = ahead[:-1][:size], ahead[1:][:size]
            ahead = ahead[len(inputs) :]
            ends_document = len(ahead) < 2
            ends = ends_document or position + size == context
            segments.append(Segment(inputs, targets, position, ends, ends_document))
            position = 0 if ends else position + size
            room -= len(inputs)
            if room == 0:
                yield segments
                segments, room = [], piece
    if segments:
        yield segments


def _read(ahead: Tensor, pieces: Iterator[Tensor], count: int) -> Tensor:
    """The tokens ahead and those that follow, until there are `count`, or the rest of the document."""
    parts, held = [ahead], len(ahead)
    while held < count and (piece := next(pieces, None)) is not None:
        parts.append(piece)
        held += len(piece)
    return torch.cat(parts) if len(parts) > 1 else ahead


def opened(documents: Iterable[Any], count_bytes: Callable[[int | None], object]) -> Iterator[Iterator[Tensor]]:
    """The pieces of each document; `count_bytes` is told its bytes when its turn comes."""
    for document in documents:
        tokens, size = document if isinstance(document, Document) else Document(document)
        if size is not None:
            size = check_integer("evaluate", "num_bytes", size, "an integer of at least 0", 0)
        count_bytes(size)
        yield _pieces(tokens)


def _pieces(tokens: Any) -> Iterator[Tensor]:
    """Tokens in one piece or many, as (n,) int64 on the CPU."""
    is_array = hasattr(tokens, "__array__")  # tensors have it too
    if isinstance(tokens, (str, bytes)) or not (is_array or isinstance(tokens, Iterable)):
        raise TypeError(f"evaluate: `tokens` must be integers, got {described(tokens)}; encode text by a tokenizer.")
    if is_array or (isinstance(tokens, Sequence) and all(is_whole(token, 0) for token in tokens[:1])):
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
