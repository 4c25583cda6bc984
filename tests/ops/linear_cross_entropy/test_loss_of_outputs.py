"""Megalodon.loss with a modified output module is the cross-entropy of the model's logits."""

import pytest
import torch
import torch.nn.functional as F
from models import TINY, tiny_model, tokens_of
from torch import nn
from torch.nn.utils import parametrize

from megalodon_ops.ops.linear_cross_entropy import linear_cross_entropy as loss
from megalodon_ops.model.layers import Linear, is_plain_linear

B, L, V, D = 3, 45, TINY["vocab_size"], TINY["model_dim"]


class Adapter(nn.Module):
    """A low-rank adapter that replaces a layer, as in fine-tuning libraries."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.down, self.up = nn.Linear(D, 4, bias=False).double(), nn.Linear(4, V, bias=False).double()

    def forward(self, x):
        return self.layer(x) + self.up(self.down(x))


class Gain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((V, 1), 1.5, dtype=torch.float64))

    def forward(self, weight):
        return self.gain * weight


class Doubling(nn.Parameter):
    """A weight whose products count twice."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **(kwargs or {}))
        return 2 * result if function is F.linear else result


def add_adapter(output):
    output.output = Adapter(output.output)


def add_gain(output):
    parametrize.register_parametrization(output.output, "weight", Gain())


def add_hook(output):
    output.output.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
    output.output.register_forward_hook(lambda module, args, logits: module.scale * logits)


def add_pre_hook(output):
    output.output.register_forward_pre_hook(lambda module, args: (args[0].tanh(),))


def add_backward_hook(output):
    output.output.register_full_backward_hook(lambda module, dx, dy: (3 * dx[0],))


def patch_forward(output):
    forward = output.output.forward
    output.output.forward = lambda x: forward(x).tanh()


def double_weight(output):
    output.output.weight = Doubling(output.output.weight.detach())


def add_bias(output):
    weight = output.output.weight
    output.output = Linear(D, V).double()
    output.output.weight = weight
    nn.init.normal_(output.output.bias)


CHANGES = [add_adapter, add_gain, add_hook, add_pre_hook, add_backward_hook, patch_forward, double_weight, add_bias]


def loss_and_gradients(function, model, **options):
    found = function(**options)
    scales = torch.linspace(-1, 2, found.numel(), dtype=found.dtype).reshape(found.shape) if found.dim() else 1
    model.zero_grad()
    (found * scales).sum().backward()
    return found.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("columns", "reduction"), [(L, "mean"), (7, "sum"), (7, "none")])
@pytest.mark.parametrize("change", CHANGES)
def test_is_the_cross_entropy_of_the_logits(change, columns, reduction, monkeypatch):
    monkeypatch.setattr(loss, "_CPU_BLOCK", B * V * columns)
    model, tokens, targets = tiny_model(), tokens_of(B, L), tokens_of(B, L + 1)[:, 1:].clone()
    targets[0, 3:19] = -100
    plain = model.loss(tokens, targets, reduction=reduction)
    change(model.output)

    def expected(reduction):
        return F.cross_entropy(model(tokens).transpose(1, 2), targets, reduction=reduction)

    wanted, grads = loss_and_gradients(expected, model, reduction=reduction)
    found, found_grads = loss_and_gradients(lambda **o: model.loss(tokens, targets, **o), model, reduction=reduction)
    assert change is add_backward_hook or not torch.allclose(wanted, plain)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found_grads, grads, rtol=1e-9, atol=1e-11)
    with torch.no_grad():
        torch.testing.assert_close(model.loss(tokens, targets, reduction=reduction), wanted, rtol=1e-12, atol=1e-12)


def test_only_an_unmodified_output_is_plain(monkeypatch):
    assert is_plain_linear(tiny_model().output.output) and is_plain_linear(Linear(3, 4))
    for change in CHANGES:
        model = tiny_model()
        change(model.output)
        assert is_plain_linear(model.output.output) == (change is add_bias)  # the caller checks the bias
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, y: None)
    assert is_plain_linear(Linear(3, 4))  # a global hook changes nothing
    handle.remove()
    monkeypatch.setattr(Linear, "forward", lambda self, x: x)
    assert not is_plain_linear(Linear(3, 4))


def test_a_changed_output_holds_the_logits_of_one_block(monkeypatch):
    """The forward saves no logits for the backward; the backward holds those of one block at a time."""
    columns = 7
    monkeypatch.setattr(loss, "_CPU_BLOCK", B * V * columns)
    model = tiny_model()
    add_adapter(model.output)
    model.output.output.register_forward_hook(lambda module, args, logits: sizes.append(tuple(logits.shape)))
    kept, sizes = [], []
    tokens, targets = tokens_of(B, L), tokens_of(B, L + 1)[:, 1:]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        found = model.loss(tokens, targets)
    assert not [shape for shape in kept if shape[-1:] == (V,) and shape.numel() > V]
    found.backward()
    blocks = [(B, min(columns, L - start), V) for start in range(0, L, columns)]
    assert sizes == blocks + blocks[::-1]


def test_no_targets_and_wrong_reductions():
    model = tiny_model(torch.float32)
    add_adapter(model.output.float())
    model.output.float()
    tokens, none = tokens_of(2, 5), torch.full((2, 5), -100)
    found = model.loss(tokens, none)
    found.backward()
    assert found.isnan() and not any(p.grad.any() for p in model.parameters() if p.grad is not None)
    with pytest.raises(ValueError, match="linear_cross_entropy: `reduction` must be"):
        model.loss(tokens, none, reduction="max")
