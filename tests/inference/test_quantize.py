"""`quantize`: a model with small weights computes, decodes, is saved and loaded as the model with the rounded weights."""

import json

import pytest
import torch
from assertions import every_case
from decoding import assert_bits_of_layers, by_decoder, by_layers, model_and_state
from models import tiny_model, tokens_of

import megalodon_ops as mo
from megalodon_ops import _C
from backends import each_isa, isa
from megalodon_ops.storage.files import FileError
from megalodon_ops.inference.quantized_layers import QuantizedEmbedding
from megalodon_ops.ops.quantized_linear.quantized_linear import dequantize, gains_from_rounding

VARIANTS = {
    "plain": {},
    "tied": dict(scale_emb=True, share_emb=True, swiglu=True),
    "memory, two chunks": dict(working_memory=True, visible_chunks=2, chunk_size=6),
    "wide": dict(model_dim=136, num_heads=2, z_dim=20, value_dim=50, ffn_hidden_dim=129, norm_num_groups=8),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
each_kind = pytest.mark.parametrize("kind", ["int8", "int4"])
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def rounded(model: mo.Megalodon, small: mo.Megalodon) -> mo.Megalodon:
    """`model` with the weights that the integers of `small` stand for."""
    values = dict(model.state_dict())
    for name, module in small.named_modules():
        if isinstance(module, (mo.QuantizedLinear, QuantizedEmbedding)):
            shape = values[f"{name}.weight"].shape
            values[f"{name}.weight"] = dequantize(module.weight, module.scale, shape[1], torch.float32)
    other = tiny_model(torch.float32, **model.config.to_dict())
    other.load_state_dict(values)
    return other.eval()


@each_kind
@pytest.mark.parametrize("variant", VARIANTS)
def test_computes_with_the_rounded_weights(kind, variant):
    model = tiny_model(torch.float32, **VARIANTS[variant]).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    small, tokens = mo.quantize(model, kind, activations=None), tokens_of(2, 20)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert small.quantization == kind and model.quantization is None and not small.training
    assert small.num_parameters() == model.num_parameters()
    with torch.no_grad():
        torch.testing.assert_close(small(tokens), rounded(model, small)(tokens), rtol=1e-4, atol=1e-4)
        error = (small(tokens) - model(tokens)).std() / model(tokens).std()
        assert 0 < error < (0.03 if kind == "int8" else 0.3)
        assert small(tokens[:, :0]).shape == (2, 0, small.config.num_outputs)
        losses = small.loss(tokens, tokens), torch.nn.functional.cross_entropy(small(tokens).mT, tokens)
        torch.testing.assert_close(*losses, rtol=1e-5, atol=0)


@each_kind
def test_activations_of_8_bits(kind, tmp_path):
    """Long calls round activations to 8 bits, short ones do not; folders keep the choice."""
    model = tiny_model(torch.float32).eval()
    kept, small = mo.quantize(model, kind, activations=None), mo.quantize(model, kind)
    tokens = tokens_of(2, 40)
    assert small.activations == "int8" and kept.activations is model.activations is None
    small.save(tmp_path)
    loaded = mo.Megalodon.load(tmp_path)
    assert loaded.activations == "int8"
    gains = gains_from_rounding(_C.active_isa())
    with torch.no_grad():
        assert torch.equal(small(tokens[:, :8]), kept(tokens[:, :8]))  # 16 tokens are few
        expected, (found, state) = kept(tokens), small(tokens, return_state=True)
        assert torch.equal(loaded(tokens), found) and torch.equal(found, expected) != gains
        assert (found - expected).std() < 0.05 * expected.std()
        assert mo.Decoder(small, state)(tokens[:, :1]).shape == (2, 1, small.config.num_outputs)
    fields = json.loads((tmp_path / "config.json").read_text())
    fields["quantization_config"]["activations"] = "int4"
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(FileError, match="`activations` must be None or \"int8\", got 'int4'"):
        mo.Megalodon.load(tmp_path)
    with pytest.raises(ValueError, match='quantize: `activations` must be None or "int8", got 8'):
        mo.quantize(model, kind, 8)


@each_isa
@each_kind
def test_decoder_has_the_bits_of_the_layers(name, kind):
    with isa(name), every_case() as each:
        for i, (variant, options) in enumerate(VARIANTS.items()):
            with each(variant):
                model, _ = model_and_state(DTYPES[i % 3], **options)
                small = mo.quantize(model, kind)
                _, state = small(tokens_of(3, 5), return_state=True)
                assert_bits_of_layers(small, state, rows=3)


def test_hooked_layers_are_called_by_the_decoder():
    small = mo.quantize(tiny_model(torch.float32), "int8")
    small.layers[1].mega.wv.register_forward_hook(lambda layer, inputs, y: y + 1)
    _, state = small(tokens_of(1, 5), return_state=True)
    with pytest.warns(UserWarning, match=r"Decoder: `layers\.1\.mega\.wv`"):
        decoder = mo.Decoder(small, state)
    tokens = [tokens_of(1, 1)]
    for found, expected in zip(by_decoder(decoder, tokens), by_layers(small, state, tokens), strict=True):
        assert torch.equal(found, expected)


@each_kind
@pytest.mark.parametrize("share_emb", [False, True])
def test_saved_as_small_weights_and_loaded(kind, share_emb, tmp_path):
    model = tiny_model(torch.bfloat16, share_emb=share_emb)
    small, tokens = mo.quantize(model, kind), tokens_of(2, 9)
    small.save(tmp_path / "small", max_shard_bytes=3000)
    config = json.loads((tmp_path / "small/config.json").read_text())
    expected = {"quant_method": "megalodon_ops", "kind": kind, "activations": "int8"}
    assert config["quantization_config"] == expected
    loaded = mo.Megalodon.load(tmp_path / "small")
    assert torch.equal(loaded(tokens), small(tokens)) and loaded.quantization == kind
    assert loaded.layers[0].mega.wv.weight.dtype == (torch.int8 if kind == "int8" else torch.uint8)
    assert (loaded.output.output.weight is loaded.embed.weight) is share_emb
    wide = mo.Megalodon.load(tmp_path / "small", dtype=torch.float32)
    assert wide.embed(tokens).dtype == torch.float32 and torch.equal(wide.embed.scale, small.embed.scale)


def test_folders_with_other_weights_are_refused(tmp_path):
    mo.quantize(tiny_model(torch.float32), "int8").save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    wrong = {
        "`layers.0.mega.wv.weight` must be torch.uint8": {"kind": "int4"},
        "a kind of int8, int4": {"kind": "int2"},
        'must have quant_method "megalodon_ops"': {"quant_method": "gptq"},
        "must be floating-point numbers": None,
    }
    with every_case() as each:
        for message, change in wrong.items():
            value = None if change is None else config["quantization_config"] | change
            (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": value}))
            with each(message), pytest.raises(FileError, match=message):
                mo.Megalodon.load(tmp_path)


@each_kind
def test_casts_leave_weights_and_scales(kind):
    small, tokens = mo.quantize(tiny_model(torch.float32), kind), tokens_of(1, 4)
    cast = mo.quantize(tiny_model(torch.float32), kind).to(torch.bfloat16)
    assert cast.embed(tokens).dtype == cast.layers[0].mega.wv.bias.dtype == torch.bfloat16
    for name, parameter in small.named_parameters():
        if name.endswith(("wv.weight", "scale")):
            assert torch.equal(cast.get_parameter(name), parameter), name
    assert cast.float()(tokens).isfinite().all()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(small(tokens).float(), cast(tokens).float(), rtol=0.1, atol=0.1)


def test_wrong_models_are_refused(tmp_path):
    model = tiny_model(torch.float32)
    small, broken = mo.quantize(model, "int8"), tiny_model(torch.float32)
    broken.layers[0].mega.wv.weight.data[0, 0] = torch.nan
    encoder = mo.MegalodonEncoder(mo.MegalodonEncoderConfig(**{**model.config.to_dict(), "eos_token_id": None}))
    wrong = [
        (TypeError, "`model` must be a Megalodon that is not parallel, got .*Encoder", encoder, "int8"),
        (ValueError, "`model` must have floating-point weights, got int8 weights", small, "int4"),
        (ValueError, "`model` must be float32, bfloat16 or float16, got float64", tiny_model(), "int8"),
        (ValueError, "`layers.0.mega.wv.weight` must be finite", broken, "int8"),
        (ValueError, '`kind` must be "int8" or "int4", got \'fp8\'', model, "fp8"),
    ]
    with every_case() as each:
        for error, message, wrong_model, kind in wrong:
            with each(message), pytest.raises(error, match=f"quantize: {message}"):
                mo.quantize(wrong_model, kind)
    with pytest.raises(ValueError, match="save_official: `embed.weight` must be a tensor of floating-point numbers"):
        mo.save_official(small, tmp_path / "official")


def test_training_is_refused():
    small, tokens = mo.quantize(tiny_model(torch.float32), "int8"), tokens_of(2, 9)
    with pytest.raises(NotImplementedError, match="quantized_linear: gradients are not supported"):
        small.loss(tokens, tokens).backward()
