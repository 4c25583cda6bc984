"""Claim of the encoder: labels that another program also finds, equal sizes, a run from end to end."""

import itertools
import re
import statistics
import textwrap
from functools import partial
from pathlib import Path

import numpy
from paths import DOCS
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from bench import plain_models  # noqa: E402
from bench.claims import encoder, long_rows, runs  # noqa: E402

RESULTS = Path(encoder.__file__).with_name("results") / "encoder.jsonl"

# Tokens as Python code, whose value is a tuple of one number.
PYTHON = {1 + digit: f"{digit}," for digit in range(10)}
PYTHON |= {11: "min([", 12: "max([", 13: "med([", 14: "sm([", 15: "]),"}
FUNCTIONS = {"med": lambda v: int(statistics.median(v)), "sm": lambda v: sum(v) % 10}


def rng():
    return numpy.random.default_rng(0)


@pytest.mark.parametrize("longest", [20, 2000])
def test_listops_have_the_value_that_python_finds(longest):
    tokens, lengths, labels = long_rows.listops(rng(), 20, longest)
    for row, length, label in zip(tokens.tolist(), lengths.tolist(), labels.tolist(), strict=True):
        assert longest / 4 < length <= longest and not any(row[length:])
        assert eval("".join(PYTHON[token] for token in row[:length]), FUNCTIONS) == (label,)


def pieces(picture):
    """Connected sets of lit pixels; they touch by sides or corners."""
    left = {tuple(pixel) for pixel in numpy.argwhere(picture).tolist()}
    found = []
    while left:
        piece = set()
        edge = [left.pop()]
        while edge:
            y, x = edge.pop()
            piece.add((y, x))
            around = {(y + v, x + u) for v in (-1, 0, 1) for u in (-1, 0, 1)} & left
            left -= around
            edge += around
        found.append(piece)
    return found


def test_pathfinder_has_one_piece_with_both_dots_or_two(monkeypatch):
    """Each picture is drawn twice: as it is, and without gaps, so that a curve is one connected piece."""
    dashed, _, labels = long_rows.pathfinder(rng(), 40)
    monkeypatch.setattr(long_rows, "picture", partial(long_rows.picture, dash=long_rows.CURVE_LENGTH + 1))
    solid, _, solid_labels = long_rows.pathfinder(rng(), 40)
    assert torch.equal(labels, solid_labels) and 10 < labels.sum() < 30
    for pixels, thinned, same in zip(solid, dashed, labels.tolist(), strict=True):
        found = pieces(pixels.view(long_rows.SIDE, -1).numpy())
        assert len(found) == 2 and len(pieces(thinned.view(long_rows.SIDE, -1).numpy())) > 4
        square = {(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)}
        dots = [any({(y + v, x + u) for v, u in square} <= piece for y, x in piece) for piece in found]
        assert sum(dots) == (1 if same else 2)


def test_curves_stay_apart_from_others_and_from_themselves(monkeypatch):
    monkeypatch.setattr(long_rows, "BEND", 0.8)
    random = rng()
    for _ in range(20):
        found = long_rows.curves(random)
        pixels = [(c, i, y, x) for c, curve in enumerate(found) for i, (y, x) in enumerate(curve)]
        for (c, i, y, x), (d, j, v, u) in itertools.combinations(pixels, 2):
            near = max(abs(y - v), abs(x - u)) < long_rows.MIN_DISTANCE
            assert not near or (c == d and abs(i - j) <= 2 * long_rows.MIN_DISTANCE)


@pytest.mark.parametrize("longest", [4000, long_rows.RATE])
def test_words_are_recognized_by_their_second_formants(longest):
    sounds, lengths, labels = long_rows.words(rng(), 60, longest)
    assert sounds.shape == (60, longest, 1) and (lengths == longest).all()
    power = torch.fft.rfft(sounds[..., 0]).abs().square()
    hertz = torch.fft.rfftfreq(longest, 1 / long_rows.RATE)
    second = torch.tensor([high for _, high in long_rows.VOWELS.values()])[:, None]
    loudness = power @ ((hertz / second - 1).abs() < 0.06).float().T  # (60, vowels)
    vowels = [*long_rows.VOWELS]
    heard = [tuple(vowels[i] for i in sorted(pair)) for pair in loudness.topk(2).indices.tolist()]
    right = [long_rows.WORDS[label] == pair for label, pair in zip(labels.tolist(), heard, strict=True)]
    assert statistics.fmean(right) > 0.9 and len({*labels.tolist()}) == len(long_rows.WORDS)


@pytest.mark.parametrize("task", encoder.TASKS)
def test_both_models_have_as_many_parameters(task):
    spec = encoder.TASKS[task]
    ours, theirs = (sum(p.numel() for p in encoder.build(spec, model).parameters()) for model in encoder.MODELS)
    assert abs(theirs / ours - 1) < 0.005


@pytest.mark.parametrize("patch", [1, 4])
def test_the_transformer_does_not_see_padding(patch):
    config = encoder.TASKS["words"].config
    model = plain_models.TransformerEncoder(config, patch=patch)
    x, lengths = torch.randn(2, 40, 1), torch.tensor([40, 24])
    unpadded = model(x[1:, :24], lengths=lengths[1:])
    torch.testing.assert_close(model(x, lengths=lengths)[1:], unpadded, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("task", encoder.TASKS)
def test_rows_grow_to_full_length(task):
    spec = encoder.TASKS[task]._replace(sample=lambda random, count, longest: (count, longest))
    batches = [spec.examples(rng(), progress) for progress in (0.0, 0.3, encoder.GROWTH_PART, 0.99)]
    lengths = [longest for _, longest in batches]
    assert lengths == sorted(lengths) and lengths[0] == spec.first_length and lengths[2:] == [spec.max_length] * 2
    assert all(1 <= rows <= 256 and rows * longest <= spec.batch for rows, longest in batches)


def test_the_tutorial_shows_its_commands_output():
    run = runs.results(RESULTS)["listops megalodon seed=0"]
    assert run["settings"]["steps"] == encoder.TASKS["listops"].steps
    text = (DOCS / "tutorials" / "long-rows.md").read_text()
    assert textwrap.indent(encoder.summary(run["result"], run["settings"]["asked"]), "    ") in text


@pytest.mark.parametrize("model", encoder.MODELS)
def test_a_run_from_end_to_end(model, monkeypatch, capsys):
    monkeypatch.setitem(encoder.TASKS, "listops", encoder.TASKS["listops"]._replace(num_evaluated=2))
    encoder.main(["--task", "listops", "--model", model, "--steps", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == [f"step {step} of 3" for step in (1, 2, 3)]
    pattern = r"right about (\d+)\.0% of 2 rows of up to ([\d,]+) positions; .*"
    shares, lengths = zip(*(re.fullmatch(pattern, line).groups() for line in lines[3:6]))
    assert lengths == ("128", "512", "2,000") and {*shares} <= {"0", "50", "100"}
    assert re.fullmatch(r"17\d,\d{3} parameters, \d+ s of processor time", lines[6])
