"""Models with quantised linear layers, by a tool or by a program, train and decode with these layers."""

import copy
import pickle

import pytest
import torch
from models import tiny_model, tokens_of

import megalodon_ops as mo
from megalodon_ops.model.layers import Linear, is_plain_linear


def test_linear_layers_are_of_torch_s_class():
    """Their forward and initialisation are ours and use the layer's own weights, also in a copy."""
    torch.manual_seed(0)
    for layer in (*linear_layers(tiny_model(torch.float32)).values(), Linear(30, 50), Linear(30, 50, token_rows=True)):
        for copied in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert type(copied) is torch.nn.Linear and is_plain_linear(copied)
            before = layer.weight.clone()
            torch.nn.init.zeros_(copied.weight)
            assert copied(torch.ones(1, copied.in_features)).equal(copied(torch.zeros(1, copied.in_features)))
            copied.reset_parameters()
            std = copied.in_features**-0.5 if copied.token_rows else (3 * copied.in_features) ** -0.5
            assert copied.weight.std().item() == pytest.approx(std, rel=0.2)
            assert layer.weight.equal(before) == (copied is not layer)
    assert not is_plain_linear(copy.copy(layer)) and not is_plain_linear(torch.nn.Linear(3, 5))


def linear_layers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}


def assert_works(model: mo.Megalodon, quantised: mo.Megalodon) -> None:
    """Assert that its logits are near the model's, but not equal, and that its loss and decoder agree with them."""
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
    """Assert that results differ by no more than the rounding of weights, and perhaps of activations, to int8."""
    assert (found - expected).square().mean().sqrt() < 0.05 * expected.std()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*deprecated:UserWarning")
@pytest.mark.skipif("fbgemm" not in torch.backends.quantized.supported_engines, reason="needs torch's int8 kernels")
def test_dynamic_quantisation_by_torch():
    """torch quantises `nn.Linear`, but no subclass."""
    model = tiny_model(torch.float32).eval()
    quantised = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear})
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
    assert {type(layer) for layer in layers.values()} == {torch.nn.Linear}
    assert all(type(layer.weight) is not torch.nn.Parameter for layer in layers.values())
    assert_works(model, quantised)


class Int8WithAdapter(torch.nn.Module):
    """A frozen linear layer in int8, one scale a row, and a trained product of low rank beside it."""

    def __init__(self, linear: torch.nn.Linear, rank: int = 2) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())
        self.down = torch.nn.Linear(linear.in_features, rank, bias=False)
        self.up = torch.nn.Linear(rank, linear.out_features, bias=False)
        torch.nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight * self.scale, self.bias) + self.up(self.down(x))

    def merged(self) -> Linear:
        weight = self.weight * self.scale + self.up.weight @ self.down.weight
        layer = Linear(*reversed(weight.shape), bias=self.bias is not None)
        layer.weight = torch.nn.Parameter(weight.detach())
        if self.bias is not None:
            layer.bias = torch.nn.Parameter(self.bias)
        return layer


def test_wrapped_int8_layers_train_and_decode():
    """The loss falls through frozen int8 layers, decoding has the layers' bits, merging changes nothing."""
    model, tokens = tiny_model(torch.float32, dropout=0.0), tokens_of(4, 25)
    model.requires_grad_(False)
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    for name in names:
        model.set_submodule(name, Int8WithAdapter(model.get_submodule(name)))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.01)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        value = model.loss(tokens[:, :-1], tokens[:, 1:])
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < 0.8 * losses[0]
    assert len(trained) == 2 * len(names) and all(parameter.grad.any() for parameter in trained)

    model.eval()
    with torch.no_grad():
        _, state = model(tokens_of(2, 5), return_state=True)
    with pytest.warns(UserWarning, match=f"Decoder: `layers.0.mega.wv`, the first of {len(names)} such modules, is"):
        decoder = mo.Decoder(model, state)
    assert not decoder.fused
    found, past = [], state
    with torch.no_grad():
        for token in tokens_of(2, 6).split(1, 1):
            found.append(decoder(token))
            expected, past = model(token, state=past, return_state=True)
            assert found[-1].equal(expected)
    for name in names:
        model.set_submodule(name, model.get_submodule(name).merged())
    decoder = mo.Decoder(model, state)
    assert decoder.fused
    for logits, token in zip(found, tokens_of(2, 6).split(1, 1)):
        torch.testing.assert_close(decoder(token), logits, rtol=1e-4, atol=1e-4)
