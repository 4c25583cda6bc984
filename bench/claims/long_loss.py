"""Claim a again, by longer runs: 60 MB of sources as tokens, documents in parts, each model's best optimizer and rate."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from . import loss, models, text, verdict
from .runs import Session
from .train import LOOKS, Recipe, bits_per_byte, config, estimate, train_on_text

TITLE = "Loss against a Transformer's after 60 MB"
RULE = (
    "Rows of 512 and of 2,048 tokens, as many as make 8,192 tokens a step; MEGALODON's chunk is a row, which is what "
    "the Llama sees; documents are cut into parts of two rows. The text is sources of Python packages "
    "(bench/claims/packages.txt), of which whole packages are held out, one part for choosing and one for testing; "
    "tokens are a BPE's, learned from the text to learn from. All runs are of full length. The size is 100k: two "
    "layers of width 64, and embeddings of 1,024 tokens. In rows of 512, each model's rate is chosen for AdamW and for "
    "Muon, from two rates and up to two more by a factor of 2 while the best is at an end, then the better of the two "
    "optimizers, which gets a third one where its best is still at an end, all by validation bits per byte at the end, "
    "by one seed. Three seeds of what was chosen are compared in rows of 512: bits per byte of the test packages at the "
    "end, in windows of a row, decide by more than 3 standard errors. Beside these, which decide nothing: the same after "
    "a quarter and half of the run, whose rates have not come down yet; whole documents; and with the chosen optimizer, "
    "of one seed rows of 2,048 at the chosen rate, of three seeds size 1M in rows of 512, at the chosen rate or half of "
    "it, as larger models want lower ones, by validation of one seed, and of one seed English in rows of 512 at the "
    "chosen rate: a dictionary and technical documentation of Debian's packages (bench/claims/english.txt), read and "
    "held out in the same way."
)
SIZE, TOKENS, VOCABULARY = "100k", 25_000_000, 1024
BESIDE = "1M"
QUICK = ("tiny", 60_000, 300)
ROWS = {512: 16, 2048: 4}
"""Of a batch, by their length; the shortest decide"""
RATES = {models.MEGALODON: (8e-3, 16e-3), models.LLAMA: (2e-3, 4e-3)}
"""What the sweeps of `loss` chose for 1M parameters or half of it, 0.016 and 0.002, and its neighbour, as the size is smaller
and the run longer"""
OPTIMIZERS = ("adamw", "muon")
PIECE = 2048
"""Tokens of a document that a call reads of held-out text"""
SECONDS = {models.MEGALODON: 1.5, models.LLAMA: 3.8}
"""Of one thread for each that is estimated of two"""
HELD_OUT = {"validation": 400_000, "test": 840_000}
"""Tokens, about"""


class Trained(NamedTuple):
    """What the runs of one row of the table have in common; they differ by their seeds."""

    size: str
    length: int
    model: str
    optimizer: str
    lr: float
    language: str = text.PYTHON

    def settings(self) -> dict[str, Any]:
        """As a run's line holds them: without the language where it is the default."""
        return {name: value for name, value in self._asdict().items() if value != text.PYTHON}


def run(session: Session, data: list[str] | None) -> None:
    size, tokens, vocabulary = QUICK if session.quick else (SIZE, TOKENS, VOCABULARY)
    first = session.seed

    def bits(key: Trained, seed: int) -> float | None:
        """Of the validation packages."""
        label = " ".join(str(value) for name, value in key.settings().items() if name != "lr")
        found = session.run(
            f"{label} lr={key.lr:g} seed={seed}", work, seconds(key, tokens, vocabulary), **key.settings(),
            rows=ROWS[key.length], tokens=tokens, vocabulary=vocabulary, data=data, seed=seed,
        )  # fmt: skip
        return None if found is None else loss.as_figure(in_windows(found, "validation"))

    def best_rate(key: Trained, more: int = loss.LONGER) -> Trained:
        return key._replace(lr=loss.sweep(lambda rate: bits(key._replace(lr=rate), first), RATES[key.model], more))

    def best_of(keys: list[Trained]) -> Trained:
        """The last one while some have not run."""
        found = {key: bits(key, first) for key in keys}
        return keys[-1] if None in found.values() else min(found, key=found.get)

    shortest, *longer = ROWS
    best = []
    for model in loss.BOTH:
        keys = [best_rate(Trained(size, shortest, model, optimizer, 0.0)) for optimizer in OPTIMIZERS]
        best.append(best_rate(best_of(keys), loss.LONGER + 1))
    for seed, key in itertools.product(session.seeds(), best):
        bits(key, seed)
    for length, key in itertools.product(longer, best):
        bits(key._replace(length=length), first)
    if session.quick:
        return
    if data is None:
        for key in best:
            bits(key._replace(language=text.ENGLISH), first)
    larger = [best_of([key._replace(size=BESIDE, lr=rate) for rate in (key.lr / 2, key.lr)]) for key in best]
    for seed, key in itertools.product(session.seeds(), larger):
        bits(key, seed)


def seconds(key: Trained, tokens: int, vocabulary: int) -> float:
    """Of one thread. At each look the held-out text is read in windows, and at the end the test as a whole, by the Llama twice."""
    reading = sum(HELD_OUT.values()) * len(LOOKS) + HELD_OUT["test"] * (2 if key.model == models.LLAMA else 1)
    reading = min(reading, tokens)  # of a quick run
    work_of = ((tokens, True), (reading, False))
    return SECONDS[key.model] * sum(
        estimate(key.size, key.length, key.model, count, key.length, training=training, vocabulary=vocabulary)
        for count, training in work_of
    )


def work(
    scratch: Path, *, size: str, length: int, model: str, optimizer: str, lr: float, rows: int, tokens: int, vocabulary: int,
    data: list[str] | None, seed: int, language: str = text.PYTHON,
) -> dict[str, Any]:  # fmt: skip
    folder = scratch.parent if language == text.PYTHON else scratch.parent / language
    corpus = text.tokens(folder, vocabulary, data, language)
    built = models.build(model, config(size, length, corpus.tokenizer.vocab_size), length // 2, seed)
    carries = model != models.LLAMA

    def look() -> dict[str, Any]:
        held_out = {"validation": corpus.validation, "test": corpus.test}
        return {
            part: bits_per_byte(built, documents, [length], PIECE)[str(length)] for part, documents in held_out.items()
        }

    result = train_on_text(
        built, Recipe(tokens, rows, length, lr, optimizer=optimizer), corpus.train, scratch, seed=seed, carries=carries,
        look=look, start=corpus.tokenizer.start, context_length=2 * length,
    )  # fmt: skip
    whole = bits_per_byte(built, corpus.test, ["all"], PIECE if carries else length // 2)
    return result | {"whole": whole["all"], "parameters": built.num_parameters(), "text": corpus.facts}


def in_windows(result: dict[str, Any], part: str = "test", look: float = LOOKS[-1]) -> float | None:
    """Bits per byte in windows of a row; None where a loss was not finite."""
    return result.get("looks", {}).get(f"{look:g}", {}).get(part)


FIGURES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "test": in_windows,
    "test, half": lambda result: in_windows(result, look=0.5),
    "test, a quarter": lambda result: in_windows(result, look=0.25),
    "test, whole documents": lambda result: result["whole"],
    "validation": lambda result: in_windows(result, "validation"),
    "training, nats a token": lambda result: result["train_loss"],
}


def figures(results: list[dict[str, Any]], pick: Callable[[dict[str, Any]], Any]) -> dict[Trained, list[float]]:
    """Of all seeds."""
    found: dict[Trained, list[float]] = {}
    for content in results:
        key = Trained(**{name: value for name, value in content["settings"].items() if name in Trained._fields})
        found.setdefault(key, []).append(loss.as_figure(pick(content["result"])))
    return dict(sorted(found.items(), key=lambda of_key: (of_key[0].language != text.PYTHON, of_key)))


def chosen(results: list[dict[str, Any]]) -> dict[tuple[str, int, str], Trained]:
    """By size, length and model, what most seeds were run of, or the best of these."""
    found = figures(results, FIGURES["validation"])
    best_last = sorted(found, key=lambda key: (len(found[key]), -found[key][0]))
    return {(key.size, key.length, key.model): key for key in best_last if key.language == text.PYTHON}


def verdicts(results: list[dict[str, Any]]) -> dict[str, str]:
    keys = chosen(results)
    compared = sorted({key[:2] for key in keys} | {(SIZE, min(ROWS))})
    by_comparison = {}
    for what, pick in FIGURES.items():
        found = figures(results, pick)
        for size, length in compared:
            ours, theirs = (found.get(keys.get((size, length, model)), []) for model in loss.BOTH)
            by_comparison[f"{size}, rows of {length}, {what}"] = verdict.lower(ours, theirs)
    return {"claim": by_comparison[f"{SIZE}, rows of {min(ROWS)}, {next(iter(FIGURES))}"], **by_comparison}


def table(results: list[dict[str, Any]]) -> list[str]:
    keys = chosen(results).values()
    parameters = {
        (content["settings"]["size"], content["settings"]["model"]): content["result"]["parameters"]
        for content in results
    }
    found = [figures(results, pick) for pick in FIGURES.values()]
    lines = [
        "Bits per byte, in windows of a row but for whole documents.", "",
        f"| text | row | model | parameters | optimizer, rate | seeds | {' | '.join(FIGURES)} |",
        "|" + " --- |" * (6 + len(FIGURES)),
    ]  # fmt: skip
    for key in found[0]:
        rate = f"{key.optimizer}, {key.lr:g}" + (", chosen" if key in keys else "")
        cells = [
            key.language,
            str(key.length),
            key.model,
            f"{parameters[key.size, key.model]:,}",
            rate,
            str(len(found[0][key])),
        ]
        lines.append("| " + " | ".join([*cells, *(verdict.spread(of_what[key]) for of_what in found)]) + " |")
    return lines


def plot(results: list[dict[str, Any]], figure: Any) -> None:
    for axes, length in zip(figure.subplots(1, len(ROWS), sharey=True), ROWS, strict=True):
        for model in loss.BOTH:
            key = chosen(results).get((SIZE, length, model))
            points = {
                look: figures(results, lambda result: in_windows(result, look=look)).get(key, []) for look in LOOKS
            }
            means = [statistics.fmean(values) for values in points.values() if values]
            axes.plot([*LOOKS][: len(means)], means, color=models.COLOURS[model], label=model)
            for look, values in points.items():
                axes.plot([look] * len(values), values, ".", color=models.COLOURS[model])
        axes.set(title=f"rows of {length} tokens", xlabel="part of the run", ylabel="test, bits per byte", xticks=LOOKS)
        axes.legend()
