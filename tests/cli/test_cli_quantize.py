"""`quantize`: the folder that it writes, and the figures that it prints."""

import re

import pytest
import torch
from command_line import error_of, output
from models import tiny_model

from megalodon_ops import Megalodon, MegalodonState, quantize
from megalodon_ops.tokenizers import ByteTokenizer

pytestmark = pytest.mark.usefixtures("quick")


def test_a_run(finished, tmp_path, capsys):
    out = tmp_path / "small"
    shown = output(capsys, "quantize", finished, "--to", "int8", "--out", out, "--dtype", "bfloat16")
    figures = dict(re.findall(r"^ *(.+?)  +([\d.,]+ +[\d.,]+)", shown, re.M))
    assert [*figures] == ["megabytes", "bits per byte", "tokens a second"]  # of the model, and of the quantized one
    sizes, bits, speeds = ([float(n.replace(",", "")) for n in pair.split()] for pair in figures.values())
    assert 0.5 < sizes[1] / sizes[0] < 0.8 and 0 < abs(bits[1] / bits[0] - 1) < 0.01 and min(speeds) > 0
    small = Megalodon.load(out)
    assert (small.quantization, small.activations, small.embed.dtype) == ("int8", "int8", torch.bfloat16)
    output(capsys, "eval", "--checkpoint", out, "--data", __file__)
    output(capsys, "generate", "--checkpoint", out, "--tokens", 3)


def test_generate_keeps_keys_and_values_in_8_bits(finished, capsys, monkeypatch):
    dtypes = []
    fresh = MegalodonState.fresh

    def noted(*args, cache_dtype=None, **options):
        dtypes.append(cache_dtype)
        return fresh(*args, cache_dtype=cache_dtype, **options)

    monkeypatch.setattr(MegalodonState, "fresh", noted)
    output(capsys, "generate", "--checkpoint", finished, "--tokens", 3, "--cache-dtype", "int8")
    assert dtypes and {*dtypes} == {torch.int8}


def test_a_saved_model(tmp_path, capsys):
    model = tiny_model(torch.float32, vocab_size=257)
    model.save(tmp_path / "wide", tokenizer=ByteTokenizer())
    small = ["quantize", tmp_path / "wide", "--to", "int4", "--out", tmp_path / "small"]
    assert "bits per byte" not in output(capsys, *small, "--activations", "none")
    tokens = torch.tensor([[1, 2, 3]])
    loaded = Megalodon.load(tmp_path / "small")
    assert torch.equal(loaded(tokens), quantize(model, "int4")(tokens)) and loaded.activations is None
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"words": "to be or not to be"}\n')
    measured = [*small[:4], "--out", tmp_path / "measured", "--data", lines, "--field", "words"]
    assert f"%, {lines}" in output(capsys, *measured)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").touch()
    for out, run, error in (
        ("other", "wide", "`directory` must be a new folder or a checkpoint"),
        ("new", "small", "`model` must have floating-point weights, got int4 weights"),
        ("new", "none", "error: .*/none: no such folder"),
    ):
        command = ["quantize", tmp_path / run, "--to", "int4", "--out", tmp_path / out]
        assert re.search(error, error_of(capsys, *command))
    assert not (tmp_path / "new").exists()
