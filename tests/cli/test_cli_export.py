"""`export`: the files that it writes, the page, and what it refuses."""

import json

import pytest
import torch
from command_line import error_of, output
from models import TINY, tiny_model

import megalodon_ops as mo
from megalodon_ops.storage import onnx_export
from megalodon_ops.tokenizers import ByteTokenizer

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def without_exporter(monkeypatch):
    """torch's exporter takes half a minute; tests of storage run it."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    monkeypatch.setattr(onnx_export, "_export", lambda path, *_: path.write_bytes(b"program"))


def test_a_run(finished, tmp_path, capsys, without_exporter):
    out, page, dist = tmp_path / "out", tmp_path / "page", tmp_path / "dist"
    assert f"written: {out}" in output(capsys, "export", "--checkpoint", finished, "--out", out)
    assert {path.name for path in out.iterdir()} >= {"step.onnx", "prompt.onnx", "README.md", "tokenizer.json"}
    config = json.loads((out / "config.json").read_text())
    assert config["tokenizer"] == {"start": 256, "end": 256} and config["state"][0]["name"] == "count"
    web = ["export", "--checkpoint", finished, "--web", page]
    assert "from `dist` of the npm package onnxruntime-web: ort.wasm.min.js, " in output(capsys, *web)
    dist.mkdir()
    for name in onnx_export.RUNTIME:
        (dist / name).write_bytes(name.encode())
    for flags in (["--onnxruntime-web", dist], []):  # the second time, the files are there
        shown = output(capsys, *web, *flags)
        assert "copy into" not in shown
        assert f"python -m http.server --directory {page}" in shown
        assert all((page / name).read_bytes() == name.encode() for name in onnx_export.RUNTIME)


def test_models_without_text(tmp_path, capsys, without_exporter):
    encoder = mo.MegalodonEncoder(mo.MegalodonEncoderConfig(**TINY))
    for name, model in (("encoder", encoder), ("numbers", tiny_model(torch.float32, num_features=2))):
        model.save(tmp_path / name)
        output(capsys, "export", "--checkpoint", tmp_path / name, "--out", tmp_path / "out" / name)
        error = error_of(capsys, "export", "--checkpoint", tmp_path / name, "--web", tmp_path / "page")
        assert "`web` must be False for an encoder or a model of numbers" in error
    names = {path.name for path in (tmp_path / "out" / "encoder").iterdir()}
    assert names == {"encoder.onnx", "config.json", "README.md"}


def test_refused(finished, tmp_path, capsys):
    mo.quantize(tiny_model(torch.float32), "int8").save(tmp_path / "small", tokenizer=ByteTokenizer())
    for flags, error in (
        (["--checkpoint", finished], "--out, --web: one of them must name the folder to write"),
        (["--checkpoint", finished, "--out", "a", "--web", "b"], "--out, --web: one of them"),
        (["--checkpoint", finished, "--out", "a", "--onnxruntime-web", tmp_path], "--onnxruntime-web: needs --web"),
        (["--checkpoint", tmp_path / "none", "--out", "a"], "none: no such folder"),
        (["--checkpoint", tmp_path / "small", "--out", tmp_path / "a"], "must have floating-point weights, got int8"),
        (["--checkpoint", finished, "--web", tmp_path / "a", "--onnxruntime-web", tmp_path], "got no ort.wasm.min.js"),
    ):
        assert error in error_of(capsys, "export", *flags)
    assert not (tmp_path / "a").exists()
