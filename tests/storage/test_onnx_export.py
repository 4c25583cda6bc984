"""ONNX files: onnxruntime computes the model's logits from them, by single tokens and by pieces; what is refused."""

import json

import numpy as np
import pytest
import torch
from models import tiny_model, tokens_of

import megalodon_ops as mo
from megalodon_ops.storage.onnx_export import export_onnx


def fresh(folder, rows):
    """Names of the inputs, and the state of new sequences."""
    state = json.loads((folder / "config.json").read_text())["state"]
    return ["tokens", *(x["name"] for x in state)], [np.zeros([rows, *x["shape"][1:]], x["dtype"]) for x in state]


@pytest.mark.slow  # torch's exporter takes a minute
def test_files_compute_the_models_logits(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model, tokens = tiny_model(torch.float32, num_layers=1, share_emb=True, scale_emb=True).eval(), tokens_of(3, 27)
    export_onnx(model, tmp_path / "out")
    step, prompt = (onnxruntime.InferenceSession(tmp_path / "out" / f"{name}.onnx") for name in ("step", "prompt"))
    names, state = fresh(tmp_path / "out", 3)
    logits = []
    for piece in tokens.split([1, 5, 8, 1, 2, 1, 7, 1, 1], 1):
        session = step if piece.shape[1] == 1 else prompt
        y, *state = session.run(None, dict(zip(names, [piece.numpy(), *state], strict=True)))
        logits.append(torch.from_numpy(y))
    torch.testing.assert_close(torch.cat(logits, 1), model(tokens), rtol=0, atol=1e-4)


def test_refused_models(tmp_path):
    model = tiny_model(torch.float32)
    for wrong, text in (
        (mo.quantize(model, "int8"), "must not be quantised"),
        (tiny_model(torch.float32, visible_chunks=2), "`visible_chunks` must be 1"),
        (tiny_model(torch.float32, num_features=3), "`num_features` must be None"),
    ):
        with pytest.raises(ValueError, match=text):
            export_onnx(wrong, tmp_path / "out")
    with pytest.raises(ValueError, match="`dtype` must be torch.float32 or torch.float16"):
        export_onnx(model, tmp_path / "out", dtype=torch.bfloat16)
    model.layers[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="no hooks, got one on `layers.0`"):
        export_onnx(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
