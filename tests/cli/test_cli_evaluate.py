"""`eval`: the table by context, and its JSON."""

import json

import pytest
import torch
from command_line import assert_refused, refusals

from megalodon_ops.cli import main
from megalodon_ops.cli.models import trained_model
from megalodon_ops.evaluation import evaluate

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def book(text, tmp_path_factory):
    """One document of 6,000 bytes."""
    path = tmp_path_factory.mktemp("book") / "book.txt"
    path.write_bytes(b"".join((text / f"{i}.py").read_bytes() for i in range(12)))
    return path


def run(capsys, *flags) -> list[str]:
    assert main(["eval", *map(str, flags)]) == 0
    said = capsys.readouterr()
    assert all("B/s" in part or not part.strip() for part in said.err.splitlines())
    return said.out.splitlines()


def test_a_table_by_context(finished, book, capsys):
    command = ["--checkpoint", finished, "--data", book, "--context", 16, "all", 100]
    title, head, *rows = run(capsys, *command)
    assert title.endswith("book.txt: 1 documents, 6,000 bytes; step 60")
    assert head.split("  ")[-1].strip() == "tokens" and "perplexity per byte" in head
    figures = {row.split()[0]: [float(cell.replace(",", "")) for cell in row.split()[1:]] for row in rows}
    assert list(figures) == ["16", "all", "100"]
    model = trained_model(finished, torch.device("cpu")).model
    document = [256, *book.read_bytes()]
    results = evaluate(model, [document], contexts=[16, "all", 100])
    for (bits, per_byte, per_token, tokens), expected in zip(figures.values(), results, strict=True):
        assert tokens == 6000 == expected.tokens and per_byte == per_token
        assert per_token == pytest.approx(expected.perplexity, abs=1e-4) == pytest.approx(2**bits, rel=1e-3)
    assert figures["16"][0] > figures["100"][0], "a trained model predicts better with more context"
    (_, line) = run(capsys, "--checkpoint", finished, "--data", book)
    assert line == f"{figures['all'][0]:.4f} bits per byte, perplexity {figures['all'][1]:.4f} per byte"


def test_json(finished, book, tmp_path, capsys):
    figures = tmp_path / "figures.json"
    run(capsys, "--checkpoint", finished, "--data", book, "--context", 7, "all", "--json", figures)
    content = json.loads(figures.read_text())
    assert content["checkpoint"] == str(finished) and content["documents"] == 1
    seven, whole = content["contexts"]
    assert (seven["context"], whole["context"]) == (7, "all")
    for result in content["contexts"]:
        assert result["tokens"] == result["num_bytes"] == sum(bin["tokens"] for bin in result["by_position"]) == 6000
        assert result["nats"] == pytest.approx(sum(bin["nats"] for bin in result["by_position"]))
    assert [bin["last"] for bin in seven["by_position"]] == [1, 2, 3, 4, 5, 6, 7]


@refusals("""
    eval --checkpoint {run} --context 0 => --context: must be a whole number >= 1, got '0'
    eval --checkpoint {run} --context most => --context: must be a whole number, or a word that --help names, got
    eval --checkpoint {run} --json {tmp}/none/x.json => --json {tmp}/none/x.json: no such folder: {tmp}/none
""")
def test_wrong_flags_are_reported_in_one_line_before_anything_is_computed(finished, tmp_path, capsys, command, words):
    assert_refused(capsys, command, words, run=finished, tmp=tmp_path)
