"""Rules that decide a claim from its results; written before the runs.

Two models differ significantly if their means over the seeds differ by more than 3 standard errors and by more than a
smallest difference that matters. Fewer than 3 seeds each decide nothing. With 3 seeds each, equal models differ by 3
standard errors in 1 of 25 comparisons (Student's t, 4 degrees of freedom), by 5, for many comparisons, in 1 of 130.
"""

import math
import statistics
from collections.abc import Mapping, Sequence

HELD, NOT_HELD, UNDECIDED = "held", "not held", "undecided"
STANDARD_ERRORS, MANY_COMPARISONS = 3.0, 5.0
SEEDS = 3
Figures = Sequence[float]


def from_bool(held: bool) -> str:
    return HELD if held else NOT_HELD


def decide_lower(ours: Figures, others: Figures, least: float = 0.0, errors: float = STANDARD_ERRORS) -> str:
    """Return held if our figures are significantly lower, not held if they are higher, else undecided."""
    if min(len(ours), len(others)) < SEEDS or not all(map(math.isfinite, (*ours, *others))):
        return UNDECIDED
    difference = statistics.fmean(others) - statistics.fmean(ours)
    error = math.sqrt(statistics.variance(ours) / len(ours) + statistics.variance(others) / len(others))
    if abs(difference) <= max(errors * error, least):
        return UNDECIDED
    return from_bool(difference > 0)


def decide_higher(ours: Figures, others: Figures, least: float = 0.0, errors: float = STANDARD_ERRORS) -> str:
    return decide_lower([-figure for figure in ours], [-figure for figure in others], least, errors)


def decide_falling(curves: Sequence[Figures], least: float = 0.0) -> str:
    """Return held if the mean of the curves, one per seed, falls from each point to the next.

    Not held if it rises somewhere by more than `least` and by more than 3 standard errors of the rises over the seeds.
    Otherwise, and with fewer than 3 seeds, undecided. A curve's values are over the same tokens, so rises are compared
    within a seed.
    """
    if len(curves) < SEEDS:
        return UNDECIDED
    verdict = HELD
    points = list(zip(*curves, strict=True))  # at each, a figure of every seed
    for before, after in zip(points, points[1:]):
        rises = [b - a for a, b in zip(before, after, strict=True)]
        mean = statistics.fmean(rises)
        error = statistics.stdev(rises) / math.sqrt(len(rises))
        if mean > max(least, STANDARD_ERRORS * error):
            return NOT_HELD
        if mean >= 0:
            verdict = UNDECIDED
    return verdict


def group_by_comparison(outcomes: Mapping[tuple[str, str], str]) -> dict[str, str]:
    """Merge each comparison's verdicts over the lengths; undecided ones become a single entry."""
    found: dict[str, dict[str, list[str]]] = {}
    for (comparison, length), outcome in outcomes.items():
        if outcome != UNDECIDED:
            found.setdefault(comparison, {}).setdefault(outcome, []).append(length)
    decided = {
        comparison: "; ".join(f"{outcome} at {' / '.join(lengths)}" for outcome, lengths in by_outcome.items())
        for comparison, by_outcome in found.items()
    }
    rest = {"all others" if decided else "all comparisons": UNDECIDED}
    return decided | (rest if UNDECIDED in outcomes.values() else {})


def combine(verdicts: Sequence[str]) -> str:
    """Return held if all are held, not held if one is not held, else undecided."""
    if NOT_HELD in verdicts:
        return NOT_HELD
    return HELD if verdicts and all(verdict == HELD for verdict in verdicts) else UNDECIDED


def spread(figures: Figures) -> str:
    """Mean ± standard deviation over the seeds, for tables."""
    mean = statistics.fmean(figures)
    return f"{mean:.4f}" + (f" ± {statistics.stdev(figures):.4f}" if len(figures) > 1 else "")
