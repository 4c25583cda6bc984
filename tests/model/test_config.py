"""The configuration: valid fields, and the parameters of its model."""

import json
import math

import pytest
import torch

import megalodon_ops as mo
from models import TINY

PARAMETERS = {
    "small": 8_799_936,
    "mega200M": 220_627_968,
    "mega1.3B": 1_342_832_640,
    "mega1.3B_pg19": 1_327_628_288,
    "mega7.1B": 7_117_381_632,
    "mega7.3B": 7_385_817_088,
    "paper7B": 7_385_817_088,
}


def test_preset_parameter_counts():
    presets = {name: mo.MegalodonConfig.preset(name, vocab_size=32000) for name in mo.MegalodonConfig.presets()}
    assert {name: config.num_parameters() for name, config in presets.items()} == PARAMETERS
    with torch.device("meta"):
        assert mo.Megalodon(presets["mega200M"]).num_parameters() == PARAMETERS["mega200M"]


SWITCHES = ("norm_affine", "swiglu", "rescale_nffn", "share_emb")


@pytest.mark.parametrize(
    "enabled", [[name for i, name in enumerate(SWITCHES) if bits >> i & 1] for bits in range(16)], ids="-".join
)
def test_shapes_without_the_model(enabled):
    config = mo.MegalodonConfig(**TINY, **{name: name in enabled for name in SWITCHES})
    with torch.device("meta"):
        model = mo.Megalodon(config)
    assert [(name, tuple(p.shape)) for name, p in model.named_parameters()] == list(config.parameter_shapes())
    assert model.num_parameters() == config.num_parameters()


def test_parameters_of_a_model_too_large_for_any_machine():
    largest = 2**31 - 1
    config = mo.MegalodonConfig(num_layers=largest, model_dim=2**30, z_dim=2**30, cema_ndim=largest)
    assert config.num_parameters() > 2 * 2**30 * largest**2


def test_config_round_trip_and_released_fields():
    config = mo.MegalodonConfig.preset("mega7.3B", dropout=0.1)
    assert mo.MegalodonConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert mo.MegalodonConfig.from_dict({"num_layers": 3, "efficient_attn": None}).num_layers == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_layers": 0}, "`num_layers` must be a positive integer"),
        ({"num_layers": 1.5}, "`num_layers` must be a positive integer"),
        ({"num_layers": True}, r"`num_layers` must be a positive integer below 2\^31, got True"),
        ({"num_layers": 2**64}, r"`num_layers` must be a positive integer below 2\^31, got 18446744073709551616"),
        ({"num_layers": 10**5000}, "`num_layers` must be .* got an integer of 16610 bits"),
        ({"chunk_size": float("nan")}, "`chunk_size` must be a positive integer"),
        ({"vocab_size": [1] * 10**6}, "`vocab_size` must be .* got a list of 1000000"),
        ({"output_size": True}, "`output_size` must be a positive integer of at most vocab_size = 32000, or -1"),
        ({"output_size": "-1"}, "`output_size` must be a positive integer"),
        ({"swiglu": "no"}, "`swiglu` must be True or False, got 'no'"),
        ({"share_emb": 1}, "`share_emb` must be True or False, got 1"),
        ({"norm_affine": None}, "`norm_affine` must be True or False, got None"),
        ({"norm_eps": math.inf}, "`norm_eps` must be at least 0 and finite in float32, got inf"),
        ({"norm_eps": 1e39}, "`norm_eps` must be at least 0 and finite in float32"),
        ({"norm_eps": math.nan}, "`norm_eps` must be at least 0"),
        ({"norm_eps": "1e-5"}, "`norm_eps` must be at least 0 and finite in float32, got '1e-5'"),
        ({"rope_base": math.inf}, "`rope_base` must be positive or None, and finite"),
        ({"rope_base": True}, "`rope_base` must be positive or None"),
        ({"dropout": "0.5"}, "`dropout` must be a probability .* got '0.5'"),
        ({"dropout": False}, "`dropout` must be a probability"),
        ({"hidden_dropout": math.nan}, "`hidden_dropout` must be a probability"),
        ({"init_mode": "he\nbert"}, r"`init_mode` must be \"he\", got 'he\\nbert'"),
        ({"init_mode": None}, "`init_mode`"),
        ({"model_dim": "64"}, "`model_dim` must be a positive integer"),
        ({"rope_base": 0.0}, "`rope_base` must be positive or None"),
        ({"output_size": 0}, "`output_size` must be a positive integer"),
        ({"output_size": -5}, "`output_size` must be a positive integer"),
        ({"vocab_size": 9, "output_size": 10}, "`output_size` must be a positive integer of at most vocab_size = 9"),
        ({"dropout": 1.0}, "`dropout` must be a probability"),
        ({"z_dim": 6, "num_heads": 2}, "`z_dim` must be a multiple of 2"),
        ({"value_dim": 5, "num_heads": 2}, "`value_dim` must be a multiple"),
        ({"norm_num_groups": 7}, "`norm_num_groups` must be a divisor"),
        ({"init_mode": "bert"}, "`init_mode`"),
        ({"share_emb": True, "output_size": 5}, "`output_size`"),
        (
            {"eos_token_id": 32000},
            r"`eos_token_id` must be a token that the model can predict, in \[0, 32000\), or None",
        ),
        (
            {"vocab_size": 5, "output_size": 4, "eos_token_id": 4},
            r"`eos_token_id` must be .* in \[0, 4\), or None, got 4",
        ),
    ],
)
def test_wrong_config_raises(fields, message):
    with pytest.raises(ValueError, match=message):
        mo.MegalodonConfig(**fields)


def test_unknown_config_field_and_preset_raise():
    with pytest.raises(ValueError, match="unknown field 'widht'"):
        mo.MegalodonConfig.from_dict({"widht": 3})
    with pytest.raises(ValueError, match="`values` must be a dictionary"):
        mo.MegalodonConfig.from_dict([("num_layers", 3)])
    with pytest.raises(ValueError, match="`name` must be one of"):
        mo.MegalodonConfig.preset("mega3B")
