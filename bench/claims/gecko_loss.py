"""Gains of Gecko's parts in bits per byte, by the length of the context."""

import itertools
from functools import partial
from pathlib import Path
from typing import Any

from bench.plots import INK

from . import gecko, loss, models, runs, task_runs, text, verdict
from .runs import Session
from .task_runs import SIZE, Entrant
from .train import Recipe, bits_per_byte, config, estimate, train_on_text

TITLE = "Gecko's parts in bits per byte"
RULE = (
    "Models are trained on the standard library's sources in rows of 512 bytes, eight chunks of 64, without a state "
    "from row to row. Documents are cut into parts of four rows, and no text repeats in a run. The learning rate: "
    "MEGALODON in chunks of 64 runs at two rates with the first seed, and all models use the one with the lower "
    "training loss, the mean of the run's last tenth. Held-out text is predicted in windows of 1, 2, 8 and 32 chunks. "
    "All models run with the first seed. Each part is compared with MEGALODON in chunks of 64 and 128, which shows its "
    "gain, and with a control at equal operations. The control is MEGALODON in the shortest chunks of 64, 128, 256 and "
    "512 that take at least as many operations a token; if none do, in chunks of 512. A part with a lower loss than its "
    "control, by at least 0.01 bits per byte in windows of 8 or 32 chunks, runs with two more seeds, and its control "
    "too. The part pays (held) if its loss is lower by more than 0.01 and by more than 3 standard errors over the three "
    "seeds. The claim is held if a part pays. It is not held if all models have run and no part pays."
)
MIN_GAIN = 0.01
TOKENS = 4_000_000
QUICK = ("tiny", 20_000)
CHUNK = 64
LENGTH, ROWS = 512, 16
MAX_DOCUMENT = 2048
RATES = (8e-3, 16e-3)
CONTEXTS = [CHUNK * times for times in (1, 2, 8, 32)]
DECIDING = CONTEXTS[2:]
MEGALODONS = [Entrant(models.MEGALODON, CHUNK * times) for times in (1, 2, 4, 8)]
control = partial(task_runs.control, length=LENGTH, megalodons=MEGALODONS)
PARTS = [Entrant(name, CHUNK) for name in gecko.PARTS]
ENTRANTS = [*MEGALODONS, *PARTS]


def run(session: Session, data: list[str] | None) -> None:
    first = session.seed
    losses = {rate: train_once(session, MEGALODONS[0], data, lr=rate, seed=first) for rate in RATES}
    rate = min(RATES, key=lambda rate: loss.as_figure((losses[rate] or {}).get("train_loss")))
    for entrant in ENTRANTS:
        train_once(session, entrant, data, lr=rate, seed=first)
    repeated = repeated_entrants(figures([*runs.results(session.path).values()]))
    for seed, entrant in itertools.product([*session.seeds()][1:], repeated):
        train_once(session, entrant, data, lr=rate, seed=seed)


def repeated_entrants(found: dict[Entrant, dict[int, list[float]]]) -> list[Entrant]:
    """Entrants with more seeds: parts whose first seed is better than the control's by MIN_GAIN, and their controls."""

    def is_promising(part: Entrant) -> bool:
        ours, theirs = found.get(part), found.get(control(part))
        return bool(ours and theirs) and any(theirs[n][0] - ours[n][0] >= MIN_GAIN for n in DECIDING)

    parts = [part for part in PARTS if is_promising(part)]
    return [*dict.fromkeys([*map(control, parts), *parts])]


def train_once(
    session: Session, entrant: Entrant, data: list[str] | None, lr: float, seed: int
) -> dict[str, Any] | None:
    size, tokens = QUICK if session.quick else (SIZE, TOKENS)
    reading = estimate(size, entrant.chunk, entrant.model, len(CONTEXTS) * loss.HELD_OUT, LENGTH, training=False)
    seconds = estimate(size, entrant.chunk, entrant.model, tokens, LENGTH) + reading
    settings = entrant._asdict() | dict(size=size, tokens=tokens, lr=lr, seed=seed, data=data)
    return session.run(f"{entrant.model} chunk={entrant.chunk} lr={lr:g} seed={seed}", work, seconds, **settings)


def work(
    scratch: Path, *, model: str, chunk: int, size: str, tokens: int, lr: float, seed: int, data: list[str] | None
) -> dict[str, Any]:
    corpus = text.documents(data)
    net = models.build(model, config(size, chunk), chunk, seed)
    recipe = Recipe(tokens=tokens, rows=ROWS, length=LENGTH, lr=lr)
    result = train_on_text(net, recipe, corpus.train, scratch, seed=seed, carries=False, context_length=MAX_DOCUMENT)
    bits = bits_per_byte(net, text.to_evaluate(corpus.held_out), CONTEXTS, CONTEXTS[-1])
    return result | {"bits_per_byte": bits, "parameters": net.num_parameters(), "text": corpus.fingerprint}


def figures(results: list[dict[str, Any]]) -> dict[Entrant, dict[int, list[float]]]:
    """Bits per byte by entrant and context, a number for each seed.

    Of an entrant's rates the one with the most seeds counts; of two with as many, that with the lower training loss.
    """
    by_rate: dict[Entrant, dict[float, list[dict[str, Any]]]] = {}
    for content in results:
        s = content["settings"]
        by_rate.setdefault(Entrant(s["model"], s["chunk"]), {}).setdefault(s["lr"], []).append(content["result"])

    def preferred(seeds: list[dict[str, Any]]) -> tuple[int, float]:
        return len(seeds), -loss.as_figure(seeds[0]["train_loss"])

    found: dict[Entrant, dict[int, list[float]]] = {}
    for entrant, rates in by_rate.items():
        seeds = [result["bits_per_byte"] for result in max(rates.values(), key=preferred)]
        found[entrant] = {context: [loss.as_figure(bits[str(context)]) for bits in seeds] for context in CONTEXTS}
    return found


def verdicts(results: list[dict[str, Any]]) -> dict[str, str]:
    found = figures(results)
    against_control, against_chunks = {}, {}
    for part in PARTS:
        comparisons = [(against_control, control(part), MIN_GAIN)]
        comparisons += [(against_chunks, other, 0.0) for other in MEGALODONS[:2]]
        for outcomes, other, least in comparisons:
            for context in DECIDING:
                ours, theirs = (found.get(entrant, {}).get(context, []) for entrant in (part, other))
                comparison = f"{part.model}: lower than MEGALODON in chunks of {other.chunk}"
                comparison += f", by {least:g}" if least else ""
                outcomes[comparison, f"windows of {context}"] = verdict.decide_lower(ours, theirs, least)
    num_seeds = dict.fromkeys(ENTRANTS, 1) | dict.fromkeys(repeated_entrants(found), verdict.SEEDS)
    first = CONTEXTS[0]  # every context has as many seeds
    complete = all(len(found.get(entrant, {}).get(first, [])) >= seeds for entrant, seeds in num_seeds.items())
    claim = verdict.NOT_HELD if complete else verdict.UNDECIDED
    if verdict.HELD in against_control.values():
        claim = verdict.HELD
    return {"claim": claim, **verdict.group_by_comparison(against_control | against_chunks)}


def table(results: list[dict[str, Any]]) -> list[str]:
    lines = [
        f"| model | chunk | operations a token and layer | numbers in a state | {' | '.join(f'windows of {n}' for n in CONTEXTS)} |",
        "|" + " --- |" * (4 + len(CONTEXTS)),
    ]
    for entrant, by_context in figures(results).items():
        operations, numbers = task_runs.costs(entrant, LENGTH)
        cells = [entrant.model, str(entrant.chunk), f"{operations:,.0f}", f"{numbers:,}"]
        lines.append("| " + " | ".join([*cells, *map(verdict.spread, by_context.values())]) + " |")
    return lines


def plot(results: list[dict[str, Any]], figure: Any) -> None:
    axes = figure.add_subplot()
    found = figures(results)
    names = [f"{entrant.model}, {entrant.chunk}" for entrant in found]
    for context, marker in zip(DECIDING, "os", strict=True):
        points = [(value, i) for i, by in enumerate(found.values()) for value in by[context]]
        axes.plot(*zip(*points, strict=True), marker, color=INK, fillstyle="none", label=f"windows of {context}")
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="held out, bits per byte", ylabel="model, positions of a chunk")
    axes.legend()
