"""`save_official`: what `load_official`, the released code and megalodon-jax read."""

import json

import pytest
import torch
from golden import DATA, MODEL, golden_model
from models import tiny_model, tokens_of
from safetensors.torch import load_file

import megalodon_ops as mo

CONFIGS = {
    "plain": {}, "gated, rescaled": dict(swiglu=True, rescale_nffn=True, scale_emb=True), "shared": dict(share_emb=True),
    "no affine norms, fewer outputs": dict(norm_affine=False, output_size=29),
    "other base": dict(rope_base=1e5, norm_eps=1e-3),
}  # fmt: skip


def model_of(config, dtype=torch.float32):
    return tiny_model(dtype, **{"num_heads": 4, **CONFIGS[config]}).eval()


@pytest.mark.parametrize(
    ("config", "shards"), [*((config, 4) for config in CONFIGS), ("plain", 1), ("shared", 1), ("gated, rescaled", 2)]
)
def test_round_trip(tmp_path, config, shards):
    model = model_of(config)
    mo.save_official(model, tmp_path / "m", shards=shards)
    loaded = mo.load_official(tmp_path / "m")
    assert loaded.config == model.config and not loaded.training
    found, wanted = loaded.state_dict(), model.state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert torch.equal(loaded(tokens_of(1, 20)), model(tokens_of(1, 20)))
    names = ["consolidated.pth"] if shards == 1 else [f"consolidated.{rank:02d}.pth" for rank in range(shards)]
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == [
        "config.json",
        "consolidate_config.json",
        *names,
    ]


@pytest.mark.parametrize("dtype, name", [(torch.float32, "fp32"), (torch.bfloat16, "bf16"), (torch.float16, "fp16")])
def test_round_trip_of_dtypes(tmp_path, dtype, name):
    """The linear layers are written in the model's dtype, the parameters that stay wide in float32."""
    model = model_of("shared", dtype)
    mo.save_official(model, tmp_path / "m", shards=2)
    loaded = mo.load_official(tmp_path / "m", dtype=dtype)
    assert all(torch.equal(one, other) for one, other in zip(loaded.parameters(), model.parameters(), strict=True))
    assert json.loads((tmp_path / "m" / "consolidate_config.json").read_text()) == {
        "model_parallel_size": 2, "dtype": name,
    }  # fmt: skip


def test_names_shapes_dtypes_and_buffers_are_the_released_codes(tmp_path):
    """Compared with the state dict of a model that the released code made."""
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


def test_buffers_of_a_rank(tmp_path):
    """A rank has its groups' part of the norms' beginnings, and all rotary frequencies."""
    mo.save_official(model_of("plain"), tmp_path / "m", shards=2)
    part = torch.load(tmp_path / "m" / "consolidated.01.pth", weights_only=True)
    assert part["output.final_norm.prior_mean"].shape == part["layers.1.mega.timenorm.prior_logv"].shape == (2,)
    assert part["output.final_norm.prior_count"].shape == () and part["rope.freqs"].shape == (2,)


def test_a_shared_embedding_is_written_once(tmp_path):
    model = mo.Megalodon(mo.MegalodonConfig(**{**model_of("shared").config.to_dict(), "vocab_size": 10_000}))
    mo.save_official(model, tmp_path / "m")
    found = torch.load(tmp_path / "m" / "consolidated.pth", weights_only=True)
    assert torch.equal(found["output.output.weight"], found["embed.weight"])
    assert (tmp_path / "m" / "consolidated.pth").stat().st_size < 1.5 * model.embed.weight.nbytes


@pytest.mark.parametrize(
    "options, shards, message",
    [
        ({}, 4, "`shards` must divide num_heads = 2, got 4"),
        ({"num_heads": 8}, 8, "`shards` must divide norm_num_groups = 4, got 8"),
        ({"num_heads": 4, "ffn_hidden_dim": 42}, 4, "`shards` must divide ffn_hidden_dim = 42, got 4"),
        ({}, 100, "`shards` must be an integer from 1 to 99, got 100"),
        ({}, 0, "`shards` must be an integer from 1 to 99, got 0"),
    ],
)
def test_shards_that_no_ranks_have(tmp_path, options, shards, message):
    with pytest.raises(ValueError, match=f"^save_official: {message}"):
        mo.save_official(tiny_model(torch.float32, **options), tmp_path / "m", shards=shards)
    assert not list(tmp_path.iterdir())


def test_models_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="^save_official: `model` must be torch.float32, .* got torch.float64"):
        mo.save_official(tiny_model(torch.float64), tmp_path / "m")


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    model = model_of("plain")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="^save_official: `directory` must be a new folder or a checkpoint"):
        mo.save_official(model, tmp_path / "m")


def test_another_number_of_shards_replaces(tmp_path):
    model = model_of("plain")
    mo.save_official(model, tmp_path / "m", shards=4)
    (tmp_path / "m" / "tokenizer.model").write_bytes(b"of somebody")
    mo.save_official(model, tmp_path / "m", shards=2)
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == [
        "config.json", "consolidate_config.json", "consolidated.00.pth", "consolidated.01.pth", "tokenizer.model",
    ]  # fmt: skip
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["tokenizer"] == {"path": str(tmp_path / "m" / "tokenizer.model")}
    assert mo.load_official(tmp_path / "m").config == model.config


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("shards", [1, 4])
def test_megalodon_jax_reads_it_and_computes_the_same(tmp_path, config, shards):
    """Where megalodon-jax is installed: its strict loader takes the folder, its logits agree, and what it exports is ours."""
    pytest.importorskip("megalodon_jax")
    import jax
    import numpy
    from megalodon_jax.config import MegalodonConfig
    from megalodon_jax.convert import export_upstream_state_dict, load_upstream_checkpoint

    model = model_of(config)
    mo.save_official(model, tmp_path / "m", shards=shards)
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
