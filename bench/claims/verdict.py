"""How a claim is decided, from results alone; written down before there were any.

Two models are told apart when the difference of their means over the seeds is larger than 3 standard errors of that
difference, and larger than a least difference that would matter. With fewer than 3 seeds each, nothing is decided. Of 3 seeds
each, equal models differ by as much in 1 of 25 comparisons (Student's t of 4 degrees of freedom); where many are made, `errors` is 5
standard errors, 1 in 130.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

HELD, NOT_HELD, UNDECIDED = "held", "not held", "undecided"
STANDARD_ERRORS, OF_MANY = 3.0, 5.0
SEEDS = 3


def decided(held: bool) -> str:
    return HELD if held else NOT_HELD


def lower(ours: Sequence[float], others: Sequence[float], least: float = 0.0, errors: float = STANDARD_ERRORS) -> str:
    """Whether figures of ours are lower than those of others: held, not held where they are higher, or undecided."""
    if min(len(ours), len(others)) < SEEDS or not all(map(math.isfinite, (*ours, *others))):
        return UNDECIDED
    difference = statistics.fmean(others) - statistics.fmean(ours)
    error = math.sqrt(statistics.variance(ours) / len(ours) + statistics.variance(others) / len(others))
    if abs(difference) <= max(errors * error, least):
        return UNDECIDED
    return decided(difference > 0)


def higher(ours: Sequence[float], others: Sequence[float], least: float = 0.0, errors: float = STANDARD_ERRORS) -> str:
    return lower([-figure for figure in ours], [-figure for figure in others], least, errors)


def falls(curves: Sequence[Sequence[float]], least: float = 0.0) -> str:
    """Whether curves, one a seed, fall from each point to the next.

    held: at every step the mean falls. not held: at a step the mean rises by more than `least` and by more than 3 standard
    errors of the rises over the seeds. Anything else, and fewer than 3 seeds, is undecided. Values of a curve are over the
    same tokens, so the rises and falls are compared within a seed.
    """
    if len(curves) < SEEDS:
        return UNDECIDED
    verdict = HELD
    for before, after in zip(list(zip(*curves, strict=True)), list(zip(*curves, strict=True))[1:]):
        steps = [b - a for a, b in zip(before, after, strict=True)]
        mean, error = statistics.fmean(steps), statistics.stdev(steps) / math.sqrt(len(steps))
        if mean > max(least, STANDARD_ERRORS * error):
            return NOT_HELD
        if mean >= 0:
            verdict = UNDECIDED
    return verdict


def decided_at(outcomes: Mapping[tuple[str, str], str]) -> dict[str, str]:
    """Of comparisons that are each made at several lengths: where each is decided, and all others in one."""
    found: dict[str, dict[str, list[str]]] = {}
    for (comparison, at), outcome in outcomes.items():
        if outcome != UNDECIDED:
            found.setdefault(comparison, {}).setdefault(outcome, []).append(at)
    shown = {
        comparison: "; ".join(f"{outcome} at {' / '.join(lengths)}" for outcome, lengths in by_outcome.items())
        for comparison, by_outcome in found.items()
    }
    return shown | ({"all others" if shown else "all comparisons": UNDECIDED} if UNDECIDED in outcomes.values() else {})


def together(verdicts: Sequence[str]) -> str:
    """Held where all are, not held where one is not."""
    if NOT_HELD in verdicts:
        return NOT_HELD
    return HELD if verdicts and all(verdict == HELD for verdict in verdicts) else UNDECIDED


def spread(figures: Sequence[float]) -> str:
    """Mean ± standard deviation over the seeds, as tables show it."""
    mean = statistics.fmean(figures)
    return f"{mean:.4f}" + (f" ± {statistics.stdev(figures):.4f}" if len(figures) > 1 else "")
