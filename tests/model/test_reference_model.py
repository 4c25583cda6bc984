"""The model and `mo.reference.Megalodon`, in float64: outputs, loss, gradients and states, however calls split a text.

Other tests compare one part of the model at a time; this one finds parts that fit each other and not the formulas. What
the reference is for, derivatives of every kind and programs of dynamic sizes, is tested below.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from models import TINY, numbers_of, tiny_model, tokens_of
from strategies import pieces
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim
from torch.func import functional_call, grad, hessian, jvp, vmap

import megalodon_ops as mo
from megalodon_ops.model.model_state import named_tensors

FLAGS = "swiglu rescale_nffn scale_emb share_emb norm_affine".split()
CONFIGS = st.fixed_dictionaries(
    {
        **dict.fromkeys(FLAGS, st.booleans()),
        "num_heads": st.sampled_from([1, 2, 4]),
        "chunk_size": st.sampled_from([1, 3, 8, 70, 150]),
        "cema_ndim": st.sampled_from([1, 4, 7]),
        "norm_num_groups": st.sampled_from([1, 4, 16]),
        "rope_base": st.sampled_from([None, 10.0, 1e5]),
    }
)


def pair(**overrides) -> tuple[mo.Megalodon, torch.nn.Module]:
    """A model and its reference, with the same parameters."""
    model = tiny_model(**overrides)
    reference = mo.reference.Megalodon(model.config).double()
    reference.load_state_dict(model.state_dict())
    return model, reference


def close(got, expected, name=""):
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11, msg=lambda text: f"{name}: {text}")


def compare_states(got: mo.MegalodonState, expected: mo.MegalodonState) -> None:
    """Compare all tensors but residuals; of keys and values, the rows before the position."""
    got, expected = named_tensors(got), named_tensors(expected)
    position = expected["layers.0.attention.position"][0]
    for name, tensor in expected.items():
        if name.endswith(("attention.k", "attention.v")):
            close(got[name][:, :position], tensor[:, :position], name)
        elif not name.endswith("residual"):
            close(got[name], tensor, name)


@settings(max_examples=25, deadline=None)
@given(st.data(), CONFIGS, st.integers(1, 150))
def test_model_equals_its_reference(data, config, length):
    model, reference = pair(**config)
    tokens = torch.randint(TINY["vocab_size"], (2, length + 1), generator=torch.Generator().manual_seed(length))
    parts = [size for size in data.draw(pieces(length)) if size]
    logits, end = reference(tokens[:, :-1])
    expected = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    whole, model_end = model(tokens[:, :-1], return_state=True)
    close(whole, logits)
    compare_states(model_end, mo.MegalodonState.from_reference(end))
    loss = model.loss(tokens[:, :-1], tokens[:, 1:], reduction="sum")
    close(loss, expected)
    grads = torch.autograd.grad(loss, [*model.parameters()])
    expected_grads = torch.autograd.grad(expected, [*reference.parameters()])
    for (name, _), got, want in zip(model.named_parameters(), grads, expected_grads, strict=True):
        assert (got - want).norm() <= 1e-11 * want.norm() + 1e-13, name
    outputs, state = [], None
    for index, part in enumerate(tokens[:, :-1].split(parts, 1)):
        if index % 2:  # the two take turns, each with the other's state
            state = None if state is None else mo.MegalodonState.from_reference(state)
            piece, state = model(part, state=state, return_state=True)
            state = state.to_reference()
        else:
            piece, state = reference(part, state)
        outputs.append(piece)
    close(torch.cat(outputs, 1), logits)
    compare_states(mo.MegalodonState.from_reference(state), model_end)


NUMBERS = [
    dict(num_features=3),
    dict(num_features=3, missing_values=True, output_size=5),
    dict(num_features=2, scale_inputs=False, output_size=40),
]


@pytest.mark.parametrize("inputs", NUMBERS, ids=str)
def test_a_model_of_numbers(inputs):
    model = tiny_model(**inputs)
    reference = mo.reference.MegalodonOfNumbers(model.config).double()
    reference.load_state_dict(model.state_dict())
    x = numbers_of(3, 41, model.config.num_features, missing=model.config.missing_values)
    expected = model(x)
    outputs, state = [], None
    for piece in x.split([1, 5, 8, 1, 1, 16, 1, 8], 1):
        y, state = reference(piece, state)
        outputs.append(y)
    for got in (torch.cat(outputs, 1), reference(x)[0]):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("inputs", [dict(num_classes=5), dict(norm_affine=False), *NUMBERS], ids=str)
def test_an_encoder(inputs):
    torch.manual_seed(0)
    inputs = {name: value for name, value in inputs.items() if name != "output_size"}
    encoder = mo.MegalodonEncoder(mo.MegalodonEncoderConfig(**{**TINY, **inputs})).double()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    config = encoder.config
    reference = mo.reference.MegalodonEncoder(config).double()
    reference.load_state_dict(encoder.state_dict())
    for length in (1, 2, 8, 21, 150):
        rows, lengths = tokens_of(3, length), torch.tensor([length, max(1, length // 2), 1])
        if config.num_features is not None:
            rows = numbers_of(3, length, config.num_features, missing=config.missing_values)
        expected = encoder(rows, lengths=lengths)
        torch.testing.assert_close(reference(rows, lengths), expected, rtol=1e-10, atol=1e-10, msg=f"length {length}")


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own use
def test_derivatives():
    """The reference's first derivatives are the model's; jvp, vmap, Hessian and double backward agree with them."""
    model, reference = pair(swiglu=True)
    tokens = torch.randint(TINY["vocab_size"], (2, 19))
    parameters = dict(reference.named_parameters())

    def loss(parameters, tokens):
        return functional_call(reference, parameters, (tokens,))[0].square().mean()

    grads = grad(loss)(parameters, tokens)
    names, values = zip(*model.named_parameters(), strict=True)
    for name, expected in zip(names, torch.autograd.grad(model(tokens).square().mean(), values), strict=True):
        close(grads[name], expected, name)
    along = {name: torch.randn_like(value) for name, value in parameters.items()}
    _, slope = jvp(lambda parameters: loss(parameters, tokens), (parameters,), (along,))
    close(slope, sum((grads[name] * along[name]).sum() for name in names))
    rows = vmap(grad(loss), (None, 0))(parameters, tokens[:, None])
    close(rows["layers.1.mega.cema.theta"].mean(0), grads["layers.1.mega.cema.theta"])
    name = "layers.0.mega.cema.theta"
    second = hessian(lambda value: loss({**parameters, name: value}, tokens))(parameters[name])  # (D, 1, 1, D, 1, 1)
    second = second.flatten(3).flatten(0, 2)
    (slope,) = torch.autograd.grad(loss(parameters, tokens), [parameters[name]], create_graph=True)
    close(torch.autograd.grad(slope[0].sum(), parameters[name])[0].flatten(), second[0])


@pytest.mark.parametrize("has_state", [False, True])
def test_program_of_dynamic_sizes(has_state):
    """`torch.export` with dynamic batch and length, of up to a chunk."""
    _, reference = pair(num_layers=1)
    tokens = torch.randint(TINY["vocab_size"], (2, 6))
    sizes = {"tokens": {0: Dim("B"), 1: Dim("L", min=2, max=8)}}
    args = (tokens,)
    if has_state:
        args = (tokens, reference(tokens)[1])
        sizes["state"] = tuple({0: sizes["tokens"][0]} for _ in args[1])
    program = torch.export.export(reference, args, dynamic_shapes=sizes).module()
    for length in (2, 5, 8):
        args = [torch.randint(TINY["vocab_size"], (3, length))]
        if has_state:
            args.append(reference(tokens[[0, 1, 0], :3])[1])
        close(program(*args), reference(*args))


@pytest.mark.slow  # 40 s; the programs above trace the same code
def test_compiles_to_one_graph_of_dynamic_sizes():
    _, reference = pair(num_layers=1)
    compiled = torch.compile(reference, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (1, 2, 7, 8, 11):
        tokens = torch.randint(TINY["vocab_size"], (3, length))
        close(compiled(tokens), reference(tokens))
    _, reference = pair(num_layers=1, chunk_size=200)
    graphs, counts = CompileCounterWithBackend("eager"), []
    compiled = torch.compile(reference, fullgraph=True, dynamic=True, backend=graphs)
    for length in (70, 130, 190):  # of one, two and three blocks of CEMA
        compiled(torch.randint(TINY["vocab_size"], (3, length)))
        counts.append(graphs.frame_count)
    assert counts == [1, 1, 1]


def test_refused_configurations():
    for field, value in dict(working_memory=True, visible_chunks=2, num_features=3).items():
        with pytest.raises(ValueError, match=f"reference.Megalodon: `{field}` must be"):
            mo.reference.Megalodon(mo.MegalodonConfig(**{**TINY, field: value}))
