"""Documents, their windows, and the segments of windows that one call of the model reads."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.linear_cross_entropy.linear_cross_entropy import has_integers
from ..ops.common.checks import check_integer, describe, is_integer_between


class Document(NamedTuple):
    """A document to predict.

    Example:
        >>> from megalodon_ops.evaluation import Document
        >>> text = b"abc"
        >>> Document([256, *text], len(text))
        Document(tokens=[256, 97, 98, 99], num_bytes=3)
    """

    tokens: Any
    """integers: a 1-D tensor, array or list, or an iterable of such pieces. The start token comes first. An end token may
    come last; it is predicted, too, but is not part of the text"""
    num_bytes: int | None = None
    """number of bytes of the text; needed for bits per byte"""


class Segment(NamedTuple):
    """The part of a window that one call of the model reads."""

    inputs: Tensor  # (n,) int64
    targets: Tensor  # (n,) int64, the token after each input
    start: int  # number of the window's inputs in earlier segments
    ends_window: bool
    ends_document: bool


def segments_of(documents: Iterator[Iterator[Tensor]], context: int, piece: int) -> Iterator[list[Segment]]:
    """Yield the segments of consecutive documents, in a list for each call of the model.

    A list has `piece` tokens if so many are left. A window that fits one call is not cut; only the first and the last
    segment of a list can be parts of windows. Documents are taken lazily from their iterator, which may be shared.
    """
    segments: list[Segment] = []
    room = piece
    for pieces in documents:
        ahead = _read(torch.empty(0, dtype=torch.int64, device="cpu"), pieces, 2)
        position = 0  # in the window
        while len(ahead) > 1:
            if position == 0 and room < context <= piece:
                yield segments
                segments, room = [], piece
            size = min(room, context - position)
            ahead = _read(ahead, pieces, size + 2)  # one more, to know if this is the end
            inputs, targets = ahead[:-1][:size], ahead[1:][:size]
            ahead = ahead[len(inputs) :]
            ends_document = len(ahead) < 2
            ends_window = ends_document or position + size == context
            segments.append(Segment(inputs, targets, position, ends_window, ends_document))
            position = 0 if ends_window else position + size
            room -= len(inputs)
            if room == 0:
                yield segments
                segments, room = [], piece
    if segments:
        yield segments


def _read(ahead: Tensor, pieces: Iterator[Tensor], count: int) -> Tensor:
    """Extend `ahead` to `count` tokens, or to the end of the document."""
    parts, num_tokens = [ahead], len(ahead)
    while num_tokens < count and (piece := next(pieces, None)) is not None:
        parts.append(piece)
        num_tokens += len(piece)
    return torch.cat(parts) if len(parts) > 1 else ahead


def open_documents(documents: Iterable[Any], count_bytes: Callable[[int | None], object]) -> Iterator[Iterator[Tensor]]:
    """Yield each document as an iterator of pieces, and call `count_bytes` with its number of bytes."""
    for document in documents:
        tokens, size = document if isinstance(document, Document) else Document(document)
        if size is not None:
            size = check_integer("evaluate", "num_bytes", size, "an integer of at least 0", 0)
        count_bytes(size)
        yield _pieces(tokens)


def _pieces(tokens: Any) -> Iterator[Tensor]:
    """Yield tokens, given in one or many pieces, as (n,) int64 on the CPU."""
    is_array = hasattr(tokens, "__array__")  # tensors have it too
    if isinstance(tokens, (str, bytes)) or not (is_array or isinstance(tokens, Iterable)):
        raise TypeError(f"evaluate: `tokens` must be integers, got {describe(tokens)}; encode text with a tokenizer.")
    if is_array or (isinstance(tokens, Sequence) and all(is_integer_between(token, 0) for token in tokens[:1])):
        tokens = [tokens]
    for piece in tokens:
        try:
            tensor = piece if isinstance(piece, Tensor) else torch.tensor(piece)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"evaluate: `tokens` must be integers, got {describe(piece)}.") from None
        if tensor.dim() != 1 or not (has_integers(tensor) or not len(tensor)):
            raise ValueError(
                f"evaluate: `tokens` must be integers (n,) or pieces of them, got {tensor.dtype} {tuple(tensor.shape)}."
            )
        tensor = tensor.to("cpu", torch.int64)
        if len(tensor) and (least := int(tensor.min())) < 0:  # -100 would be ignored as a target
            raise IndexError(f"evaluate: `tokens` must be at least 0, got {least}.")
        yield tensor
