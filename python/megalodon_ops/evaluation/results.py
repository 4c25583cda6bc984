"""Figures of an evaluation, and the sums behind them."""

import dataclasses
import math
import sys
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .windows import Segment

_BIN_ENDS = torch.tensor(sorted({int(2 ** (i / 4)) for i in range(62 * 4 + 1)}), device="cpu")
"""Longest context of each bin: 1, 2, 3, 4, 5, 6, 8, 9, 11, 13, 16, ...; every power of 2 ends a bin"""

Context = int | Literal["all"]


class PositionBin(NamedTuple):
    """Predictions from a context of `first` to `last` tokens."""

    first: int
    last: int
    tokens: int
    """number of predictions"""
    nats: float
    """the sum of their losses"""


@dataclass(frozen=True)
class Evaluation:
    """Losses for one context length."""

    context: Context
    nats: float
    """the sum of the losses of all tokens"""
    tokens: int
    """number of predicted tokens"""
    num_bytes: int | None
    """bytes of the text; None if a document has no `num_bytes`"""
    by_position: tuple[PositionBin, ...]
    """losses by the number of tokens before the prediction, in bins of a quarter octave"""

    @property
    def perplexity(self) -> float:
        """Perplexity per token; infinity on overflow."""
        return _exp(self.nats / self.tokens)

    @property
    def bits_per_byte(self) -> float | None:
        """Bits per byte, which compare models across tokenizers."""
        return self.nats / math.log(2) / self.num_bytes if self.num_bytes else None

    @property
    def perplexity_per_byte(self) -> float | None:
        return _exp(self.nats / self.num_bytes) if self.num_bytes else None

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as JSON values; an infinite perplexity becomes None."""
        figures = {name: getattr(self, name) for name in ("perplexity", "bits_per_byte", "perplexity_per_byte")}
        figures = {name: None if value is None or math.isinf(value) else value for name, value in figures.items()}
        return {**dataclasses.asdict(self), **figures, "by_position": [bin._asdict() for bin in self.by_position]}


class Tally:
    """Sums of losses, in float64."""

    def __init__(self) -> None:
        self.num_bytes: int | None = 0
        self.nats = torch.zeros(len(_BIN_ENDS), dtype=torch.float64, device="cpu")
        self.tokens = torch.zeros(len(_BIN_ENDS), dtype=torch.int64, device="cpu")
        self.longest = 0  # most tokens before a prediction

    def add_bytes(self, count: int | None) -> None:
        self.num_bytes = None if count is None or self.num_bytes is None else self.num_bytes + count

    def add(self, segments: list[Segment], losses: Tensor) -> None:
        losses = losses.double().cpu()
        if not math.isfinite(total := losses.sum().item()):
            raise FloatingPointError(f"the loss is {total}; the model's weights are too large, or damaged")
        spans = [(s.start + 1, s.start + len(s.inputs) + 1) for s in segments]
        contexts = torch.cat([torch.arange(*span, device="cpu") for span in spans])
        bins = torch.bucketize(contexts, _BIN_ENDS)
        self.nats += torch.bincount(bins, losses, minlength=len(_BIN_ENDS))
        self.tokens += torch.bincount(bins, minlength=len(_BIN_ENDS))
        self.longest = max(self.longest, int(contexts.max()))

    def result(self, context: Context) -> Evaluation:
        bins = []
        for i in self.tokens.nonzero()[:, 0].tolist():
            first = int(_BIN_ENDS[i - 1]) + 1 if i else 1
            last = min(int(_BIN_ENDS[i]), self.longest)
            bins.append(PositionBin(first, last, int(self.tokens[i]), self.nats[i].item()))
        nats = math.fsum(bin.nats for bin in bins)
        return Evaluation(context, nats, sum(bin.tokens for bin in bins), self.num_bytes, tuple(bins))


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < math.log(sys.float_info.max) else math.inf
