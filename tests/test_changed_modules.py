"""Blocks in one call: what somebody has changed runs as changed, layer by layer."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from test_blocks_few_rows import INPLACE, Calls, block_and_state, decode
from test_model import TINY, tiny_model, tokens_of

import megalodon_ops as mo

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def taken_out(model, name, instead):
    """Something that is no module comes in the place of one."""
    module = getattr(model, name)
    delattr(model, name)
    setattr(model, name, instead(module))


def with_dropout(block):
    block.train()
    block.mega.config = dataclasses.replace(block.mega.config, attention_dropout=0.5)


class OtherLinear(torch.nn.Linear):
    pass


def replaced(block):
    other = OtherLinear(*reversed(block.mega.wz.weight.shape))
    other.load_state_dict(block.mega.wz.state_dict())
    block.mega.wz = other


def wrapped(block):
    block.nffn.fc2.forward = block.nffn.fc2.forward


def added(block):
    block.mega.adapter = torch.nn.Identity()


@pytest.mark.parametrize(
    "change",
    [
        lambda block: block.mega.wv.register_forward_hook(lambda module, args, y: None),
        lambda block: block.nffn.register_forward_pre_hook(lambda module, args: None),
        replaced,
        wrapped,
        added,
        with_dropout,
    ],
    ids=["hook", "pre-hook", "replaced", "wrapped", "added", "dropout"],
)
def test_what_was_changed_runs_as_changed(change):
    block, state = block_and_state()
    expected, calls = decode(block, state)
    change(block)
    found, none = decode(block, state)
    assert (calls, none) == (1, 0)
    if change is not with_dropout:
        torch.testing.assert_close(found, expected)


def as_attribute(module, name, tensor):
    delattr(module, name)
    setattr(module, name, tensor)


def as_buffer(module, name, tensor):
    delattr(module, name)
    module.register_buffer(name, tensor)


@pytest.mark.parametrize("become", [as_attribute, as_buffer])
@pytest.mark.parametrize(
    "name", ["mega.wv.bias", "mega.wz.weight", "mega.gamma", "mega.rmsnorm.weight", "nffn.norm.bias"]
)
def test_parameters_that_have_become_something_else(name, become, monkeypatch):
    block, state = block_and_state()
    path, _, last = name.rpartition(".")
    become(block.get_submodule(path), last, block.get_parameter(name).detach() + 1)
    check_layers_run(block, state, monkeypatch)


def test_a_module_that_has_become_a_function(monkeypatch):
    block, state = block_and_state()
    taken_out(block.mega, "rmsnorm", lambda norm: lambda x: norm(x) + 1)
    check_layers_run(block, state, monkeypatch)


def test_a_patched_class(monkeypatch):
    block, state = block_and_state()
    forward = mo.layers.LayerNorm.forward
    monkeypatch.setattr(mo.layers.LayerNorm, "forward", lambda self, x: forward(self, x) + 1)
    check_layers_run(block, state, monkeypatch)


def check_layers_run(block, state, monkeypatch):
    found, calls = decode(block, state)
    monkeypatch.setattr(mo.blocks, "_run_in_one_call", lambda *args, **options: None)
    expected, _ = decode(block, state)
    assert calls == 0
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_modules_and_parameters_go_by_name():
    """Those that were taken out and put back come last in their module's dictionaries."""
    block, state = block_and_state()
    expected, _ = decode(block, state)
    for module, name in ((block.mega, "wv"), (block.mega.wz, "weight"), (block.mega, "gamma"), (block.nffn, "norm")):
        taken = getattr(module, name)
        delattr(module, name)
        setattr(module, name, taken)
    found, calls = decode(block, state)
    assert calls == 1
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.embed.register_forward_hook(lambda module, args, x: x + 1),
        lambda model: setattr(model.embed, "max_norm", 0.5),
        lambda model: setattr(model.output.final_norm, "eps", 0.1),
        lambda model: setattr(model.layers[1].mega.rmsnorm, "eps", 0.1),
        lambda model: setattr(model, "layers", model.layers[::-1]),
        lambda model: model.layers.append(model.layers[0]),
        lambda model: taken_out(model, "layers", lambda layers: list(layers)[::-1]),
        lambda model: taken_out(model, "embed", lambda embed: lambda tokens: embed(tokens) + 1),
        lambda model: setattr(model, "config", dataclasses.replace(model.config, scale_emb=True)),
    ],
    ids=[
        "hook",
        "renormalised",
        "eps of the final norm",
        "eps of a block",
        "reversed",
        "more layers",
        "list",
        "function",
        "config",
    ],
)
def test_a_changed_model_runs_as_changed(change, monkeypatch):
    model, tokens = tiny_model(torch.float32).eval(), tokens_of(1, 6)

    def logits():
        with torch.no_grad(), Calls() as calls:
            _, state = model(tokens, return_state=True)
            return model(tokens[:, :1], state=state, return_state=True)[0], calls.count

    before, calls = logits()
    change(model)
    found, _ = logits()
    assert calls == 1 and not torch.equal(found, before)
    monkeypatch.setattr(mo.blocks, "_run_in_one_call", lambda *args, **options: None)
    expected, _ = logits()
    assert torch.equal(found, expected)


def test_biases_may_come_and_go(monkeypatch):
    block, state = block_and_state()
    block.mega.wz.bias = None
    block.mega.wh2.bias = torch.nn.Parameter(torch.randn(TINY["model_dim"]))
    found, calls = decode(block, state)
    monkeypatch.setattr(mo.blocks, "_run_in_one_call", lambda *args, **options: None)
    expected, none = decode(block, state)
    assert (calls, none) == (1, 0)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_model_with_a_hooked_block_calls_its_hook():
    model, tokens, seen = tiny_model(torch.float32).eval(), tokens_of(1, 6), []
    with torch.no_grad():
        _, state = model(tokens, return_state=True)
        model.layers[1].register_forward_hook(lambda module, args, out: seen.append(out))
        with Calls() as calls:
            model(tokens[:, :1], state=state, **INPLACE)
    assert len(seen) == 1 and calls.count == TINY["num_layers"]


def hook_output(linear, seen):
    linear.register_forward_hook(lambda module, args, y: seen.append(y))


def wrap_output(linear, seen):
    forward = linear.forward
    linear.forward = lambda x: seen.append(x) or forward(x)


@pytest.mark.parametrize("change", [wrap_output, hook_output])
def test_a_changed_output_runs_as_changed(change):
    model, tokens, seen = tiny_model(torch.float32).eval(), tokens_of(1, 6), []
    with torch.no_grad():
        _, state = model(tokens, return_state=True)
        change(model.output.output, seen)
        with Calls() as calls:
            model(tokens[:, :1], state=state, **INPLACE)
    assert len(seen) == 1 and calls.count == TINY["num_layers"]
