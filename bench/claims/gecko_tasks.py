"""Gains of Gecko's parts on tasks that need tokens from before the last chunk."""

import itertools
import statistics
from collections.abc import Iterator
from functools import partial
from typing import Any

from bench.plots import BLUE, GREEN, GREY, INK, RED, plain_ticks

from . import gecko, models, runs, task_runs, verdict
from .runs import Session
from .task_runs import Entrant, costs
from .tasks import TASKS

TITLE = "Gecko's parts on tasks"
RULE = (
    "MQAR, needle and selective copying are trained in rows of 128 tokens, four chunks of 32, and evaluated in rows of "
    "128, 256, 512 and 1,024, as in the claim of tasks, except that each task has one rate, the one that MEGALODON "
    "took there. Each of Gecko's parts is compared with MEGALODON in chunks of the same and of twice the length, which "
    "shows its gain, and with a control at equal operations: MEGALODON in the shortest chunks of 32, 64 and 128 that "
    "take at least as many operations a token, or in the longest. All run with the first seed, with one exception: on "
    "needle and selective copying, the only combination of all parts that runs is the one with logits of 3. MEGALODON "
    "in chunks of 32 and 128 runs with two more seeds, and so does a part whose share of right answers is then higher "
    "than the control's by more than 0.1 at any length, except the delta rule, which is not Gecko's. A part pays "
    "(held) if at one length or more it is higher than the control by more than 0.1 and more than 5 standard errors "
    "over the three seeds. Every length counts, as even the shortest is longer than what a part's attention sees. The "
    "claim is held if a part pays, and not held if all have run and none does. Also compared, without deciding: on "
    "MQAR, the memory with logits of 3 and attention to two chunks, against that memory alone in chunks of 64, which "
    "takes 7 % fewer operations. Attention to two chunks pays on top of the memory if the two are better by as much. "
    "The memory holds what attention no longer sees or, in a second form, all chunks before a position's own."
)
MIN_GAIN = 0.1
RATES = {"mqar": 4e-3, "selective copying": 16e-3, "needle": 1e-3}
"""Rates of MEGALODON in the claim of tasks: in chunks of 32, but for MQAR of 128, as it learned MQAR only there"""
CHUNK = 32
MEGALODONS = [Entrant(models.MEGALODON, CHUNK * times) for times in (1, 2, 4)]
control = partial(task_runs.control, megalodons=MEGALODONS)
TWO_CHUNKS_WITH_MEMORY = [Entrant(f"two chunks with memory{form}, logits of 3", CHUNK) for form in ("", " of all")]
LONG_CHUNK_MEMORY = Entrant("memory, logits of 3", 2 * CHUNK)
PARTS = [*(Entrant(name, CHUNK) for name in gecko.PARTS), LONG_CHUNK_MEMORY]
ENTRANTS = [*MEGALODONS, *PARTS]
FULL_TASK = "mqar"  # the task of all entrants
COMMON_PARTS = ("two chunks", "decay norm", *gecko.MEMORIES, "all with memory, logits of 3")
"""Parts that also run on the other tasks"""


def run(session: Session, data: list[str] | None) -> None:
    first, *more = session.seeds()
    for task, rate in RATES.items():
        for entrant in entrants_of(task):
            task_runs.train_once(session, task, entrant, data, lr=rate, seed=first)
        found = task_runs.cells([*runs.results(session.path).values()], ENTRANTS)
        for entrant, seed in itertools.product(repeated_entrants(found, task), more):
            task_runs.train_once(session, task, entrant, data, lr=rate, seed=seed)


def entrants_of(task: str) -> list[Entrant]:
    if task == FULL_TASK:
        return ENTRANTS
    return [*MEGALODONS, *(part for part in PARTS if part.model in COMMON_PARTS and part != LONG_CHUNK_MEMORY)]


def repeated_entrants(found: task_runs.Shares, task: str) -> list[Entrant]:
    """Entrants with more seeds: MEGALODON, and parts whose first seed is better than the control's by MIN_GAIN."""

    def gains(part: Entrant) -> Iterator[float]:
        for (name, setting), shares in found.items():
            other = control(part, length_of(setting))
            if name == task and {part, other} <= shares.keys():
                yield shares[part][0] - shares[other][0]

    candidates = [part for part in PARTS if "delta" not in part.model]
    promising_parts = [part for part in candidates if max(gains(part), default=0.0) > MIN_GAIN]
    return [MEGALODONS[0], MEGALODONS[-1], *promising_parts]


def length_of(setting: str) -> int:
    """Return 128 for the settings "length 128" and "length 128, 16 pairs"."""
    return int(setting.removeprefix("length ").partition(",")[0])


def label(entrant: Entrant) -> str:
    if entrant in MEGALODONS:
        return f"MEGALODON in chunks of {entrant.chunk}"
    return entrant.model if entrant.chunk == CHUNK else f"{entrant.model} in chunks of {entrant.chunk}"


def compare(shares: dict[Entrant, list[float]], part: Entrant, other: Entrant) -> str:
    ours, theirs = shares.get(part, []), shares.get(other, [])
    return verdict.decide_higher(ours, theirs, least=MIN_GAIN, errors=verdict.MANY_COMPARISONS)


def verdicts(results: list[dict[str, Any]]) -> dict[str, str]:
    found = task_runs.cells(results, ENTRANTS)
    against_others, against_control = {}, {}
    for (task, setting), shares in found.items():
        with_memory = [(part, LONG_CHUNK_MEMORY) for part in TWO_CHUNKS_WITH_MEMORY]
        for part, other in [*with_memory, *itertools.product(PARTS, MEGALODONS[:2])]:
            against_others[f"{task}, {label(part)}: better than {label(other)}", setting] = compare(shares, part, other)
        for part in PARTS:
            other = control(part, length_of(setting))
            comparison = f"{task}, {label(part)}: better than {label(other)}, the control"
            against_control[comparison, setting] = compare(shares, part, other)
    complete = {task for task, _ in found} == RATES.keys()
    for (task, _), shares in found.items():
        required = dict.fromkeys(entrants_of(task), 1)
        required |= dict.fromkeys(repeated_entrants(found, task), verdict.SEEDS)
        complete &= all(len(shares.get(entrant, [])) >= seeds for entrant, seeds in required.items())
    claim = verdict.NOT_HELD if complete else verdict.UNDECIDED
    if verdict.HELD in against_control.values():
        claim = verdict.HELD
    return {"claim": claim, **verdict.group_by_comparison(against_control | against_others)}


def table(results: list[dict[str, Any]]) -> list[str]:
    found = task_runs.cells(results, ENTRANTS)
    lines = ["Shares of right answers; with three seeds, mean ± standard deviation.", ""]
    for task in RATES:
        settings = [setting for name, setting in found if name == task]
        lines += [
            f"| {task} | chunk | operations a token and layer | numbers in a state | {' | '.join(settings)} |",
            "|" + " --- |" * (4 + len(settings)),
        ]
        for entrant in ENTRANTS:
            shares = [found[task, setting].get(entrant) for setting in settings]
            if any(shares):
                operations, numbers = costs(entrant, TASKS[task].length)
                cells = [entrant.model, str(entrant.chunk), f"{operations:,.0f}", f"{numbers:,}"]
                cells += [verdict.spread(seeds) if seeds else "" for seeds in shares]
                lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return lines[:-1]


def plot(results: list[dict[str, Any]], figure: Any) -> None:
    found = task_runs.cells(results, ENTRANTS)
    for axes, task in zip(figure.subplots(1, len(RATES), sharey=True), RATES, strict=True):
        styles = dict(zip(PARTS, itertools.product((GREEN, RED, INK, GREY), ("-", "--", ":", "-."))))
        for entrant in (MEGALODONS[0], *PARTS):
            points = [
                (length_of(setting), statistics.fmean(shares[entrant]))
                for (name, setting), shares in found.items()
                if name == task and entrant in shares and "pairs" not in setting  # more pairs: not a further length
            ]
            if points:
                colour, style = styles.get(entrant, (BLUE, "-"))
                axes.plot(*zip(*points, strict=True), style, color=colour, marker=".", label=entrant.model)
        axes.set(title=f"{task}, chunks of {CHUNK}", xscale="log", ylim=(-0.02, 1.02), xlabel="tokens of a row")
        plain_ticks(axes.xaxis)
    handles = {
        label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3)
    figure.supylabel("share of right answers")
