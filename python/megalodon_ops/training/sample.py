"""A fixed sample of held-out text, which tells in a second or two how well a model predicts all of it."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..model.model import Megalodon
from ..tokenizers import Tokenizer

UNCOUNTED = -100
"""The target of what a model reads and is not asked for"""
CALL = 1 << 14
"""Tokens that one call of the model reads at most, padding among them"""
LEAST = 64
"""Bytes of its document that a model reads before a stretch, where there are as many"""
WORD = 32
"""Bytes after a stretch that go to the tokenizer, so that the stretch does not end inside a word of its own making"""


class Stretch(NamedTuple):
    tokens: Tensor
    """(n,) int64, first the id that opens a document"""
    targets: Tensor
    """(n,) int64, the token after each, or UNCOUNTED"""
    num_bytes: float
    """bytes of text that the targets stand for"""


class HeldOutSample:
    """Stretches of documents, at equal distances through all of them laid end to end.

    A model reads a stretch from the beginning of the chunk in which it lies, so that attention sees what it would see if
    the document were read from its beginning, and at least LEAST bytes; the losses of the tokens that begin in the stretch
    count. So every byte of the documents is as likely to count as any other; beginnings of documents alone would be an
    easier text. Of no more than `num_bytes` bytes of text, all count.

    chunk: bytes of text in a chunk of the model. num_bytes: how many bytes count, about. stretch: bytes in a stretch.
    """

    def __init__(
        self,
        documents: Sequence[bytes],
        tokenizer: Tokenizer,
        chunk: int,
        *,
        num_bytes: int = 1 << 17,
        stretch: int = 128,
    ):
        parts = _parts(documents, num_bytes, stretch)
        found = (_stretch(text, start, stop, chunk, tokenizer) for text, start, stop in parts)
        self.stretches = sorted((part for part in found if len(part.tokens)), key=lambda part: -len(part.tokens))

    @torch.no_grad()
    def nats_and_bytes(self, model: Megalodon, part: int = 0, parts: int = 1) -> tuple[float, float]:
        """The losses of all that counts, in nats, and its bytes; or those of one of several equal parts.

        The model computes in evaluation mode, in its own dtype or that of an autocast around the call.

        Raises FloatingPointError where a loss is infinite or NaN.
        """
        own = self.stretches[part::parts]
        device, training = next(model.parameters()).device, model.training
        model.eval()
        try:
            losses = [
                model.loss(tokens.to(device), targets.to(device), reduction="sum").item()
                for tokens, targets in _batches(own)
            ]
        finally:
            model.train(training)
        if not math.isfinite(nats := math.fsum(losses)):
            raise FloatingPointError(f"the loss of held-out text is {nats}")
        return nats, math.fsum(stretch.num_bytes for stretch in own)


def _parts(documents: Sequence[bytes], num_bytes: int, stretch: int) -> Iterator[tuple[bytes, int, int]]:
    """The text, the start and the end of every stretch; of one that runs into the next document, of each of its parts."""
    ends = list(accumulate(map(len, documents)))
    total = ends[-1] if ends else 0
    count = max(1, num_bytes // stretch)
    if total <= num_bytes:
        stretches = [(0, total)]
    else:  # in the middle of each of `count` equal shares of the text
        begins = ((2 * i + 1) * total // (2 * count) - stretch // 2 for i in range(count))
        stretches = [(max(0, begin), min(total, begin + stretch)) for begin in begins]
    for begin, end in stretches:
        number = bisect.bisect_right(ends, begin)
        while begin < end:
            first = ends[number] - len(documents[number])
            stop = min(end, ends[number])
            if begin < stop:
                yield documents[number], begin - first, stop - first
            begin, number = stop, number + 1


def _stretch(text: bytes, start: int, stop: int, chunk: int, tokenizer: Tokenizer) -> Stretch:
    first = max(0, start - LEAST) // chunk * chunk
    read = text[first : stop + WORD]
    ids = torch.from_numpy(tokenizer.encode(read)).long()
    sizes = torch.tensor([len(part) for part in tokenizer.text_of(ids.tolist())], dtype=torch.float64)
    sizes *= len(read) / max(1, sizes.sum().item())  # a tokenizer may drop something
    begins = first + sizes.cumsum(0) - sizes
    counts = (begins >= start) & (begins < stop)
    end = int(counts.nonzero().max()) + 1 if bool(counts.any()) else 0
    tokens = torch.cat([torch.tensor([tokenizer.start]), ids[: max(0, end - 1)]])[:end]
    return Stretch(tokens, ids[:end].masked_fill(~counts[:end], UNCOUNTED), sizes[counts].sum().item())


def _batches(stretches: Sequence[Stretch]) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens and targets (B, L), padded to the first of each batch, which is the longest."""
    while stretches:
        rows = max(1, CALL // len(stretches[0].tokens))
        batch, stretches = stretches[:rows], stretches[rows:]
        yield (
            pad_sequence([stretch.tokens for stretch in batch], batch_first=True),
            pad_sequence([stretch.targets for stretch in batch], batch_first=True, padding_value=UNCOUNTED),
        )
