"""Layers: initialisation, coefficients."""

import copy
import math
import pickle
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import megalodon_ops as mo
from models import TINY, tiny_model, tokens_of

normalized_qk_module = sys.modules["megalodon_ops.ops.normalized_qk.normalized_qk"]  # a function has the module's name


def test_initialisation():
    torch.manual_seed(0)
    config = mo.MegalodonConfig(
        num_layers=2, model_dim=512, z_dim=64, value_dim=256, ffn_hidden_dim=256, rescale_nffn=True, vocab_size=2000
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
    norms = mega.timenorm.weight, mega.timenorm.bias, mega.rmsnorm.weight, nffn.norm.weight
    assert not any(offsets.any() for offsets in (mega.gamma, mega.beta, *norms))


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


def rotary_of(model):
    return [layer.mega.rotary for layer in model.layers]


def test_the_rotary_table_is_the_layers_own():
    """A CUDA graph keeps the table's address, so the table must outlive those of other calls."""
    model = tiny_model()
    (first, *_) = rotary_of(model)
    address, values = first.data_ptr(), first.clone()
    affine = torch.zeros(2, 8)
    for base in range(2, 40):
        mo.normalized_qk(torch.ones(1, 8, 8), affine, affine, num_heads=1, chunk_size=8, rope_base=base)
    model.generate(tokens_of(1, 5), max_new_tokens=5)
    assert rotary_of(model)[0].data_ptr() == address
    assert torch.equal(rotary_of(model)[0], values)
    assert {name.split(".")[-1] for name, _ in model.named_buffers()} == {"rotary"}
    assert not any("rotary" in name for name in model.state_dict())


def test_a_layer_gives_its_rotary_table_to_the_op(monkeypatch):
    model, tokens = tiny_model(), tokens_of(2, 20)
    expected = model(tokens)
    monkeypatch.setattr(normalized_qk_module, "_shared_table", None)  # which an op without a table would call
    assert torch.equal(model(tokens), expected)
    for layer in model.layers:
        layer.mega.rotary = torch.ones_like(layer.mega.rotary)
    assert not torch.allclose(model(tokens), expected)


CASTS = {
    "cast": lambda model: model.to(torch.bfloat16),
    "widened": lambda model: model.to(torch.bfloat16).double(),
    "emptied": lambda model: model.to_empty(device="cpu"),
    "narrowed": lambda model: model.double().float(),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_a_rotary_table_is_exact_after_casts(cast):
    model = cast(mo.Megalodon(mo.MegalodonConfig(**TINY)))
    dtype = model.layers[0].mega.gamma.dtype
    angle = torch.arange(8).double()[:, None] * 10000.0 ** (-torch.arange(0, 8, 2).double() / 8)
    for table in rotary_of(model):
        assert table.dtype == dtype
        assert torch.equal(table, torch.stack((angle.cos(), angle.sin()), -1).to(dtype))


def test_a_model_from_the_meta_device_gets_its_rotary_table():
    model, tokens = tiny_model(torch.float32), tokens_of(2, 20)
    with torch.device("meta"):
        empty = mo.Megalodon(mo.MegalodonConfig(**TINY))
    assert all(table.is_meta for table in rotary_of(empty))
    empty.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(empty(tokens), model(tokens))
    assert all(table.is_cpu for table in rotary_of(empty))


def test_a_very_long_chunk_has_no_table_of_its_own():
    with torch.device("meta"):
        model = mo.Megalodon(mo.MegalodonConfig(**{**TINY, "chunk_size": 1 << 30}))
    assert rotary_of(model) == [None, None]
    model = tiny_model(chunk_size=1 << 30)
    assert torch.equal(model(tokens_of(1, 20)), tiny_model(chunk_size=32)(tokens_of(1, 20)))


def test_a_table_of_inference_mode_or_of_fake_tensors_is_not_shared():
    config = mo.MegalodonConfig(**{**TINY, "rope_base": 77.0})
    with FakeTensorMode():
        table = normalized_qk_module.rotary_table(8, 8, 77.0, torch.float32, torch.device("cpu"))
        assert isinstance(table, FakeTensor)
    with torch.inference_mode():
        mo.Megalodon(config)
    mo.Megalodon(config)(tokens_of(1, 5)).sum().backward()


@pytest.mark.parametrize("gradients", [True, False])
def test_functions_of_layers_refuse_wrong_arguments(gradients):
    x, weight = torch.ones(2, 3), torch.ones(4, 3)
    for call, match in (
        (lambda: mo.linear(x, weight, torch.ones(1)), r"`bias` .* \(4,\), got \(1,\)"),
        (lambda: mo.linear(x, weight, torch.ones(3)), r"`bias` .* \(4,\), got \(3,\)"),
        (lambda: mo.gated_silu(x.long()), "`x` must be floating point, got torch.int64"),
        (lambda: mo.gated_silu(x, x.long()), "`value` must be floating point"),
    ):
        with torch.set_grad_enabled(gradients), pytest.raises((TypeError, ValueError), match=match):
            call()


def test_halves_of_a_block_take_sizes():
    """A half of a block that is made from sizes equals one that is made from a configuration of these sizes."""
    sizes = dict(z_dim=8, value_dim=16, ffn_hidden_dim=24, chunk_size=4)
    x = torch.randn(2, 9, 24)
    attention, ffn = mo.NormalizedAttention, mo.NormalizedFFN
    for half, more in ((attention, {}), (attention, {"working_memory": True}), (ffn, {"swiglu": True})):
        config = mo.MegalodonConfig(model_dim=24, norm_num_groups=8, **sizes, **more)
        torch.manual_seed(0)
        by_sizes = half(24, **sizes, **more)
        torch.manual_seed(0)
        by_config = half(config)
        assert type(by_sizes) is type(by_config) and by_sizes.config == by_config.config
        assert torch.equal(by_sizes(x), by_config(x))
        message = rf"{half.__name__}: `z_dim` must be set in `config`, got it as an argument"
        with pytest.raises(TypeError, match=message):
            half(config, z_dim=8)
        with pytest.raises(TypeError, match=r"`zdim` must be left out, .*; did you mean z_dim\?"):
            half(24, zdim=8)
        with pytest.raises(ValueError, match="MegalodonConfig: `model_dim` must be a positive integer"):
            half(0)


@pytest.mark.parametrize("parts", [{"working_memory": True}, {"visible_chunks": 2}])
def test_a_subclass_of_the_attention_has_the_parts_of_its_configuration(parts):
    class Mine(mo.NormalizedAttention):
        pass

    x, sizes = torch.randn(2, 9, 24), dict(z_dim=8, value_dim=16, chunk_size=4)
    results = []
    for kind, fields in ((Mine, parts), (mo.NormalizedAttention, parts), (mo.NormalizedAttention, {})):
        torch.manual_seed(0)
        results.append(kind(24, **sizes, **fields)(x))
    own, expected, plain = results
    assert torch.equal(own, expected) and (expected - plain).abs().max() > 0.01


def test_layers_of_a_model_return_tensors_with_and_without_states():
    """A hook that adds to a layer's output, as for activation steering, works in a call that returns a state, too."""
    for fields in ({}, {"working_memory": True}, {"layerwise_ckpt": True}):
        model, tokens = tiny_model(**fields).train(), tokens_of(2, 12)
        for block in model.layers:
            for layer in (block, block.mega, block.nffn):
                layer.register_forward_hook(lambda _, inputs, output: output + 0.25)
            block.mega.timenorm.register_forward_hook(lambda _, inputs, output: output * 1.5)
        model.output.final_norm.register_forward_hook(lambda _, inputs, output: output * 1.5)
        expected = model(tokens)
        logits, state = model(tokens, return_state=True)
        assert torch.equal(logits, expected)
        first, state = model(tokens[:, :7], return_state=True)
        close = dict(atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(torch.cat([first, model(tokens[:, 7:], state=state)], 1), expected, **close)


def test_tools_can_wrap_the_forward_of_a_linear_layer():
    """compressed-tensors, on which llm-compressor stands, takes the stored forward apart and binds another one."""
    model, x = tiny_model().eval(), tokens_of(2, 9)
    expected, layer = model(x), model.layers[0].mega.wv
    assert type(layer) is torch.nn.Linear and layer.forward.__self__ is layer
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        own = copied.layers[0].mega.wv
        assert own.forward.__self__ is own and own.reset_parameters.__self__ is own
        assert torch.equal(copied(x), expected)
    original = layer.forward.__func__

    def wrapped(self, x):
        return 2 * original(self, x)

    layer.forward = wrapped.__get__(layer, type(layer))
    doubled = model(x)
    layer.forward = original.__get__(layer, type(layer))
    assert torch.equal(model(x), expected) and not torch.equal(doubled, expected)
