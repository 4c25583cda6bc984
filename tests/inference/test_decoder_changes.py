"""`Decoder` with wrapped, hooked, quantised or replaced modules: these run, and the rest runs as before."""

import copy
import dataclasses
import warnings

import pytest
import torch
from assertions import every_case
from decoding import DTYPES, assert_error_of_the_layers, assert_same_bits, by_decoder, by_layers, model_and_state
from models import TINY, tiny_model, tokens_of
from torch.utils._pytree import tree_map_only

import megalodon_ops as mo

pytestmark = pytest.mark.usefixtures("poisoned_memory")


class OtherLinear(torch.nn.Linear):
    pass


class Doubled(torch.Tensor):
    """Tensor whose values count double in `torch.nn.functional.linear`."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        plain = lambda tensor: tensor.as_subclass(torch.Tensor)  # noqa: E731
        factor = 2 if func is torch.nn.functional.linear else 1
        return func(*tree_map_only(cls, lambda tensor: factor * plain(tensor), args), **(kwargs or {}))


def replace_linear(block, new_class=OtherLinear):
    other = new_class(*reversed(block.mega.wz.weight.shape))
    other.load_state_dict(block.mega.wz.state_dict())
    with torch.no_grad():
        other.weight.add_(1)
    block.mega.wz = other


def weight_of_a_subclass(block):  # around the setter, which takes only a Parameter
    block.mega.wv._parameters["weight"] = block.mega.wv.weight.detach().as_subclass(Doubled)


def wrap_forward(layer):
    forward = layer.forward
    layer.forward = lambda x: forward(x) + 1


def weight_as_attribute(block):
    tensor = block.mega.wz.weight.detach() + 1
    del block.mega.wz.weight
    block.mega.wz.weight = tensor


def bias_as_buffer(block):
    tensor = block.mega.wv.bias.detach() + 1
    del block.mega.wv.bias
    block.mega.wv.register_buffer("bias", tensor)


def norm_as_function(block):
    norm = block.mega.rmsnorm
    del block.mega.rmsnorm
    block.mega.rmsnorm = lambda x: norm(x) + 1


def parametrize_weight(block):
    class AddOne(torch.nn.Module):
        def forward(self, weight):
            return weight + 1

    torch.nn.utils.parametrize.register_parametrization(block.mega.wr, "weight", AddOne())


def change_rotary_base(block):
    block.mega.config = dataclasses.replace(block.mega.config, rope_base=10.0)


def plus_one(module, args, y):
    return y + 1


def add_one_to_logits(module, args, result):
    """A hook of the model: its results are logits and a state."""
    return result[0] + 1, result[1]


BLOCK_CHANGES = {  # the change, and the module in the block that the warning names
    "hook": (lambda block: block.mega.wv.register_forward_hook(plus_one), ".mega.wv"),
    "pre-hook": (lambda block: block.nffn.register_forward_pre_hook(lambda module, args: (args[0] + 1,)), ".nffn"),
    "hook of the block": (lambda block: block.register_forward_hook(plus_one), ""),
    "replaced": (replace_linear, ".mega.wz"),
    "torch's Linear": (lambda block: replace_linear(block, torch.nn.Linear), ".mega.wz"),
    "subclass": (weight_of_a_subclass, ".mega.wv"),
    "wrapped": (lambda block: wrap_forward(block.nffn.fc2), ".nffn.fc2"),
    "norm is a function": (norm_as_function, ".mega"),
    "parametrized": (parametrize_weight, ".mega.wr"),
    "no gate": (lambda block: setattr(block.nffn, "fc3", None), ".nffn.fc3"),
}
RECORDED_CHANGES = {  # of values that the decoder reads from its own layers; no warning
    "attribute": lambda model: weight_as_attribute(model.layers[1]),
    "buffer": lambda model: bias_as_buffer(model.layers[1]),
    "eps": lambda model: setattr(model.layers[1].mega.rmsnorm, "eps", 0.1),
    "eps of the final norm": lambda model: setattr(model.output.final_norm, "eps", 0.1),
    "config": lambda model: change_rotary_base(model.layers[1]),
    "renormalised embedding": lambda model: setattr(model.embed, "max_norm", 0.5),
}
LINEAR_LAYERS = [f"mega.{name}" for name in ("wv", "wz", "wr", "wh1", "wh2")] + [f"nffn.fc{i}" for i in (1, 2, 3)]
ALL_LINEAR_LAYERS = [*(f"layers.{i}.{name}" for i in (0, 2) for name in LINEAR_LAYERS), "output.output"]  # of 3 blocks


def replace_module(model, name, instead):
    """Replace a module by an object that is not a module."""
    module = getattr(model, name)
    delattr(model, name)
    setattr(model, name, instead(module))


class OtherOutput(torch.nn.Module):
    def __init__(self, output):
        super().__init__()
        self.final_norm = output.final_norm
        self.output = torch.nn.Sequential(output.output, torch.nn.Tanh())


MODEL_CHANGES = {
    "hooked embedding": (lambda model: model.embed.register_forward_hook(plus_one), "`embed`"),
    "other output": (lambda model: setattr(model, "output", OtherOutput(model.output)), "`output`"),
    "hooked output": (lambda model: model.output.output.register_forward_hook(plus_one), "`output.output`"),
    "wrapped output": (lambda model: wrap_forward(model.output.output), "`output.output`"),
    "hooked model": (lambda model: model.register_forward_hook(add_one_to_logits), "`model`"),
    "list of layers": (lambda model: replace_module(model, "layers", lambda layers: list(layers)[::-1]), "`model`"),
    "embedding a function": (
        lambda model: replace_module(model, "embed", lambda embed: lambda tokens: embed(tokens) + 1),
        "`model`",
    ),
}


@pytest.mark.parametrize("change", [*BLOCK_CHANGES, *MODEL_CHANGES])
def test_a_changed_module_runs_as_changed(change):
    """A changed module of a block is called between the kernels."""
    model, state = model_and_state(num_layers=4, swiglu=True)
    pieces = tokens_of(1, 3).split(1, 1)
    original = by_decoder(mo.Decoder(model, state), pieces)
    if change in BLOCK_CHANGES:
        apply, where = BLOCK_CHANGES[change]
        apply(model.layers[1])
        name = f"`layers.1{where}` is"
    else:
        apply, name = MODEL_CHANGES[change]
        apply(model)
    with pytest.warns(UserWarning, match=name):
        decoder = mo.Decoder(model, state)
    found = by_decoder(decoder, pieces)
    assert_same_bits(found, by_layers(model, state, pieces))
    assert not decoder.fused and (decoder._steps or change in MODEL_CHANGES)  # the other modules are recorded
    assert not torch.equal(found[0], original[0])


@pytest.mark.filterwarnings("ignore:Decoder")
def test_a_changed_layer_keeps_its_attributes():
    """The model reads some attributes of its layers, also of hooked ones."""
    sizes = {name: size for name, size in TINY.items() if name != "vocab_size"}
    model, x = mo.Megalodon(mo.MegalodonConfig(**sizes, num_features=2)).eval(), torch.randn(1, 8, 2)

    def hook(module, args, y):
        return y + 1 if isinstance(y, torch.Tensor) else (y[0] + 1, y[1])

    for layer in (model.embed, model.layers[0].mega.timenorm):
        layer.register_forward_hook(hook)
    with torch.no_grad():
        _, state = model(x[:, :5], return_state=True)
    pieces = x[:, 5:].split(1, 1)
    assert_same_bits(by_decoder(mo.Decoder(model, state), pieces), by_layers(model, state, pieces))


@pytest.mark.filterwarnings("error")
def test_other_attributes_and_parameters_are_recorded():
    """The decoder records the functions that a changed layer of this package calls, so nothing runs in Python."""
    model, state = model_and_state()
    pieces = tokens_of(1, 3).split(1, 1)
    original = by_decoder(mo.Decoder(model, state), pieces)
    with every_case() as case:
        for name, change in RECORDED_CHANGES.items():
            with case(name):
                changed = copy.deepcopy(model)
                change(changed)
                decoder = mo.Decoder(changed, state)
                found = by_decoder(decoder, pieces)
                assert decoder.fused and decoder._steps
                assert_same_bits(found, by_layers(changed, state, pieces))
                assert not torch.equal(found[0], original[0])


LAST_LINEAR_LAYERS = ALL_LINEAR_LAYERS[len(LINEAR_LAYERS) :]  # of the last block, and the output
HOOKED = [([name], DTYPES[i % len(DTYPES)]) for i, name in enumerate(LAST_LINEAR_LAYERS)]
HOOKED += [(ALL_LINEAR_LAYERS, dtype) for dtype in DTYPES]


@pytest.mark.parametrize(
    ("names", "dtype"), HOOKED, ids=lambda value: f"{value[0]}, {len(value)}" if isinstance(value, list) else str(value)
)
def test_every_linear_layer_is_called_in_its_place(names, dtype):
    rows, length = 3, 2
    model, state = model_and_state(dtype, rows, num_layers=3, swiglu=True)
    calls = {name: [] for name in names}
    for name, seen in calls.items():

        def hook(module, args, y, seen=seen):
            seen.append((args[0], y))
            return y + args[0].mean()

        model.get_submodule(name).register_forward_hook(hook)
    pieces = tokens_of(rows, 5 * length).split(length, 1)
    message = f"`{names[0]}`, the first of {len(names)} such" if len(names) > 1 else f"`{names[0]}` is"
    with pytest.warns(UserWarning, match=message):
        decoder = mo.Decoder(model, state)
    found = by_decoder(decoder, pieces)
    assert not decoder.fused and decoder._steps
    assert all(len(seen) == len(pieces) for seen in calls.values())
    assert_same_bits(found, by_layers(model, state, pieces))
    for seen in calls.values():  # kept by hooks, first from the decoder, then from the layers: none was overwritten
        assert_same_bits(seen[: len(pieces)], seen[len(pieces) :])


@pytest.mark.parametrize("inference_mode", [False, True])
def test_other_layers_see_an_input_that_a_hook_changed(inference_mode):
    model, state = model_and_state(swiglu=True)

    def write(module, args):
        args[0].add_(1)

    for name in ("mega.wz", "nffn.fc1"):  # wr and wh1 read the input of wz, fc3 that of fc1
        model.layers[0].get_submodule(name).register_forward_pre_hook(write)
    pieces = tokens_of(1, 3).split(1, 1)
    expected = by_layers(model, state, pieces)
    with torch.inference_mode(inference_mode), pytest.warns(UserWarning, match="`layers.0.mega.wz`"):
        decoder = mo.Decoder(model, state)
        first = decoder(pieces[0])
    found = [first, *(decoder(piece) for piece in pieces[1:])]
    assert_same_bits((found, decoder.state), expected)


@pytest.mark.filterwarnings("ignore:Decoder")
def test_results_that_a_hook_keeps_are_not_overwritten():
    model, state = model_and_state()
    kept, copies = [], []

    def hook(module, args, y):
        kept.append(y)
        copies.append(y.clone())

    model.layers[0].mega.wv.register_forward_hook(hook)
    by_decoder(mo.Decoder(model, state), tokens_of(1, 3).split(1, 1))
    assert len(kept) == 3
    assert_same_bits(kept, copies)


ADAPTERS = {  # options of LoraConfig, and what is then done to the adapted layer
    "plain": ({}, lambda layer: None),
    "in another dtype": ({}, lambda layer: (layer.lora_A.double(), layer.lora_B.double())),
    "merged": ({}, lambda layer: layer.merge()),
    "disabled": ({}, lambda layer: layer.enable_adapters(False)),
    "DoRA": (dict(use_dora=True), lambda layer: None),
    "dropout in training": (dict(lora_dropout=0.5), lambda layer: layer.train()),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_are_called_between_the_kernels(kind):
    """PEFT's LoRA around a linear layer of each block; `merge_and_unload` would make one plain layer of both."""
    pytest.importorskip("megalodon_ops.hf", exc_type=ImportError)  # PEFT imports parts of transformers
    peft = pytest.importorskip("peft")
    options, change = ADAPTERS[kind]
    model, state = model_and_state(rows=2, swiglu=True)
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["wv"], **options), model)
    for layer in model.layers:
        torch.nn.init.normal_(layer.mega.wv.lora_B["default"].weight)
        change(layer.mega.wv)
    with pytest.warns(UserWarning, match="`layers.0.mega.wv`, the first of 2 such modules, is"):
        decoder = mo.Decoder(model, state)
    assert not decoder.fused
    pieces = tokens_of(2, 3).split(1, 1)
    torch.manual_seed(1)
    expected = by_layers(model, state, pieces)
    torch.manual_seed(1)
    assert_same_bits(by_decoder(decoder, pieces), expected)


def test_modules_run_under_the_autocast_of_the_constructor():
    model, state = model_and_state()  # y @ eye is y, unless autocast rounds it
    model.layers[0].mega.wv.register_forward_hook(lambda module, args, y: y @ torch.eye(y.shape[-1]))
    model.output.output.register_forward_hook(lambda module, args, y: y @ torch.eye(y.shape[-1]))
    token = tokens_of(1, 1)
    expected = by_layers(model, state, [token])[0]
    with pytest.warns(UserWarning, match="`layers.0.mega.wv`"):
        decoder = mo.Decoder(model, state)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(decoder(token), expected)


WRONG_RESULTS = {
    "dtype": (lambda y: y.double(), r"torch.float64 \(1, 1, 24\)"),
    "width": (lambda y: y[..., :1], r"torch.float32 \(1, 1, 1\)"),
    "rank": (lambda y: y[0], r"torch.float32 \(1, 24\)"),
}


@pytest.mark.filterwarnings("ignore:Decoder")
@pytest.mark.parametrize("kind", WRONG_RESULTS)
def test_a_layer_must_return_what_the_next_kernel_reads(kind):
    """A later call must give the dtype and shape of the first, which is right here."""
    wrong, got = WRONG_RESULTS[kind]
    model, state = model_and_state()
    token, calls = tokens_of(1, 1), []
    layer = model.layers[1].mega.wv
    layer.register_forward_hook(lambda module, args, y: wrong(y) if calls else y)
    decoder = mo.Decoder(model, state)
    decoder(token)
    calls.append(True)
    with pytest.raises(RuntimeError, match=f"Decoder: `layers.1.mega.wv` must return .*float32 .*, got {got}"):
        decoder(token)
    assert_error_of_the_layers(model, state, token)
    layer._forward_hooks.clear()
    for use in (lambda: decoder(token), lambda: decoder.state):
        with pytest.raises(RuntimeError, match="Decoder: the state must be whole"):
            use()


def test_a_module_that_calls_its_own_decoder_is_refused():
    model, state = model_and_state()
    model.layers[1].mega.wv.register_forward_hook(lambda module, args, y: decoder(tokens_of(1, 1)))
    with pytest.warns(UserWarning, match="`layers.1.mega.wv`"):
        decoder = mo.Decoder(model, state)
    with pytest.raises(RuntimeError, match="Decoder: the state must be whole"):
        decoder(tokens_of(1, 1))


def test_the_warning_stands_where_the_decoder_is_made():
    model, state = model_and_state()
    model.layers[0].mega.wv.register_forward_hook(lambda module, args, y: y)
    with pytest.warns(UserWarning, match="Decoder: ") as caught:
        mo.Decoder(model, state)
    assert [warning.filename for warning in caught] == [__file__]


def test_a_hook_on_every_module_sees_every_module():
    model, state = model_and_state()
    seen = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, args, y: seen.append(module))
    try:
        decoder = mo.Decoder(model, state)
        decoder(tokens_of(1, 1))
    finally:
        handle.remove()
    assert not decoder.fused and {model.output.output, model.layers[0].mega.wz} <= set(seen)


def test_generation_decodes_and_says_what_runs_as_a_module():
    model, prompt = tiny_model(torch.float32).eval(), tokens_of(2, 11)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = model.generate(prompt, max_new_tokens=4, temperature=0)
    seen = []
    model.layers[1].mega.wv.register_forward_hook(lambda module, args, y: seen.append(y.shape))
    with pytest.warns(UserWarning, match="`layers.1.mega.wv`"):
        found = model.generate(prompt, max_new_tokens=4, temperature=0)
    assert torch.equal(found, expected)
    prompt_calls, decoder_calls = 2, 4  # chunks of the first 10 tokens; the last of the prompt, 3 new ones
    assert len(seen) == prompt_calls + decoder_calls
