"""`save_official`: folders for `load_official`, the released code and megalodon-jax."""

import json

import pytest
import torch
from golden import DATA, MODEL, golden_model
from models import SAVED, tiny_model, tokens_of
from safetensors.torch import load_file

import megalodon_ops as mo

FILES = ["config.json", "consolidate_config.json", "consolidated.pth"]


def model_of(config, dtype=torch.float32):
    return tiny_model(dtype, **{"num_heads": 4, **SAVED[config]}).eval()


@pytest.mark.parametrize("config", SAVED)
def test_round_trip(tmp_path, config):
    model = model_of(config)
    mo.save_official(model, tmp_path / "m")
    loaded = mo.load_official(tmp_path / "m")
    assert loaded.config == model.config and not loaded.training
    found, wanted = loaded.state_dict(), model.state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert torch.equal(loaded(tokens_of(1, 20)), model(tokens_of(1, 20)))
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == FILES


@pytest.mark.parametrize("dtype, name", [(torch.float32, "fp32"), (torch.bfloat16, "bf16"), (torch.float16, "fp16")])
def test_round_trip_of_dtypes(tmp_path, dtype, name):
    """Linear layers are written in the model's dtype, wide parameters in float32."""
    model = model_of("shared", dtype)
    mo.save_official(model, tmp_path / "m")
    loaded = mo.load_official(tmp_path / "m", dtype=dtype)
    assert all(torch.equal(one, other) for one, other in zip(loaded.parameters(), model.parameters(), strict=True))
    fields = json.loads((tmp_path / "m" / "consolidate_config.json").read_text())
    assert fields == {"model_parallel_size": 1, "dtype": name}


def test_names_shapes_dtypes_and_buffers_are_the_released_codes(tmp_path):
    """Compare with the state dict of a model of the released code."""
    model, _ = golden_model()
    mo.save_official(model.float(), tmp_path / "m")
    found = torch.load(tmp_path / "m" / "consolidated.pth", weights_only=True)
    wanted = load_file(DATA / "official_c_state.safetensors")
    assert {n: (t.shape, t.dtype) for n, t in found.items()} == {n: (t.shape, t.dtype) for n, t in wanted.items()}
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    fields = {**MODEL["config"]}
    del fields["efficient_attn"]  # None there: the released code's default
    assert config == {"model": fields, "tokenizer": {"path": None}}


def test_a_shared_embedding_is_written_once(tmp_path):
    model = mo.Megalodon(mo.MegalodonConfig(**{**model_of("shared").config.to_dict(), "vocab_size": 10_000}))
    mo.save_official(model, tmp_path / "m")
    found = torch.load(tmp_path / "m" / "consolidated.pth", weights_only=True)
    assert torch.equal(found["output.output.weight"], found["embed.weight"])
    assert (tmp_path / "m" / "consolidated.pth").stat().st_size < 1.5 * model.embed.weight.nbytes


def test_float64_models_are_refused(tmp_path):
    with pytest.raises(ValueError, match="^save_official: `model` must be torch.float32, .* got torch.float64"):
        mo.save_official(tiny_model(torch.float64), tmp_path / "m")


def test_a_folder_with_other_files_is_not_changed(tmp_path):
    model = model_of("plain")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="^save_official: `directory` must be a new folder or a checkpoint"):
        mo.save_official(model, tmp_path / "m")


def test_weights_of_several_ranks_are_replaced(tmp_path):
    model = model_of("plain")
    mo.save_official(model, tmp_path / "m")
    for rank in range(2):
        (tmp_path / "m" / f"consolidated.{rank:02d}.pth").write_bytes(b"of a rank")
    (tmp_path / "m" / "tokenizer.model").write_bytes(b"of somebody")
    mo.save_official(model, tmp_path / "m")
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == [*FILES, "tokenizer.model"]
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["tokenizer"] == {"path": str(tmp_path / "m" / "tokenizer.model")}
    assert mo.load_official(tmp_path / "m").config == model.config


@pytest.mark.parametrize("config", SAVED)
def test_megalodon_jax_reads_it_and_computes_the_same(tmp_path, config):
    """It loads the folder strictly, computes the same logits, and exports what `load_official` reads."""
    pytest.importorskip("megalodon_jax")
    import jax
    import numpy
    from megalodon_jax.config import MegalodonConfig
    from megalodon_jax.convert import export_upstream_state_dict, load_upstream_checkpoint

    model = model_of(config)
    mo.save_official(model, tmp_path / "m")
    fields = {name: value for name, value in model.config.to_dict().items() if name in MegalodonConfig.__annotations__}
    other = load_upstream_checkpoint(tmp_path / "m", MegalodonConfig(**fields), key=jax.random.PRNGKey(0))
    tokens = tokens_of(2, 24)
    logits = numpy.asarray(other(jax.numpy.asarray(tokens.numpy()))[0])
    numpy.testing.assert_allclose(logits, model(tokens).detach().numpy(), atol=2e-5)

    (tmp_path / "back").mkdir()
    torch.save(export_upstream_state_dict(other), tmp_path / "back" / "consolidated.pth")
    (tmp_path / "back" / "config.json").write_text(json.dumps({"model": model.config.to_dict(), "tokenizer": {}}))
    back = mo.load_official(tmp_path / "back")
    assert all(torch.equal(one, two) for one, two in zip(back.parameters(), model.parameters(), strict=True))
