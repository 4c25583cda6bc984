"""Sampling: filters of logits, and reproducible random numbers that draw tokens."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.common.checks import MAX_FLOAT, MIN_POSITIVE, check_integer, check_number, check_size
from ..ops.common.philox import philox

_FEW_TOKENS = 1024
_BITS = 52  # of a random number: the largest number, 1 - 2^-52, times a total always rounds below the total
_BLOCK = 64  # random numbers computed at a time for a row
_SEED = "an integer from 0 to 2^63 - 1, one for each row, or None"


@dataclass(frozen=True, eq=False)
class Sampling:
    """Choice of the next token from logits; options have the names and meanings of transformers.

    The options apply in this order:

        repetition_penalty   divides positive and multiplies negative logits of earlier tokens (CTRL, arXiv 1909.05858)
        temperature          divides all logits; at 0, the most probable token is taken
        top_k                keeps the k most probable tokens
        top_p                keeps the smallest set of these tokens with that share of their total probability
        min_p                keeps tokens at least min_p times as probable as the most probable one

    Ties with the last kept token are kept.
    """

    temperature: float | Sequence[float] | Tensor = 1.0
    """A number for all rows, or a sequence of one for each, stored as a tensor (rows, 1), float64. So is `top_p`"""
    top_k: int | None = None
    top_p: float | Sequence[float] | Tensor | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def __post_init__(self) -> None:
        self._check("temperature", "a finite number of at least 0", 0.0, by_row=True)
        self._check("top_p", "a probability in (0, 1]", MIN_POSITIVE, 1.0, by_row=True)
        self._check("min_p", "a probability in [0, 1]", 0.0, 1.0)
        self._check("repetition_penalty", "a positive finite number", MIN_POSITIVE)
        if self.top_k is not None:
            object.__setattr__(self, "top_k", check_size("generate", "top_k", self.top_k))

    def _check(self, field: str, expected: str, low: float, high: float = MAX_FLOAT, by_row: bool = False) -> None:
        """Check a number or, with `by_row`, a sequence of one for each row, which is stored as a tensor on the CPU."""
        value = getattr(self, field)
        if value is None and field != "temperature":
            return
        if by_row and isinstance(value, Sequence) and not isinstance(value, str):
            expected += ", one for each row"
            numbers = [check_number("generate", field, one, expected, low, high) for one in value]
            value = torch.tensor(numbers, dtype=torch.float64)[:, None]
        else:
            value = check_number("generate", field, value, expected, low, high)
        object.__setattr__(self, field, value)

    def check_rows(self, rows: int) -> None:
        """Raise if an option with a number for each row is not given for `rows` rows."""
        for field in ("temperature", "top_p"):
            value = getattr(self, field)
            if isinstance(value, Tensor) and len(value) != rows:
                raise ValueError(
                    f"generate: `{field}` must be one number, or one for each of {rows} rows, got {len(value)}."
                )

    @property
    def draws(self) -> bool:
        """Return True if a row has a temperature above 0 and so draws its tokens."""
        return bool((self.temperature > 0).any()) if isinstance(self.temperature, Tensor) else self.temperature > 0

    @property
    def has_penalty(self) -> bool:
        """Return True if logits depend on earlier tokens."""
        return self.repetition_penalty not in (None, 1.0)

    def choose(self, logits: Tensor, numbers: Iterator[Tensor], seen_mask: Tensor | None = None) -> Tensor:
        """Draw one token (rows,) for each row of logits (rows, tokens).

        Args:
            numbers: yields random numbers (rows,) in [0, 1), float64.
            seen_mask: (rows, tokens) bools, earlier tokens for the repetition penalty.
        """
        if self.has_penalty:
            penalised = torch.where(logits < 0, logits * self.repetition_penalty, logits / self.repetition_penalty)
            logits = torch.where(seen_mask, penalised, logits)
        if not self.draws:
            likeliest = logits.argmax(-1, keepdim=True)  # argmax returns a NaN if there is one
            _check_numbers(~logits.gather(-1, likeliest).isnan())
            return likeliest.squeeze(-1)
        temperature = self.temperature
        is_greedy = None  # (rows, 1) bools, True for temperature 0
        if isinstance(temperature, Tensor):
            temperature = temperature.to(logits)
            is_greedy = temperature == 0
            temperature = temperature.masked_fill(is_greedy, 1)
        probability = (logits / temperature).softmax(-1)
        _check_numbers(~probability[:, :1].isnan())  # one NaN makes a whole row NaN
        threshold = self._threshold(probability)
        if threshold is not None:
            probability = torch.where(probability >= threshold, probability, 0)
        cumulative = _running_sums(probability)
        target = next(numbers)[:, None] * cumulative[:, -1:]
        drawn = torch.searchsorted(cumulative, target, right=True)
        if is_greedy is not None:
            drawn = logits.argmax(-1, keepdim=True).where(is_greedy, drawn)
        return drawn.squeeze(-1)

    def _threshold(self, probability: Tensor) -> Tensor | None:
        """Return the least probability (rows, 1) of a token that may be drawn, or None if all may be.

        Unlike the first k entries of a sorted row, a threshold does not depend on the order of ties.
        """
        threshold, total = None, 1.0
        top_k, top_p = self.top_k, self.top_p
        if isinstance(top_p, Tensor):
            top_p = top_p.to(probability.device)
            needs_sorting = bool((top_p < 1).any())
        else:
            needs_sorting = top_p is not None and top_p < 1
        if top_k is not None and top_k < probability.shape[-1]:
            likeliest = probability.topk(top_k).values
            threshold = likeliest[:, -1:]
            if needs_sorting:
                cumulative = _running_sums(likeliest)
                total = cumulative[:, -1:]
        elif needs_sorting:
            likeliest, cumulative = _top_probabilities(probability, top_p)
        if needs_sorting:
            is_in_set = cumulative - likeliest < top_p * total
            limit = likeliest.gather(-1, (is_in_set.sum(-1, keepdim=True) - 1).clamp(min=0))
            if isinstance(top_p, Tensor):  # rows with top_p 1 keep the threshold of top_k
                limit = limit.where(top_p < 1, 0 if threshold is None else threshold)
            threshold = limit
        if self.min_p:
            minimum = self.min_p * probability.amax(-1, keepdim=True)
            threshold = minimum if threshold is None else torch.maximum(threshold, minimum)
        return threshold


def _top_probabilities(probability: Tensor, share: float | Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest probabilities of each row, sorted, and their running sums, which reach at least `share`."""
    if probability.is_cpu:  # sorting a large vocabulary takes as long as all other work for a token
        largest = probability.topk(min(_FEW_TOKENS, probability.shape[-1])).values
        cumulative = _running_sums(largest)
        if bool((cumulative[:, -1] >= share).all()):
            return largest, cumulative
    likeliest = probability.sort(descending=True).values
    return likeliest, _running_sums(likeliest)


def _running_sums(values: Tensor) -> Tensor:
    """Cumulative sums of each row, float64; if torch must be deterministic, on the CPU: its CUDA kernel is not."""
    if values.is_cuda and torch.are_deterministic_algorithms_enabled():
        return values.cpu().cumsum(-1, dtype=torch.float64).to(values.device)
    return values.cumsum(-1, dtype=torch.float64)


def _check_numbers(is_valid: Tensor) -> None:
    """Raise unless all are True; skip the check on a device, as the host would wait for it."""
    if is_valid.is_cpu and not bool(is_valid.all()):
        raise FloatingPointError(
            "generate: logits / temperature must be numbers, got NaN or infinity; "
            "the weights are too large or damaged, or the temperature is too small."
        )


def check_seeds(seed: object, rows: int) -> list[int]:
    """Return the seed of each row; a single seed s gives the rows s, s + 1, s + 2 and so on."""
    if not isinstance(seed, Sequence) or isinstance(seed, str):
        first = check_integer("generate", "seed", seed, _SEED, 0)
        return [(first + row) % 2**63 for row in range(rows)]
    if len(seed) != rows:
        raise ValueError(f"generate: `seed` must be {_SEED}, got {len(seed)} for {rows} rows.")
    return [check_integer("generate", "seed", one, _SEED, 0) for one in seed]


def numbers_of_seeds(seeds: list[int], positions: Tensor, device: torch.device) -> Iterator[Tensor]:
    """Yield random numbers (rows,) in [0, 1), float64: Philox of each row's seed and positions from `positions` on."""
    key = torch.tensor(seeds)[:, None]
    position = positions.cpu()[:, None] + torch.arange(_BLOCK)
    while True:
        zero = torch.zeros_like(position)
        high, low, _, _ = philox((position & 0xFFFFFFFF, position >> 32, zero, zero), key)
        bits = high << (_BITS - 32) | low >> (64 - _BITS)
        yield from (bits.double() * 2.0**-_BITS).to(device).unbind(1)
        position = position + _BLOCK
