"""What each of Gecko's parts buys on tasks that ask for what lies before the last chunk."""

from __future__ import annotations

import itertools
import statistics
from typing import Any

from . import gecko, models, runs, task_runs, verdict
from .runs import Session
from .task_runs import SIZE, Entrant
from .tasks import TASKS
from .train import config

TITLE = "Gecko's parts on tasks"
RULE = (
    "MQAR, needle and selective copying, trained in rows of 128 tokens, four chunks of 32, and asked in rows of 128, "
    "256, 512 and 1,024, as in the claim of tasks, all else of which is kept but for the rate: one for each task, "
    "which MEGALODON took there. Each of Gecko's parts is compared with MEGALODON in chunks of the same and of twice "
    "the length, which says what the part buys, and with a control at equal operations: MEGALODON in the shortest "
    "chunks of 32, 64 and 128 whose token takes at least as many, or in the longest. All run with the first seed, on "
    "needle and selective copying of the parts together only those with logits of 3; MEGALODON in chunks of 32 and 128, "
    "and a part whose share of right answers is then higher than the control's by more than 0.1 at any length, run with "
    "two more, but for the delta rule, which is not Gecko's. A part pays (held) where it is higher than the control by "
    "more than 0.1 and more than 5 standard errors over the three seeds, at any length: all are longer than what its "
    "attention sees. The claim is held where a part pays, not held where all have run and none does. Beside it, on MQAR, "
    "attention to two chunks pays on top of the memory with logits of 3 where both are better, by as much, than that "
    "memory in chunks of 64, which takes 7 % fewer operations; the memory holds what attention no longer sees or, in a "
    "second form, all chunks before a step's own."
)
PAYS = 0.1
RATES = {"mqar": 4e-3, "selective copying": 16e-3, "needle": 1e-3}
"""What MEGALODON took in the claim of tasks, in chunks of 32; of MQAR, which it learned in chunks of 128 alone, in these"""
CHUNK = 32
MEGALODONS = [Entrant(models.MEGALODON, CHUNK * times) for times in (1, 2, 4)]
ON_TOP = [Entrant(f"two chunks with memory{of}, logits of 3", CHUNK) for of in ("", " of all")]
WITHOUT = Entrant("memory, logits of 3", 2 * CHUNK)
PARTS = [*(Entrant(name, CHUNK) for name in gecko.PARTS), WITHOUT]
ENTRANTS = [*MEGALODONS, *PARTS]
FIRST, EVERYWHERE = "mqar", ("two chunks", "decay norm", *gecko.MEMORIES, "all with memory, logits of 3")
"""The task of all entrants, and the parts that run on the others, too"""


def run(session: Session, data: list[str] | None) -> None:
    first, *more = session.seeds()
    for task, rate in RATES.items():
        for entrant in entrants_of(task):
            task_runs.train_once(session, task, entrant, data, rate, first)
        found = task_runs.cells([*runs.results(session.path).values()], ENTRANTS)
        for entrant, seed in itertools.product(again(found, task), more):
            task_runs.train_once(session, task, entrant, data, rate, seed)


def entrants_of(task: str) -> list[Entrant]:
    if task == FIRST:
        return ENTRANTS
    return [*MEGALODONS, *(part for part in PARTS if part.model in EVERYWHERE and part != WITHOUT)]


def again(found: task_runs.Shares, task: str) -> list[Entrant]:
    """Of which more seeds are run: MEGALODON, and parts whose first seed is better than the control's by as much as pays."""
    promising = [
        part
        for part in PARTS
        if "delta" not in part.model
        and any(
            of == task and {part, other} <= shares.keys() and shares[part][0] - shares[other][0] > PAYS
            for (of, asked), shares in found.items()
            for other in [control(part, length_of(asked))]
        )
    ]
    return [MEGALODONS[0], MEGALODONS[-1], *promising]


def length_of(asked: str) -> int:
    return int(asked.split()[1].strip(","))


def costs(entrant: Entrant, length: int) -> tuple[float, int]:
    """Operations a token and numbers of a state, of a layer's attention and memory."""
    return gecko.cost(config(SIZE, entrant.chunk), gecko.PARTS.get(entrant.model, gecko.Parts()), length)


def control(entrant: Entrant, length: int) -> Entrant:
    """The MEGALODON at equal operations."""
    enough = [other for other in MEGALODONS if costs(other, length)[0] >= costs(entrant, length)[0]]
    return [*enough, MEGALODONS[-1]][0]


def described(entrant: Entrant) -> str:
    name = "MEGALODON" if entrant in MEGALODONS else entrant.model
    return name if entrant.chunk == CHUNK and name != "MEGALODON" else f"{name} in chunks of {entrant.chunk}"


def verdicts(results: list[dict[str, Any]]) -> dict[str, str]:
    found = task_runs.cells(results, ENTRANTS)
    bought, paid = {}, {}
    for (task, asked), shares in found.items():
        comparisons = [(bought, on_top, WITHOUT, "") for on_top in ON_TOP]
        for part in PARTS:
            comparisons += [(bought, part, other, "") for other in MEGALODONS[:2]]
            comparisons.append((paid, part, control(part, length_of(asked)), ", the control"))
        for of, part, other, note in comparisons:
            outcome = verdict.higher(shares.get(part, []), shares.get(other, []), PAYS, verdict.OF_MANY)
            of[f"{task}, {described(part)}: better than {described(other)}{note}", asked] = outcome
    wanted = {
        task: dict.fromkeys(entrants_of(task), 1) | dict.fromkeys(again(found, task), verdict.SEEDS) for task in RATES
    }
    complete = {task for task, _ in found} == RATES.keys() and all(
        len(shares.get(entrant, [])) >= seeds
        for (task, _), shares in found.items()
        for entrant, seeds in wanted[task].items()
    )
    claim = verdict.HELD if verdict.HELD in paid.values() else verdict.NOT_HELD if complete else verdict.UNDECIDED
    return {"claim": claim, **verdict.decided_at(paid | bought)}


def table(results: list[dict[str, Any]]) -> list[str]:
    found = task_runs.cells(results, ENTRANTS)
    lines = [
        "Shares of right answers, ± over three seeds where there are as many.",
        "",
    ]
    for task in RATES:
        asked = [at for of, at in found if of == task]
        lines += [
            f"| {task} | chunk | operations a token and layer | numbers of a state | {' | '.join(asked)} |",
            "|" + " --- |" * (4 + len(asked)),
        ]
        for entrant in ENTRANTS:
            shares = [found[task, at].get(entrant) for at in asked]
            if any(shares):
                operations, numbers = costs(entrant, TASKS[task].length)
                cells = [entrant.model, str(entrant.chunk), f"{operations:,.0f}", f"{numbers:,}"]
                lines.append("| " + " | ".join([*cells, *(verdict.spread(of) if of else "" for of in shares)]) + " |")
        lines.append("")
    return lines[:-1]


def plot(results: list[dict[str, Any]], figure: Any) -> None:
    found = task_runs.cells(results, ENTRANTS)
    for axes, task in zip(figure.subplots(1, len(RATES), sharey=True), RATES, strict=True):
        for entrant in (MEGALODONS[0], *PARTS):
            points = [
                (int(at.split()[1]), statistics.fmean(shares[entrant]))
                for (of, at), shares in found.items()
                if of == task and entrant in shares and "pairs" not in at
            ]
            if points:
                style = "k-" if entrant.model == models.MEGALODON else "-"
                axes.plot(*zip(*points, strict=True), style, marker=".", label=entrant.model)
        axes.set(title=f"{task}, chunks of {CHUNK}", xscale="log", ylim=(-0.02, 1.02), xlabel="tokens of a row")
    handles = {
        label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3)
    figure.supylabel("share of right answers")
