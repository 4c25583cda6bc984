"""Folders in the format of the released code: what is read, and what is refused."""

import json

import pytest
import torch

import megalodon_ops as mo
from test_model import tiny_model, tokens_of


def save_released(model, directory, shards=1, **config):
    """Writes what the released code writes, buffers to drop included."""
    weights = {**model.state_dict(), "rope.freqs": torch.zeros(4), "output.final_norm.prior_count": torch.tensor(0)}
    dim_1 = ("embed.weight", "mega.gamma", "mega.beta", "wh2.weight", "fc2.weight", "output.output.weight")
    whole = ("rmsnorm.weight", "nffn.norm.weight", "nffn.norm.bias", "rope.freqs", "prior_count", "nffn.alpha")
    for rank in range(shards):
        part = {}
        for name, value in weights.items():
            dim = None if name.endswith(whole) else 1 if name.endswith(dim_1) else 0
            part[name] = value if dim is None else value.chunk(shards, dim)[rank].clone()
        torch.save(part, directory / ("consolidated.pth" if shards == 1 else f"consolidated.{rank:02d}.pth"))
    (directory / "config.json").write_text(json.dumps({"model": {**model.config.to_dict(), **config}, "tokenizer": {}}))
    (directory / "consolidate_config.json").write_text(json.dumps({"model_parallel_size": shards, "dtype": "fp32"}))


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_load_official(tmp_path, shards):
    model = tiny_model(torch.float32, rescale_nffn=True, swiglu=True)
    save_released(model, tmp_path, shards)
    loaded = mo.load_official(tmp_path)
    assert loaded.config == model.config and not loaded.training
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert torch.equal(loaded(tokens_of(1, 20)), model.eval()(tokens_of(1, 20)))


def test_load_official_in_bfloat16_and_shared_embedding(tmp_path):
    save_released(tiny_model(torch.float32, share_emb=True), tmp_path, vocab_size=-1)
    loaded = mo.load_official(tmp_path, dtype=torch.bfloat16)
    assert loaded.output.output.weight is loaded.embed.weight and loaded.embed.weight.dtype == torch.bfloat16
    assert loaded.layers[0].mega.cema.alpha.dtype == torch.float32
    loaded(tokens_of(1, 5)).sum().backward()


def test_load_official_errors(tmp_path):
    with pytest.raises(FileNotFoundError):
        mo.load_official(tmp_path)
    model = tiny_model(torch.float32)
    save_released(model, tmp_path)
    (tmp_path / "consolidate_config.json").write_text('{"model_parallel_size": 2}')
    with pytest.raises(ValueError, match="expected 2 shards"):
        mo.load_official(tmp_path)
    save_released(model, tmp_path, num_layers=3)
    with pytest.raises(ValueError, match="missing parameters: layers.2"):
        mo.load_official(tmp_path)
    save_released(model, tmp_path, ffn_hidden_dim=41)
    with pytest.raises(ValueError, match="fc1.weight` must have shape"):
        mo.load_official(tmp_path)
    save_released(model, tmp_path, shards=2)
    part = torch.load(tmp_path / "consolidated.01.pth", weights_only=True)
    torch.save({k: v for k, v in part.items() if k != "layers.0.mega.wv.weight"}, tmp_path / "consolidated.01.pth")
    with pytest.raises(ValueError, match=r"`layers.0.mega.wv.weight` must be .*, got none in consolidated.01.pth"):
        mo.load_official(tmp_path)
    torch.save({k: v for k, v in part.items() if k != "embed.weight"}, tmp_path / "consolidated.00.pth")
    torch.save({k: v for k, v in part.items() if k != "embed.weight"}, tmp_path / "consolidated.01.pth")
    with pytest.raises(ValueError, match="missing parameters: embed.weight"):
        mo.load_official(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="`config.json` must hold an object `model`, got None"):
        mo.load_official(tmp_path)


def test_load_official_never_unpickles_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("owned",))

    save_released(tiny_model(torch.float32), tmp_path)
    torch.save({"embed.weight": Evil()}, tmp_path / "consolidated.pth")
    with pytest.raises(Exception, match="[Ww]eights.only"):
        mo.load_official(tmp_path)
