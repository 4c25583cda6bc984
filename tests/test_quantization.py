"""Models whose linear layers a tool has quantised: they compute with those layers, in decoding as in training's loss."""

from __future__ import annotations

import copy

import pytest
import torch
from models import tiny_model, tokens_of

import megalodon_ops as mo
from megalodon_ops.model.layers import Linear


def linear_layers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}


def assert_works(model: mo.Megalodon, quantised: mo.Megalodon) -> None:
    """The quantised model gives other logits, but not by much, and its loss, generation and decoder are of its logits."""
    tokens = tokens_of(2, 20)
    with torch.no_grad():
        expected, logits = model(tokens), quantised(tokens)
        assert not logits.equal(expected)
        assert_near(logits, expected)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        torch.testing.assert_close(quantised.loss(tokens, tokens), loss, rtol=1e-5, atol=0)
        _, state = quantised(tokens[:, :15], return_state=True)
        with pytest.warns(UserWarning, match="Decoder: `"):
            decoder = mo.Decoder(quantised, state)
        assert not decoder.fused
        assert_near(torch.cat([decoder(token) for token in tokens[:, 15:].split(1, 1)], 1), logits[:, 15:])
        with pytest.warns(UserWarning, match="Decoder: `"):
            assert quantised.generate(tokens, max_new_tokens=3, temperature=0).shape == (2, 23)


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    """The results are steps of int8 apart; activations, too, may be quantised, by the largest of a call."""
    assert (found - expected).square().mean().sqrt() < 0.05 * expected.std()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*deprecated:UserWarning")
@pytest.mark.skipif("fbgemm" not in torch.backends.quantized.supported_engines, reason="needs torch's int8 kernels")
def test_dynamic_quantisation_by_torch():
    """It looks for exactly `nn.Linear`."""
    model = tiny_model(torch.float32).eval()
    changed = copy.deepcopy(model)
    for layer in linear_layers(changed).values():
        layer.__class__ = torch.nn.Linear
    torch.testing.assert_close(changed(tokens_of(2, 20)), model(tokens_of(2, 20)))
    quantised = torch.ao.quantization.quantize_dynamic(changed)
    assert not linear_layers(quantised)
    assert type(quantised.layers[0].mega.wv) is torch.ao.nn.quantized.dynamic.Linear
    assert_works(model, quantised)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*deprecated:UserWarning")
def test_int8_weights_by_torchao():
    quantization = pytest.importorskip("torchao.quantization")
    model = tiny_model(torch.float32).eval()
    quantised = copy.deepcopy(model)
    quantization.quantize_(quantised, quantization.Int8WeightOnlyConfig())
    layers = linear_layers(quantised)
    assert {type(layer) for layer in layers.values()} == {Linear}
    assert all(type(layer.weight) is not torch.nn.Parameter for layer in layers.values())
    assert_works(model, quantised)
