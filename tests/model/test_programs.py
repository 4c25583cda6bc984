"""Models in programs: export, copies, calls with other parameters, transforms, compilation."""

import copy
import io
import pickle

import pytest
import torch
from decoding import assert_same_bits
from models import tiny_model, tokens_of
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map

import megalodon_ops as mo
from megalodon_ops.ops.linear_cross_entropy import linear_cross_entropy as loss

EACH_MODE = pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "strict"])
CANNOT_TRACE = pytest.mark.skipif(torch.__version__ < (2, 6), reason="torch 2.5 cannot trace it")
EACH_GRAD = pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
F32, BF16 = torch.float32, torch.bfloat16
SIZES = [(1, 1), (2, 7), (3, 60)]  # 1 to 180 tokens, so that products use each of the kernels
ALL = dict(swiglu=True, rescale_nffn=True, scale_emb=True, share_emb=True)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


class Loss(torch.nn.Module):
    def __init__(self, model: mo.Megalodon) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens, targets):
        return self.model.loss(tokens, targets)


def small_model(dtype=torch.float32, **overrides) -> mo.Megalodon:
    return tiny_model(dtype, **{"num_layers": 1, **overrides}).eval()


def state_of(model, rows=2, seen=5):
    with torch.no_grad():
        return model(tokens_of(rows, seen), return_state=True)[1]


def other_model(model, factor=1.1):
    """Return a model of the same configuration with other parameters, and these by name."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(factor)
    return other, dict(other.named_parameters())


def dims(*names: str) -> dict[int, torch.export.Dim]:
    return {i: torch.export.Dim(name, max=1 << 20) for i, name in enumerate(names)}


def assert_near(found, expected, tolerance=1e-5) -> None:
    for a, b in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# Export


@pytest.mark.parametrize(  # any two of the arguments take all pairs of their values
    ("grad", "dtype", "strict"),
    [(False, F32, False), (True, BF16, False), slow(True, F32, True), slow(False, BF16, True)],
)
def test_an_exported_forward_takes_other_batches_and_lengths(strict, grad, dtype):
    model = small_model(dtype, **ALL)
    with torch.set_grad_enabled(grad):
        shapes = dict(tokens=dims("rows", "length"))
        program = torch.export.export(model, (tokens_of(2, 20),), dynamic_shapes=shapes, strict=strict).module()
        for size in SIZES:
            assert_near(program(tokens_of(*size)), model(tokens_of(*size)), 1e-5 if dtype == torch.float32 else 0.05)


def test_an_exported_program_of_a_wider_model_takes_other_lengths():
    """Its products pass the size from which, with gradients, the op for many rows is faster."""
    model = small_model(model_dim=512, value_dim=1024, ffn_hidden_dim=2048)
    shapes = dict(tokens={1: dims("length")[0]})
    program = torch.export.export(model, (tokens_of(1, 9),), dynamic_shapes=shapes).module()
    for length in (1, 9, 150):
        assert_near(program(tokens_of(1, length)), model(tokens_of(1, length)), 1e-4)


@EACH_MODE
@pytest.mark.parametrize("kind", ["lengths", "starts", "spans", "cu_seqlens"])
def test_an_exported_forward_takes_padded_and_packed_batches(strict, kind):
    model = small_model()
    # Tokens and the argument `kind`: `example` for the export, `inputs` for a later call
    if kind in ("lengths", "starts"):
        example, inputs = (tokens_of(2, 9), [9, 4]), (tokens_of(3, 20), [1, 20, 8])
        shapes = dict(tokens=dims("rows", "length"))
        shapes[kind] = {0: shapes["tokens"][0]}
    elif kind == "spans":
        example, inputs = (tokens_of(2, 9), [(0, 3), (4, 9), (9, 17)]), (tokens_of(3, 20), [(1, 20), (45, 60)])
        shapes = dict(tokens=dims("rows", "length"), spans={0: torch.export.Dim("sequences", max=1 << 20)})
    else:
        example, inputs = (tokens_of(1, 9), [0, 4, 9]), (tokens_of(1, 20), [0, 1, 13, 20])
        shapes = dict(tokens={1: dims("length")[0]}, cu_seqlens={0: torch.export.Dim("ends", min=3)})
    options = {kind: torch.tensor(example[1])}
    program = torch.export.export(model, example[:1], options, dynamic_shapes=shapes, strict=strict).module()
    tokens, options = inputs[0], {kind: torch.tensor(inputs[1])}
    assert_near(program(tokens, **options), model(tokens, **options))


@EACH_MODE
def test_an_exported_model_decodes_other_batches_from_a_file(strict):
    """Tokens pass the end of a chunk; the program is saved and loaded."""
    model = small_model(**ALL)
    state, rows = state_of(model), dims("rows")
    by_field = [*vars(tree_map(lambda _: rows, state)).values()]  # torch takes a list for a dataclass
    shapes = dict(tokens=rows, state=by_field, return_state=None)
    options = dict(state=state, return_state=True)
    with torch.no_grad():
        program = torch.export.export(model, (tokens_of(2, 1),), options, dynamic_shapes=shapes, strict=strict)
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        loaded = torch.export.load(file).module()
        for batch in (1, 3):
            found = expected = state_of(model, batch)
            for token in tokens_of(batch, 6).split(1, 1):
                found_logits, found = loaded(token, state=found, return_state=True)
                logits, expected = model(token, state=expected, return_state=True)
                assert_near((found_logits, found), (logits, expected))
                assert isinstance(found, mo.MegalodonState)


@CANNOT_TRACE
def test_an_exported_model_may_write_its_state_in_place():
    model = small_model()
    token, state = tokens_of(2, 1), state_of(model)
    options = dict(return_state=True, inplace_state=True)
    with torch.no_grad():
        program = torch.export.export(model, (token,), dict(state=state.clone(), **options)).module()
        written = state.clone()
        found = program(token, state=written, **options)
        assert_near(found, model(token, state=state, return_state=True))
        assert_same_bits(written.layers[0].attention, found[1].layers[0].attention)


@pytest.mark.parametrize(  # any two of the arguments take all pairs of their values
    ("grad", "hooked", "strict"),
    [(True, False, False), (False, True, False), slow(True, True, True), slow(False, False, True)],
)
def test_an_exported_loss_takes_other_batches_and_lengths(strict, grad, hooked, monkeypatch):
    """With and without a hook, and with fewer and more logits than one block has."""
    model = small_model()
    if hooked:
        model.output.output.register_forward_hook(lambda module, args, y: 2 * y)
    monkeypatch.setattr(loss, "_CPU_BLOCK", 31 * 64)
    with torch.set_grad_enabled(grad):
        tokens, shape = tokens_of(2, 20), dims("rows", "length")
        shapes = dict(tokens=shape, targets=shape)
        program = torch.export.export(Loss(model), (tokens, tokens), dynamic_shapes=shapes, strict=strict).module()
        for size in SIZES:
            tokens = tokens_of(*size)
            found, expected = program(tokens, tokens), model.loss(tokens, tokens)
            assert_near(found, expected)
            if grad:
                found.backward()
                exported = {name.removeprefix("model."): p.grad for name, p in program.named_parameters()}
                program.zero_grad()
                expected.backward()
                for name, parameter in model.named_parameters():
                    assert_near(exported[name], parameter.grad)
                model.zero_grad()


@EACH_MODE
def test_recomputed_layers_are_exported_without_recomputation(strict):
    model, tokens = small_model(layerwise_ckpt=True).train(), tokens_of(2, 12)
    program = torch.export.export(model, (tokens,), strict=strict).module()
    assert_near(program(tokens), model(tokens))


class DecoderModule(torch.nn.Module):
    def __init__(self, model: mo.Megalodon) -> None:
        super().__init__()
        self.decoder = mo.Decoder(model, state_of(model))

    def forward(self, tokens):
        return self.decoder(tokens)


class GeneratorModule(torch.nn.Module):
    def __init__(self, model: mo.Megalodon) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens):
        return self.model.generate(tokens, max_new_tokens=2, temperature=0)


@pytest.mark.parametrize(("function", "kind"), [("Decoder", DecoderModule), ("generate", GeneratorModule)])
def test_a_decoder_is_not_exported(function, kind):
    refused = f"{function}: expected a call outside of torch.export, got one inside; call the model there"
    with pytest.raises(NotImplementedError, match=refused):
        torch.export.export(kind(small_model()), (tokens_of(2, 1),), strict=False)


# Copies


def by_pickle(value):
    return pickle.loads(pickle.dumps(value))


def by_torch_save(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"copy": copy.copy, "deepcopy": copy.deepcopy, "pickle": by_pickle, "torch.save": by_torch_save}


@pytest.mark.parametrize("method", COPIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_copied_model_has_the_results_of_the_model(method, dtype):
    model, tokens = small_model(dtype, share_emb=True), tokens_of(2, 12)
    copied = COPIES[method](model)
    assert copied.embed.weight is copied.output.output.weight
    assert (copied.embed.weight is model.embed.weight) == (method == "copy")
    assert mo.wide_parameters(copied).keys() == mo.wide_parameters(model).keys()
    assert_same_bits(copied(tokens), model(tokens))
    copied.loss(tokens, tokens).backward()
    assert_same_bits(*(each.generate(tokens, max_new_tokens=3, temperature=0) for each in (copied, model)))


@pytest.mark.parametrize("method", COPIES)
def test_a_copied_state_is_a_state(method):
    model = small_model()
    state = state_of(model)
    copied = COPIES[method](state)
    assert isinstance(copied, mo.MegalodonState)
    assert_same_bits(copied, state)
    assert_same_bits(mo.Decoder(model, copied)(tokens_of(2, 1)), mo.Decoder(model, state)(tokens_of(2, 1)))


@pytest.mark.parametrize("method", COPIES)
def test_a_decoder_is_not_copied(method):
    model = small_model()
    decoder = mo.Decoder(model, state_of(model))
    with pytest.raises(TypeError, match=r"Decoder: expected no copy.*`decoder.state`"):
        COPIES[method](decoder)


# Other parameters, and torch.func


def test_functional_call_computes_with_the_parameters_given():
    model, tokens = small_model(**ALL), tokens_of(2, 12)
    other, parameters = other_model(model)
    options = dict(state=state_of(model), return_state=True)
    assert_same_bits(functional_call(model, parameters, (tokens,)), other(tokens))
    assert_same_bits(functional_call(model, parameters, (tokens,), options), other(tokens, **options))
    with torch.no_grad():
        assert_same_bits(functional_call(model, parameters, (tokens[:, :1],), options), other(tokens[:, :1], **options))


def test_the_gradients_of_functional_calls_reach_the_parameters_given():
    model, tokens = small_model(), tokens_of(2, 12)
    other, parameters = other_model(model)
    named = {f"model.{name}": parameter for name, parameter in parameters.items()}
    found = functional_call(Loss(model), named, (tokens, tokens))
    expected = other.loss(tokens, tokens)
    assert_same_bits(found, expected)
    gradients = [torch.autograd.grad(value, list(other.parameters())) for value in (found, expected)]
    assert_same_bits(*gradients)


TRANSFORMS = {
    "grad": lambda function, parameters: torch.func.grad(function)(parameters),
    "vjp": lambda function, parameters: torch.func.vjp(function, parameters),
    "jvp": lambda function, parameters: torch.func.jvp(function, (parameters,), (parameters,)),
    "jacrev": lambda function, parameters: torch.func.jacrev(function)(parameters),
    "grad of each sample": lambda f, p: torch.func.vmap(lambda _: torch.func.grad(f)(p))(torch.zeros(2)),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:.*torch.jit.script")
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("output", ["logits", "loss"])
def test_differentiating_with_torch_func_is_refused(transform, output):
    model, tokens = small_model(), tokens_of(2, 12)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def function(parameters):
        if output == "logits":
            return functional_call(model, parameters, (tokens,)).sum()
        return functional_call(Loss(model), {f"model.{name}": p for name, p in parameters.items()}, (tokens, tokens))

    refused = "expected a call outside of torch.func's.*differentiate with torch.autograd"
    with pytest.raises(NotImplementedError, match=refused):
        TRANSFORMS[transform](function, parameters)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@EACH_GRAD
def test_vmap_computes_sequences_and_models_side_by_side(grad):
    model, tokens = small_model(), tokens_of(2, 12)
    other, parameters = other_model(model)
    models = {name: torch.stack([own, parameters[name]]) for name, own in model.named_parameters()}
    with torch.set_grad_enabled(grad):
        sequences = torch.func.vmap(lambda row: model(row[None])[0])(tokens)
        both = torch.func.vmap(lambda parameters: functional_call(model, parameters, (tokens,)))(models)
        assert_near(sequences, model(tokens))
        assert_near(both, torch.stack([model(tokens), other(tokens)]))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_of_a_decoder_is_refused():
    model, tokens = small_model(), tokens_of(3, 2, 4)
    decoder = mo.Decoder(model, state_of(model))
    refused = "expected a call outside of torch.func's transformations, got one inside; call the model there"
    with pytest.raises(NotImplementedError, match=f"Decoder: {refused}"):
        torch.func.vmap(decoder)(tokens)
    with pytest.raises(NotImplementedError, match=f"generate: {refused}"):
        torch.func.vmap(lambda prompt: model.generate(prompt, max_new_tokens=2, temperature=0))(tokens)


# Compilation


@CANNOT_TRACE
def test_a_compiled_model_decodes_past_the_end_of_a_chunk():
    model = small_model(**ALL)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = expected = state_of(model)
    with torch.no_grad():
        for token in tokens_of(2, 6).split(1, 1):
            found_logits, found = compiled(token, state=found, return_state=True)
            logits, expected = model(token, state=expected, return_state=True)
            assert_near((found_logits, found), (logits, expected))


@pytest.mark.slow
@pytest.mark.parametrize("options", [dict(dynamic=True), dict()], ids=["dynamic", ""])
def test_a_compiled_loss_takes_other_lengths(options):
    model = small_model()
    torch.compiler.reset()
    compiled = torch.compile(model.loss, fullgraph=True, backend="aot_eager", **options)
    for size in ((2, 12), (2, 20), (3, 33)):
        tokens, results = tokens_of(*size), []
        for function in (compiled, model.loss):
            model.zero_grad()
            value, state = function(tokens, tokens, return_state=True)
            value.backward()
            results.append((value, state, [parameter.grad for parameter in model.parameters()]))
        assert_near(*results)
