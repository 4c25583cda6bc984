"""Draws tokens from logits: which tokens may be drawn, and by which random numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.common.checks import LARGEST, LEAST_POSITIVE, check_integer, check_number, check_size
from ..ops.common.philox import philox

_FEW_TOKENS = 1024
_BITS = 52  # of a random number: the largest, 1 - 2^-52, times a total is below the total in every rounding
_AT_ONCE = 64  # random numbers of a row that are made in one go
_SEED = "an integer from 0 to 2^63 - 1, one for each row, or None"


@dataclass
class Sampling:
    """Which token follows, given logits; the names and meanings are those of transformers.

    In this order: the repetition penalty divides positive logits, and multiplies negative ones, of tokens that were there
    before (CTRL, arXiv 1909.05858); the temperature divides all; of the tokens, the top_k likeliest stay, of these the
    fewest that hold the share top_p, of these all at least min_p times as likely as the likeliest. A token as likely as
    the last that stays, stays too. Temperature 0 takes the likeliest token, which each of these leaves in.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def __post_init__(self) -> None:
        def check(field: str, expected: str, least: float, most: float = LARGEST) -> None:
            if (value := getattr(self, field)) is not None or field == "temperature":
                setattr(self, field, check_number("generate", field, value, expected, least, most))

        check("temperature", "a finite number of at least 0", 0.0)
        check("top_p", "a probability in (0, 1]", LEAST_POSITIVE, 1.0)
        check("min_p", "a probability in [0, 1]", 0.0, 1.0)
        check("repetition_penalty", "a positive finite number", LEAST_POSITIVE)
        if self.top_k is not None:
            self.top_k = check_size("generate", "top_k", self.top_k)

    @property
    def penalises(self) -> bool:
        """Whether it matters which tokens were there before."""
        return self.repetition_penalty not in (None, 1.0)

    def choose(self, logits: Tensor, numbers: Iterator[Tensor], seen: Tensor | None = None) -> Tensor:
        """One token (rows,) for each row of logits (rows, tokens).

        Args:
            numbers: gives random numbers (rows,) in [0, 1), float64.
            seen: (rows, tokens) bools, the tokens that the repetition penalty is for.
        """
        if self.penalises:
            penalised = torch.where(logits < 0, logits * self.repetition_penalty, logits / self.repetition_penalty)
            logits = torch.where(seen, penalised, logits)
        if self.temperature == 0:
            likeliest = logits.argmax(-1, keepdim=True)  # argmax takes a NaN, if there is one
            _check_numbers(~logits.gather(-1, likeliest).isnan())
            return likeliest.squeeze(-1)
        probability = (logits if self.temperature == 1 else logits / self.temperature).softmax(-1)
        _check_numbers(~probability[:, :1].isnan())  # one NaN makes a whole row NaN
        least = self._least_likely(probability)
        if least is not None:
            probability = torch.where(probability >= least, probability, 0)
        cumulative = _running_sums(probability)
        drawn = next(numbers)[:, None] * cumulative[:, -1:]
        return torch.searchsorted(cumulative, drawn, right=True).squeeze(-1)

    def _least_likely(self, probability: Tensor) -> Tensor | None:
        """The least probability (rows, 1) of a token that may be drawn, or None where every token may be.

        A threshold, unlike the first k of a sorted row, does not depend on the order of equal probabilities, which a
        row's neighbours could change.
        """
        least, top_k, total = None, self.top_k, 1.0
        sorts = self.top_p is not None and self.top_p < 1
        if top_k is not None and top_k < probability.shape[-1]:
            likeliest = probability.topk(top_k).values
            least = likeliest[:, -1:]
            if sorts:
                cumulative = _running_sums(likeliest)
                total = cumulative[:, -1:]
        elif sorts:
            likeliest, cumulative = _likeliest(probability, self.top_p)
        if sorts:
            inside = cumulative - likeliest < self.top_p * total
            least = likeliest.gather(-1, (inside.sum(-1, keepdim=True) - 1).clamp(min=0))
        if self.min_p:
            of_likeliest = self.min_p * probability.amax(-1, keepdim=True)
            least = of_likeliest if least is None else torch.maximum(least, of_likeliest)
        return least


def _likeliest(probability: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """The probabilities in descending order, as many as hold `share` of each row or more, and their running sums."""
    if probability.is_cpu:  # on the CPU, sorting a large vocabulary takes as long as all else for a token
        few = probability.topk(min(_FEW_TOKENS, probability.shape[-1])).values
        cumulative = _running_sums(few)
        if bool((cumulative[:, -1] >= share).all()):
            return few, cumulative
    every = probability.sort(descending=True).values
    return every, _running_sums(every)


def _running_sums(values: Tensor) -> Tensor:
    """Sums of each row's first values, float64. Torch has no deterministic ones on CUDA, and refuses where it shall have."""
    if values.is_cuda and torch.are_deterministic_algorithms_enabled():
        return values.cpu().cumsum(-1, dtype=torch.float64).to(values.device)
    return values.cumsum(-1, dtype=torch.float64)


def _check_numbers(holds: Tensor) -> None:
    """Raises where a condition does not hold on the CPU; on other devices the check would wait for the device."""
    if holds.is_cpu and not bool(holds.all()):
        raise FloatingPointError(
            "generate: logits / temperature must be numbers, got NaN or infinity; "
            "the weights are too large or damaged, or the temperature is too small."
        )


def check_seeds(seed: object, rows: int) -> list[int]:
    """The seed of each row; one seed s stands for s, s + 1, s + 2 and so on."""
    if not isinstance(seed, Sequence) or isinstance(seed, str):
        first = check_integer("generate", "seed", seed, _SEED, 0)
        return [(first + row) % 2**63 for row in range(rows)]
    if len(seed) != rows:
        raise ValueError(f"generate: `seed` must be {_SEED}, got {len(seed)} for {rows} rows.")
    return [check_integer("generate", "seed", one, _SEED, 0) for one in seed]


def numbers_of_seeds(seeds: list[int], positions: Tensor, device: torch.device) -> Iterator[Tensor]:
    """Random numbers (rows,) in [0, 1), float64, made by Philox of each row's seed and position, then of the next position."""
    key, position = torch.tensor(seeds)[:, None], positions.cpu()[:, None] + torch.arange(_AT_ONCE)
    while True:
        zero = torch.zeros_like(position)
        high, low, _, _ = philox((position & 0xFFFFFFFF, position >> 32, zero, zero), key)
        bits = high << (_BITS - 32) | low >> (64 - _BITS)
        yield from (bits.double() * 2.0**-_BITS).to(device).unbind(1)
        position = position + _AT_ONCE
