"""Blocks in one call: the bits of their layers, whatever the configuration. Changed modules: test_changed_modules.py."""

from __future__ import annotations

import pytest
import torch
from assertions import assert_refuses
from test_model import TINY, tiny_model, tokens_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import megalodon_ops as mo
from backends import ISAS, isa
from megalodon_ops import linear
from megalodon_ops.blocks_few_rows import blocks_few_rows_
from megalodon_ops.blocks import _run_block_in_one_call

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
VARIANTS = {
    "plain": {},
    "swiglu": dict(swiglu=True, rescale_nffn=True),
    "not affine": dict(norm_affine=False, cema_ndim=1),
    "wide": dict(
        model_dim=72, num_heads=3, z_dim=30, value_dim=51, ffn_hidden_dim=100, cema_ndim=17, norm_num_groups=8
    ),
}
INPLACE = dict(return_state=True, inplace_state=True)
pytestmark = pytest.mark.usefixtures("poisoned_memory")


class Calls(TorchDispatchMode):
    """Counts the calls of the op."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is blocks_few_rows_
        return func(*args, **(kwargs or {}))


def block_and_state(dtype=torch.float32, rows=1, seen=5, **overrides):
    """A block in evaluation mode and its state after some steps."""
    block = tiny_model(dtype, **overrides).eval().layers[0]
    with torch.no_grad():
        _, state = block(steps(block, rows, seen), return_state=True)
    return block, state


def steps(block, rows, length, seed=2):
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, length, block.mega.config.model_dim, generator=gen, dtype=torch.float64)
    return x.to(block.mega.wv.weight.dtype)


def decode(block, state, rows=1, length=1, times=1):
    """Outputs of a few calls, the state after them, and how many of them were one call."""
    state = tree_map_only(torch.Tensor, torch.clone, state)
    outputs = []
    with torch.no_grad(), Calls() as calls:
        for i in range(times):
            y, state = block(steps(block, rows, length, i), state=state, **INPLACE)
            outputs.append(y)
    return tree_leaves((outputs, state)), calls.count


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_it_gives_the_bits_of_the_layers(name, dtype, variant, monkeypatch):
    with isa(name):
        check_bits(monkeypatch, dtype, rows=3, length=1, **VARIANTS[variant])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "length"), [(1, 1), (2, 3), (1, 8), (8, 1)])
def test_it_gives_the_bits_of_the_layers_for_any_few_rows(dtype, rows, length, monkeypatch):
    check_bits(monkeypatch, dtype, rows, length)


@pytest.mark.parametrize(
    ("dtype", "rows", "length"), [(torch.float32, 15, 1), (torch.float32, 3, 4), (torch.float16, 32, 1)], ids=str
)
def test_it_gives_the_bits_of_the_layers_for_more_rows(dtype, rows, length, monkeypatch):
    check_bits(monkeypatch, dtype, rows, length)


def check_bits(monkeypatch, dtype, rows, length, **overrides):
    """Over more steps than a chunk has left, so that it begins anew."""
    block, state = block_and_state(dtype, rows, **overrides)
    found, calls = decode(block, state, rows, length, times=5)
    monkeypatch.setattr(mo.blocks, "_run_in_one_call", lambda *args, **options: None)
    expected, none = decode(block, state, rows, length, times=5)
    assert (calls, none) == (5, 0)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_generation_takes_it_and_other_calls_do_not():
    model, prompt = tiny_model(torch.float32).eval(), tokens_of(2, 11)
    with Calls() as calls:
        model.generate(prompt, max_new_tokens=4, temperature=0)
    assert calls.count == 3  # the last token is not read any more
    with torch.no_grad(), Calls() as calls:
        _, state = model(prompt[:, :1], return_state=True)
        model(prompt[:, :1], state=state)
    assert calls.count == 0


def test_the_state_is_written_in_place():
    block, state = block_and_state()
    before = tree_map_only(torch.Tensor, torch.clone, state)
    with torch.no_grad():
        _, after = block(steps(block, 1, 1), state=state, **INPLACE)
    assert all(a is b for a, b in zip(tree_leaves(after), tree_leaves(state), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(tree_leaves(before), tree_leaves(after), strict=True))


def test_a_backward_that_needs_the_state_before_raises():
    model, tokens = tiny_model(torch.float32).eval(), tokens_of(1, 6)
    _, state = model(tokens, return_state=True)
    state = state.detach()
    loss = model(tokens, state=state).sum()
    with torch.no_grad(), Calls() as calls:
        model(tokens[:, :1], state=state, **INPLACE)
    assert calls.count == 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("whole", [True, False], ids=["model", "block"])
def test_without_inplace_state_it_is_copied(whole, monkeypatch):
    model, tokens = tiny_model(torch.float32).eval(), tokens_of(2, 20)
    x = steps(model.layers[0], 2, 1)
    call = (lambda **state: model(tokens[:, :1], **state)) if whole else (lambda **state: model.layers[0](x, **state))
    with torch.no_grad():
        _, state = model(tokens[:, 1:], return_state=True)
        state = state if whole else state.layers[0]
        before = tree_map_only(torch.Tensor, torch.clone, state)
        with Calls() as calls:
            found = call(state=state, return_state=True)
        assert calls.count == 1
        for a, b in zip(tree_leaves(before), tree_leaves(state), strict=True):
            assert torch.equal(a, b)
        monkeypatch.setattr(mo.blocks, "_run_in_one_call", lambda *args, **options: None)
        expected = call(state=state, return_state=True)
    assert all(torch.equal(a, b) for a, b in zip(tree_leaves(found), tree_leaves(expected), strict=True))


def test_parameters_need_not_be_contiguous():
    block, state = block_and_state()
    expected, _ = decode(block, state)
    block.mega.wv.weight.data = block.mega.wv.weight.data.t().contiguous().t()
    block.mega.cema.alpha.data = block.mega.cema.alpha.data.repeat_interleave(2, 1)[:, ::2]
    assert not block.mega.wv.weight.is_contiguous()
    found, calls = decode(block, state)
    assert calls == 1
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_who_gets_the_layers(monkeypatch):
    block, state = block_and_state(seen=3)
    x = steps(block, 1, 1)

    def fits(x=x, state=state, **options):
        state = tree_map_only(torch.Tensor, torch.clone, state)
        return _run_block_in_one_call(block, x, state, **{"inplace_state": True} | options) is not None

    assert not fits()  # gradients
    with torch.no_grad():
        assert fits()
        most = linear.most_few_rows(x.dtype)
        assert fits(steps(block, 1, most)) and not fits(steps(block, 1, most + 1))
        assert not fits(x[:0])
        assert not fits(state=None) and fits(inplace_state=False)
        assert not fits(state=state._replace(norm=None)) and not fits(state=tuple(state))
        assert not fits(x[0])
        for residual in (None, state.norm.residual.transpose(0, 2).contiguous().transpose(0, 2)):
            assert not fits(state=state._replace(norm=state.norm._replace(residual=residual)))
        assert not fits(lengths=torch.tensor([1])) and not fits(cu_seqlens=torch.tensor([0, 1]))
        assert not fits(x.double())
        with torch.autocast("cpu", torch.bfloat16):
            assert not fits()
        handle = torch.nn.modules.module.register_module_forward_hook(lambda module, args, y: None)
        assert not fits()
        handle.remove()
        assert fits()
        monkeypatch.setattr(linear, "USES_KERNELS", False)
        assert not fits()


def test_opcheck_and_threads(two_threads):
    block, state = block_and_state(rows=2)
    args = captured(lambda: block(steps(block, 2, 1), state=tree_map_only(torch.Tensor, torch.clone, state), **INPLACE))
    torch.library.opcheck(blocks_few_rows_, args)
    first, _ = decode(block, state, rows=2, times=3)
    torch.set_num_threads(1)
    second, _ = decode(block, state, rows=2, times=3)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def captured(call):
    """The arguments that it gives the op."""
    taken = []

    class Take(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is blocks_few_rows_:
                taken.append(args)
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Take():
        call()
    return taken[0]


def test_errors():
    block, state = block_and_state(swiglu=True, rescale_nffn=True)
    x, parameters, tensors, y, *numbers = captured(lambda: block(steps(block, 1, 1), state=state, **INPLACE))

    def refuses(error, name, **changed):
        arguments = dict(x=x, parameters=parameters, state=tensors, y=y) | changed
        call = lambda: blocks_few_rows_(*arguments.values(), *numbers)  # noqa: E731
        assert_refuses(error, "blocks_few_rows", name, call)

    def instead(tensors, index, tensor):
        return [*tensors[:index], tensor, *tensors[index + 1 :]]

    for index, (name, tensor) in enumerate(zip(NAMES, parameters, strict=True)):
        assert (tensor is None) == (name in ("wh2.bias", "fc1.bias", "fc2.bias", "fc3.bias"))
        if tensor is not None:
            refuses(TypeError, name, parameters=instead(parameters, index, tensor.double()))
            refuses(ValueError, name, parameters=instead(parameters, index, tensor.unsqueeze(0)))
            if not name.endswith(".bias") and not name.startswith(("norm", "rmsnorm", "nffn", "fc3")):
                refuses(ValueError, name, parameters=instead(parameters, index, None))
    for index, name in enumerate("count mean var residual cema cache_k cache_v position".split()):
        other = torch.float64 if name.startswith("cache") else torch.bfloat16
        refuses(TypeError, name, state=instead(tensors, index, tensors[index].real.to(other)))
        refuses(ValueError, name, state=instead(tensors, index, tensors[index][:0]))
    refuses(ValueError, "count", state=instead(tensors, 0, tensors[0] - 100))
    refuses(ValueError, "cache_v", state=instead(tensors, 6, tensors[6][:, :1].contiguous()))
    refuses(ValueError, "position", state=instead(tensors, 7, tensors[7] + 100))
    refuses(ValueError, "parameters", parameters=parameters[:21])
    refuses(ValueError, "parameters", parameters=[*parameters, None])
    refuses(ValueError, "state", state=tensors[:-1])
    refuses(ValueError, "y", y=y[:, :, :1])


def test_errors_of_a_whole_model():
    model = tiny_model(torch.float32).eval()
    with torch.no_grad():
        _, state = model(tokens_of(1, 5), return_state=True)
        x, parameters, tensors, y, *numbers = captured(lambda: model(tokens_of(1, 1), **INPLACE, state=state))
    dim, outputs, (*sizes, eps, scale) = model.config.model_dim, model.config.num_outputs, numbers

    def refuses(name, x=x, parameters=parameters, tensors=tensors, y=y, eps=eps):
        call = lambda: blocks_few_rows_(x, parameters, tensors, y, *sizes, eps, scale)  # noqa: E731
        assert_refuses(ValueError, "blocks_few_rows", name, call)

    assert y.shape == (1, 1, outputs) and torch.equal(x, tokens_of(1, 1))
    refuses("y", y=torch.empty(1, 1, dim))
    refuses("eps", eps=-1.0)
    refuses("state", tensors=tensors[:-1])
    refuses("x", x=x[0])
    for token in (-1, model.config.vocab_size):
        with torch.no_grad(), pytest.raises(IndexError, match=rf"Megalodon: `tokens` must be in \[0, .*got {token}"):
            model(torch.full_like(x, token), state=state, return_state=True)
    refuses("embed.weight", parameters=[None, *parameters[1:]])
    refuses("embed.weight", parameters=[parameters[0][0], *parameters[1:]])
    refuses("final_norm.weight", parameters=[*parameters[:-4], parameters[-4][1:], *parameters[-3:]])
    refuses("output.weight", parameters=[*parameters[:-2], torch.zeros(outputs, dim + 1), None])
    refuses("output.bias", parameters=[*parameters[:-1], torch.zeros(outputs + 1)])


def test_a_state_of_another_chunk_size_is_refused():
    """As the layers refuse it."""
    block, _ = block_and_state()
    _, state = block_and_state(chunk_size=TINY["chunk_size"] + 1)
    with pytest.raises(ValueError, match=r"blocks_few_rows: `cache_k` must .*, got"):
        decode(block, state)


def test_tokens_of_other_types_and_strides():
    model, tokens = tiny_model(torch.float32).eval(), tokens_of(2, 20)
    with torch.no_grad():
        _, state = model(tokens, return_state=True)
        expected = [model(tokens[:, i : i + 1].contiguous(), state=state, return_state=True)[0] for i in range(3)]
        with Calls() as calls:
            found = [model(tokens.int()[:, i : i + 1], state=state, return_state=True)[0] for i in range(3)]
        with pytest.raises(RuntimeError, match="indices"):
            model(tokens[:, :1].short(), state=state, return_state=True)
    assert calls.count == 3
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale_emb", [False, True], ids=["embedded", "scaled"])
def test_a_whole_model_is_one_call(name, dtype, scale_emb, monkeypatch):
    with isa(name):
        check_whole_model(monkeypatch, dtype, scale_emb)


def check_whole_model(monkeypatch, dtype, scale_emb):
    model, tokens = tiny_model(dtype, swiglu=True, scale_emb=scale_emb).eval(), tokens_of(2, 20)

    def logits():
        with torch.no_grad(), Calls() as calls:
            _, state = model(tokens[:, :5], return_state=True)
            found = []
            for token in tokens[:, 5:].split(1, 1):
                out, state = model(token, state=state, **INPLACE)
                found.append(out)
        return tree_leaves((found, state)), calls.count

    together, calls = logits()
    monkeypatch.setattr(mo.model, "run_model_in_one_call", lambda *args, **options: None)
    one_by_one, each = logits()
    monkeypatch.setattr(mo.blocks, "_run_in_one_call", lambda *args, **options: None)
    expected, none = logits()
    assert (calls, each, none) == (15, 15 * TINY["num_layers"], 0)
    for found in (together, one_by_one):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


NAMES = (
    "timenorm.weight timenorm.bias cema.alpha cema.delta cema.theta cema.gamma cema.omega rmsnorm.weight wv.weight "
    "wv.bias wz.weight wz.bias wr.weight wr.bias wh1.weight wh1.bias wh2.weight wh2.bias gamma beta norm.weight norm.bias "
    "fc1.weight fc1.bias fc2.weight fc2.bias fc3.weight fc3.bias nffn.alpha"
).split()
