"""Claim a by longer runs: 60 MB of sources as tokens, documents cut into parts, each model's best optimizer and rate."""

import itertools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from . import loss, models, text, verdict
from .runs import Session
from .train import EVALUATION_POINTS, Recipe, bits_per_byte, config, estimate, train_on_text

TITLE = "Loss against a Transformer's after 60 MB"
RULE = (
    "Rows have 512 or 2,048 tokens, 8,192 tokens in a step; MEGALODON's chunk is a row, which is what the Llama sees; "
    "documents are cut into parts of two rows. The text is sources of Python packages (bench/claims/packages.txt). "
    "Whole packages are held out, one part for validation and one for testing; the tokens are those of a BPE that was "
    "trained on the training text. All runs have full length. The size is 100k: two layers of width 64, and embeddings "
    "of 1,024 tokens. All choices are made by validation bits per byte at the end, with one seed, in rows of 512: each "
    "model's rate for AdamW and for Muon, from two rates and up to two more by a factor of 2 while the best is at an "
    "end; then the better of the two optimizers, which gets a third additional rate if its best is still at an end. "
    "Three seeds of the choice are compared in rows of 512: bits per byte of the test packages at the end, in windows "
    "of a row, decide by more than 3 standard errors. Also shown, without deciding: the same after a quarter and half "
    "of the run, before the rates have come down; whole documents; and with the chosen optimizer, by one seed, rows of "
    "2,048 at the chosen rate; by three seeds, size 1M in rows of 512, at the chosen rate or half of it, as larger "
    "models need lower rates, by validation with one seed; and by one seed, English in rows of 512 at the chosen rate: "
    "a dictionary and technical documentation of Debian's packages (bench/claims/english.txt), read and held out in "
    "the same way."
)
SIZE, TOKENS, VOCABULARY = "100k", 25_000_000, 1024
LARGER_SIZE = "1M"
QUICK = ("tiny", 60_000, 300)
ROWS = {512: 16, 2048: 4}
"""Rows in a batch, by their length; the shortest decide"""
RATES = {models.MEGALODON: (8e-3, 16e-3), models.LLAMA: (2e-3, 4e-3)}
"""The rate that the sweeps of `loss` chose for 1M parameters or half of it, 0.016 and 0.002, and its neighbour, as the size
is smaller and the run longer"""
OPTIMIZERS = ("adamw", "muon")
PIECE = 2048
"""Tokens of held-out text that a call reads"""
SECONDS = {models.MEGALODON: 1.5, models.LLAMA: 3.8}
"""Seconds of one thread for each estimated second of two"""
HELD_OUT = {"validation": 400_000, "test": 840_000}
"""Approximate numbers of tokens"""


class RunKey(NamedTuple):
    """Settings shared by the runs of one table row, which differ by their seeds."""

    size: str
    length: int
    model: str
    optimizer: str
    lr: float
    language: str = text.PYTHON

    def settings(self) -> dict[str, Any]:
        """Settings as recorded: without the language if it is the default."""
        return {name: value for name, value in self._asdict().items() if value != text.PYTHON}


def run(session: Session, data: list[str] | None) -> None:
    size, tokens, vocabulary = QUICK if session.quick else (SIZE, TOKENS, VOCABULARY)
    first = session.seed

    def bits(key: RunKey, seed: int) -> float | None:
        """Bits per byte of the validation packages."""
        label = " ".join(str(value) for name, value in key.settings().items() if name != "lr")
        settings = key.settings() | dict(
            rows=ROWS[key.length], tokens=tokens, vocabulary=vocabulary, data=data, seed=seed
        )
        estimated = seconds(key, tokens, vocabulary)
        found = session.run(f"{label} lr={key.lr:g} seed={seed}", work, estimated, **settings)
        return None if found is None else loss.as_figure(window_bits(found, "validation"))

    def best_rate(key: RunKey, extra: int = loss.EXTRA_RATES) -> RunKey:
        return key._replace(lr=loss.sweep(lambda rate: bits(key._replace(lr=rate), first), RATES[key.model], extra))

    def best_of(keys: list[RunKey]) -> RunKey:
        """Key of the lowest validation figure; the last key until all have run."""
        found = {key: bits(key, first) for key in keys}
        return keys[-1] if None in found.values() else min(found, key=found.get)

    shortest, *longer = ROWS
    best = []
    for model in loss.MODELS:
        first_key = RunKey(size=size, length=shortest, model=model, optimizer="", lr=0.0)
        keys = [best_rate(first_key._replace(optimizer=optimizer)) for optimizer in OPTIMIZERS]
        best.append(best_rate(best_of(keys), loss.EXTRA_RATES + 1))
    for seed, key in itertools.product(session.seeds(), best):
        bits(key, seed)
    for length, key in itertools.product(longer, best):
        bits(key._replace(length=length), first)
    if session.quick:
        return
    if data is None:
        for key in best:
            bits(key._replace(language=text.ENGLISH), first)
    larger = [best_of([key._replace(size=LARGER_SIZE, lr=rate) for rate in (key.lr / 2, key.lr)]) for key in best]
    for seed, key in itertools.product(session.seeds(), larger):
        bits(key, seed)


def seconds(key: RunKey, tokens: int, vocabulary: int) -> float:
    """Estimate for one thread: training, held-out text in windows at each evaluation, and the whole test at the end."""
    passes = 2 if key.model == models.LLAMA else 1  # the Llama's windows overlap
    reading = sum(HELD_OUT.values()) * len(EVALUATION_POINTS) + HELD_OUT["test"] * passes
    reading = min(reading, tokens)  # for a quick run
    phases = ((tokens, True), (reading, False))
    return SECONDS[key.model] * sum(
        estimate(key.size, key.length, key.model, count, key.length, training=training, vocabulary=vocabulary)
        for count, training in phases
    )


def work(
    scratch: Path, *, size: str, length: int, model: str, optimizer: str, lr: float, rows: int, tokens: int, vocabulary: int,
    data: list[str] | None, seed: int, language: str = text.PYTHON,
) -> dict[str, Any]:  # fmt: skip
    folder = scratch.parent if language == text.PYTHON else scratch.parent / language
    corpus = text.tokens(folder, vocabulary, data, language)
    net = models.build(model, config(size, length, corpus.tokenizer.vocab_size), length // 2, seed)
    carries = model != models.LLAMA

    def evaluation() -> dict[str, Any]:
        held_out = {"validation": corpus.validation, "test": corpus.test}
        return {
            part: bits_per_byte(net, documents, [length], PIECE)[str(length)] for part, documents in held_out.items()
        }

    recipe = Recipe(tokens=tokens, rows=rows, length=length, lr=lr, optimizer=optimizer)
    reading = dict(seed=seed, carries=carries, start=corpus.tokenizer.start, context_length=2 * length)
    result = train_on_text(net, recipe, corpus.train, scratch, evaluation=evaluation, **reading)
    whole = bits_per_byte(net, corpus.test, ["all"], PIECE if carries else length // 2)
    return result | {"whole": whole["all"], "parameters": net.num_parameters(), "text": corpus.facts}


def window_bits(result: dict[str, Any], part: str = "test", point: float = EVALUATION_POINTS[-1]) -> float | None:
    """Bits per byte in windows of a row; None if a loss was not finite."""
    return result.get("looks", {}).get(f"{point:g}", {}).get(part)


FIGURES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "test": window_bits,
    "test, half": lambda result: window_bits(result, point=0.5),
    "test, a quarter": lambda result: window_bits(result, point=0.25),
    "test, whole documents": lambda result: result["whole"],
    "validation": lambda result: window_bits(result, "validation"),
    "training, nats a token": lambda result: result["train_loss"],
}


def figures(results: list[dict[str, Any]], pick: Callable[[dict[str, Any]], Any]) -> dict[RunKey, list[float]]:
    """Figures of the seeds, by key."""
    found: dict[RunKey, list[float]] = {}
    for content in results:
        key = RunKey(**{name: value for name, value in content["settings"].items() if name in RunKey._fields})
        found.setdefault(key, []).append(loss.as_figure(pick(content["result"])))
    return dict(sorted(found.items(), key=lambda item: (item[0].language != text.PYTHON, item)))


def chosen_keys(results: list[dict[str, Any]]) -> dict[tuple[str, int, str], RunKey]:
    """By size, length and model, the key with the most seeds, and of several the best."""
    found = figures(results, FIGURES["validation"])
    best_last = sorted(found, key=lambda key: (len(found[key]), -found[key][0]))
    return {(key.size, key.length, key.model): key for key in best_last if key.language == text.PYTHON}


def verdicts(results: list[dict[str, Any]]) -> dict[str, str]:
    keys = chosen_keys(results)
    shapes = sorted({key[:2] for key in keys} | {(SIZE, min(ROWS))})
    by_comparison = {}
    for name, pick in FIGURES.items():
        found = figures(results, pick)
        for size, length in shapes:
            ours, theirs = (found.get(keys.get((size, length, model)), []) for model in loss.MODELS)
            by_comparison[f"{size}, rows of {length}, {name}"] = verdict.decide_lower(ours, theirs)
    return {"claim": by_comparison[f"{SIZE}, rows of {min(ROWS)}, {next(iter(FIGURES))}"], **by_comparison}


def table(results: list[dict[str, Any]]) -> list[str]:
    keys = chosen_keys(results).values()
    parameters = {(c["settings"]["size"], c["settings"]["model"]): c["result"]["parameters"] for c in results}
    found = [figures(results, pick) for pick in FIGURES.values()]
    lines = ["Bits per byte, in windows of a row except for whole documents.", ""]
    lines.append(f"| text | row | model | parameters | optimizer, rate | seeds | {' | '.join(FIGURES)} |")
    lines.append("|" + " --- |" * (6 + len(FIGURES)))
    for key in found[0]:
        rate = f"{key.optimizer}, {key.lr:g}" + (", chosen" if key in keys else "")
        count, seeds = f"{parameters[key.size, key.model]:,}", str(len(found[0][key]))
        cells = [key.language, str(key.length), key.model, count, rate, seeds]
        lines.append("| " + " | ".join([*cells, *(verdict.spread(by_key[key]) for by_key in found)]) + " |")
    return lines


def plot(results: list[dict[str, Any]], figure: Any) -> None:
    for axes, length in zip(figure.subplots(1, len(ROWS), sharey=True), ROWS, strict=True):
        for model in loss.MODELS:
            key = chosen_keys(results).get((SIZE, length, model))
            points = {
                point: figures(results, lambda result: window_bits(result, point=point)).get(key, [])
                for point in EVALUATION_POINTS
            }
            means = [statistics.fmean(values) for values in points.values() if values]
            axes.plot([*EVALUATION_POINTS][: len(means)], means, color=models.COLOURS[model], label=model)
            for point, values in points.items():
                axes.plot([point] * len(values), values, ".", color=models.COLOURS[model])
        axes.set(title=f"rows of {length} tokens", xlabel="part of the run", ylabel="test, bits per byte")
        axes.set_xticks(EVALUATION_POINTS)
        axes.legend()
