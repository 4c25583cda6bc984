"""Configuration, initialisation, and loading of released checkpoints."""

import json
import math

import pytest
import torch

import megalodon_ops as mo
from test_model import TINY, tiny_model, tokens_of

PARAMETERS = {
    "mega200M": 220_627_968,
    "mega1.3B": 1_342_832_640,
    "mega1.3B_pg19": 1_327_628_288,
    "mega7.1B": 7_117_381_632,
    "mega7.3B": 7_385_817_088,
    "paper7B": 7_385_817_088,
}


@pytest.mark.parametrize("name", mo.MegalodonConfig.presets())
def test_preset_parameter_counts(name):
    with torch.device("meta"):
        model = mo.Megalodon(mo.MegalodonConfig.preset(name, vocab_size=32000))
    assert model.num_parameters() == PARAMETERS[name]


def test_config_round_trip_and_released_fields():
    config = mo.MegalodonConfig.preset("mega7.3B", dropout=0.1)
    assert mo.MegalodonConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert mo.MegalodonConfig.from_dict({"num_layers": 3, "efficient_attn": None}).num_layers == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_layers": 0}, "`num_layers` must be a positive integer"),
        ({"num_layers": 1.5}, "`num_layers` must be a positive integer"),
        ({"model_dim": "64"}, "`model_dim` must be a positive integer"),
        ({"rope_base": 0.0}, "`rope_base` must be positive or None"),
        ({"output_size": 0}, "`output_size` must be a positive integer or -1"),
        ({"output_size": -5}, "`output_size` must be a positive integer or -1"),
        ({"dropout": 1.0}, "`dropout` must be a probability"),
        ({"z_dim": 6, "num_heads": 2}, "`z_dim` must be a multiple of 2"),
        ({"value_dim": 5, "num_heads": 2}, "`value_dim` must be a multiple"),
        ({"norm_num_groups": 7}, "`norm_num_groups` must be a divisor"),
        ({"init_mode": "bert"}, "`init_mode`"),
        ({"share_emb": True, "output_size": 5}, "`output_size`"),
    ],
)
def test_wrong_config_raises(fields, message):
    with pytest.raises(ValueError, match=message):
        mo.MegalodonConfig(**fields)


def test_unknown_config_field_and_preset_raise():
    with pytest.raises(ValueError, match="unknown field widht"):
        mo.MegalodonConfig.from_dict({"widht": 3})
    with pytest.raises(ValueError, match="preset must be one of"):
        mo.MegalodonConfig.preset("mega3B")


def test_initialisation():
    torch.manual_seed(0)
    config = mo.MegalodonConfig(
        num_layers=2, model_dim=512, z_dim=64, value_dim=256, ffn_hidden_dim=256, rescale_nffn=True
    )
    model = mo.Megalodon(config)
    mega, nffn = model.layers[1].mega, model.layers[1].nffn
    assert mega.wv.weight.std().item() == pytest.approx(1 / math.sqrt(3 * 512), rel=0.02)
    assert model.embed.weight.std().item() == pytest.approx(512**-0.5, rel=0.02)
    assert model.embed.weight.abs().max() <= 3 * 512**-0.5
    assert mega.cema.alpha.std().item() == pytest.approx(0.2, rel=0.05)
    assert mega.cema.omega.abs().max() <= 1 and mega.cema.omega.std().item() == pytest.approx(0.25, rel=0.1)
    assert mega.cema.gamma[..., 0].std().item() == pytest.approx(1, rel=0.05) and not mega.cema.gamma[..., 1].any()
    angles = torch.sigmoid(mega.cema.theta.double()).flatten().sort(descending=True).values
    expected = torch.exp(-torch.arange(1, 513, dtype=torch.float64) * math.log(512) / 512)
    torch.testing.assert_close(angles, expected, rtol=1e-4, atol=0)
    assert torch.equal(nffn.alpha, torch.full((512,), 0.05))
    for offsets in (
        mega.gamma,
        mega.beta,
        mega.timenorm.weight,
        mega.timenorm.bias,
        mega.rmsnorm.weight,
        nffn.norm.weight,
    ):
        assert not offsets.any()


def test_cema_coefficients_follow_their_formula():
    layer = mo.ComplexEMA(5, ndim=3).double()
    p, q, gamma, omega = layer.coefficients()
    for d in range(5):
        for n in range(3):
            alpha, delta = torch.sigmoid(layer.alpha[d, n, 0]), torch.sigmoid(layer.delta[d, n, 0])
            angle = (n + 1) * torch.sigmoid(layer.theta[d, 0, 0]).item() * 2 * math.pi / 3
            expected = (1 - alpha * delta).item() * complex(math.cos(angle), math.sin(angle))
            assert p[d, n].item() == pytest.approx(alpha.item(), rel=1e-14)
            assert q[d, n].item() == pytest.approx(expected, rel=1e-13)
            assert gamma[d, n].item() == pytest.approx(complex(*layer.gamma[d, n].tolist()) / math.sqrt(3), rel=1e-13)
    assert torch.equal(omega, layer.omega[:, 0])


def test_meta_initialisation_then_reset():
    with torch.device("meta"):
        model = mo.Megalodon(mo.MegalodonConfig(**TINY))
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert model(tokens_of(1, 9)).isfinite().all()


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
