"""What each of Gecko's parts buys on tasks that ask for what lies before the last chunk."""

from __future__ import annotations

import itertools
import statistics
from typing import Any

from . import gecko, models, task_runs, verdict
from .runs import Session
from .task_runs import SIZE, Entrant
from .tasks import TASKS
from .train import config

TITLE = "Gecko's parts on tasks"
RULE = (
    "MQAR, needle and selective copying, trained in rows of 128 tokens and asked in rows of 128, 256, 512 and 1,024, "
    "as in the claim of tasks, all else of which is kept but for the rates: the first seed at two, then the others at "
    "the one of the lower training loss. All parts in chunks of 32 tokens, so that a row has four; some in chunks of "
    "16, so that it has eight. Each is compared with MEGALODON in chunks of the same and of twice the length, which "
    "says what the part buys, and with a control at equal operations: MEGALODON in the shortest chunks of 16, 32, 64 "
    "and 128 whose token takes at least as many, or in the longest. A part pays (held) where the share of right "
    "answers is higher than the control's by more than 0.1 and more than 5 standard errors over the seeds, at any "
    "length: all are longer than what its attention sees. The claim is held where a part pays, not held where all "
    "have run and none does."
)
PAYS = 0.1
ASKED = ("mqar", "needle", "selective copying")
RATES = {"mqar": (4e-3, 16e-3), "needle": (1e-3, 4e-3), "selective copying": (4e-3, 16e-3)}
"""The rate that MEGALODON took in chunks of 32, and a neighbour of it in the claim of tasks"""
MEGALODONS = [Entrant(models.MEGALODON, chunk) for chunk in (16, 32, 64, 128)]
OF_FOUR = [Entrant(name, 32) for name in gecko.PARTS]
OF_EIGHT = [Entrant(name, 16) for name in ("two chunks", "memory", "memory, delta rule", "all with memory")]
ENTRANTS = [*MEGALODONS, *OF_FOUR, *OF_EIGHT]


def run(session: Session, data: list[str] | None) -> None:
    for entrants in (MEGALODONS, OF_FOUR, OF_EIGHT):
        for task, entrant in itertools.product(ASKED, entrants):
            text = data if TASKS[task].needs_text else None
            task_runs.train_by_sweep(session, task, entrant, text, RATES[task])


def costs(entrant: Entrant, length: int) -> tuple[float, int]:
    """Operations a token and numbers of a state, of a layer's attention and memory."""
    return gecko.cost(config(SIZE, entrant.chunk), gecko.PARTS.get(entrant.model, gecko.Parts()), length)


def control(entrant: Entrant, length: int) -> Entrant:
    """The MEGALODON at equal operations."""
    enough = [other for other in MEGALODONS if costs(other, length)[0] >= costs(entrant, length)[0]]
    return [*enough, MEGALODONS[-1]][0]


def verdicts(results: list[dict[str, Any]]) -> dict[str, str]:
    found = task_runs.cells(results, ENTRANTS)
    bought, paid = {}, {}
    for (task, asked), shares in found.items():
        length = int(asked.split()[1].strip(","))
        for part in (*OF_FOUR, *OF_EIGHT):
            others = [Entrant(models.MEGALODON, chunk) for chunk in (part.chunk, 2 * part.chunk)]
            for of, other in ((paid, control(part, length)), *((bought, other) for other in others)):
                told = f"{task}, {asked}, {part.model} in chunks of {part.chunk}: better than MEGALODON in chunks of {other.chunk}"
                outcome = verdict.higher(shares.get(part, []), shares.get(other, []), PAYS, verdict.OF_MANY)
                of[told + (", the control" if of is paid else "")] = outcome
    complete = all(len(shares.get(entrant, [])) >= verdict.SEEDS for shares in found.values() for entrant in ENTRANTS)
    complete = complete and {task for task, _ in found} == {*ASKED}
    claim = verdict.HELD if verdict.HELD in paid.values() else verdict.NOT_HELD if complete else verdict.UNDECIDED
    decided = {told: outcome for told, outcome in (paid | bought).items() if outcome != verdict.UNDECIDED}
    return {"claim": claim, **decided}


def table(results: list[dict[str, Any]]) -> list[str]:
    found = task_runs.cells(results, ENTRANTS)
    lines = ["Shares of right answers. Comparisons below are those that are decided; all others are undecided.", ""]
    for task in ASKED:
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
    for axes, task in zip(figure.subplots(1, len(ASKED), sharey=True), ASKED, strict=True):
        for entrant in (MEGALODONS[1], *OF_FOUR):
            points = [
                (int(at.split()[1]), statistics.fmean(shares[entrant]))
                for (of, at), shares in found.items()
                if of == task and entrant in shares and "pairs" not in at
            ]
            if points:
                style = "k-" if entrant.model == models.MEGALODON else "-"
                axes.plot(*zip(*points, strict=True), style, marker=".", label=entrant.model)
        axes.set(title=f"{task}, chunks of 32", xscale="log", ylim=(-0.02, 1.02), xlabel="tokens of a row")
    handles = {
        label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3)
    figure.supylabel("share of right answers")
