"""The model: golden logits and gradients, streaming, packing, dtypes."""

import backends
import pytest
import torch
import torch.nn.functional as F
from assertions import assert_close
from golden import DATA, MODEL, golden_model
from models import TINY, tiny_model, tokens_of
from safetensors.torch import load_file
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

import megalodon_ops as mo


@pytest.fixture(scope="module")
def golden():
    return golden_model()


def test_golden_parameter_names(golden):
    assert [name for name, _ in golden[0].named_parameters()] == MODEL["param_names"]


def test_golden_hidden_states_logits_and_gradients(golden, backend):
    model, io = golden
    grads = load_file(DATA / "official_c_grads_f64.safetensors")
    hidden = []
    hooks = [layer.register_forward_hook(lambda module, args, out: hidden.append(out)) for layer in model.layers]
    logits = model(io["tokens"])
    for hook in hooks:
        hook.remove()
    for index, out in enumerate(hidden):
        torch.testing.assert_close(out, io[f"hidden_after_layer{index}"], rtol=0, atol=1e-11)
    torch.testing.assert_close(logits, io["logits"], rtol=0, atol=1e-11)
    loss = F.cross_entropy(logits.flatten(0, 1), io["targets"].flatten())
    torch.testing.assert_close(loss, io["loss"].reshape(()), rtol=1e-12, atol=0)
    model.zero_grad()
    loss.backward()
    for name, parameter in model.named_parameters():
        expected = grads[f"grad.{name}"]
        error = (parameter.grad - expected).norm() / expected.norm()
        assert error < 1e-10, f"{name}: relative error {error:.1e}"


def test_logits_are_computed_from_features():
    """In padded rows, in packed documents, and in pieces with the state passed on."""
    model, tokens = tiny_model(), tokens_of(2, 21)
    logits = model.output.output
    for options in ({}, dict(lengths=torch.tensor([21, 9]))):
        features, state = model.features(tokens, return_state=True, **options)
        assert features.shape == (2, 21, TINY["model_dim"]) and features.dtype == torch.float64
        torch.testing.assert_close(logits(features), model(tokens, **options), rtol=0, atol=0)
        after = model.features(tokens, state=state)
        torch.testing.assert_close(logits(after), model(tokens, state=state), rtol=0, atol=0)
    packed = dict(cu_seqlens=torch.tensor([0, 8, 21]))
    assert torch.equal(logits(model.features(tokens[:1], **packed)), model(tokens[:1], **packed))
    model.features(tokens).sum().backward()
    assert all(p.grad.any() for name, p in model.named_parameters() if name != "output.output.weight")
    assert model.output.output.weight.grad is None
    with pytest.raises(ValueError, match="`targets` must be None where features are wanted"):
        model(tokens, tokens, features=True)


@backends.wide_every_device
@pytest.mark.parametrize("plan", MODEL["plans"])
def test_golden_streaming_plans(golden, plan, backend):
    model, io = golden
    pieces, state = [], None
    with torch.no_grad():
        for piece in io["tokens"].split(MODEL["plans"][plan], dim=1):
            logits, state = model(piece, state=state, return_state=True)
            pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces, 1), io["logits"], rtol=0, atol=1e-11)


def test_golden_end_state(golden, backend):
    model, io = golden
    tokens = io["tokens"][:, : MODEL["ragged"]]
    pieces, state = [], None
    with torch.no_grad():
        for piece in tokens.split(MODEL["ragged_plan"], dim=1):
            logits, state = model(piece, state=state, return_state=True)
            pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces, 1), io["ragged_logits"], rtol=0, atol=1e-11)
    position = MODEL["ragged"] % MODEL["chunk"]
    for index, layer in enumerate(state.layers):
        cache = {key.split(".", 1)[1]: value for key, value in io.items() if key.startswith(f"cache{index}.")}
        torch.testing.assert_close(torch.view_as_real(layer.cema).flatten(), cache["hx"].flatten(), rtol=0, atol=1e-11)
        torch.testing.assert_close(layer.norm.mean.flatten(), cache["norm_mean"].flatten(), rtol=0, atol=1e-11)
        torch.testing.assert_close(layer.norm.var.flatten(), cache["norm_var"].flatten(), rtol=0, atol=1e-11)
        assert layer.attention.position.tolist() == [position] * tokens.shape[0]
        for ours, theirs in ((layer.attention.k, cache["k_roped"]), (layer.attention.v, cache["v"])):
            torch.testing.assert_close(ours[:, :position].flatten(), theirs.flatten(), rtol=0, atol=1e-11)


@pytest.mark.parametrize("isa", backends.ISAS)
def test_golden_logits_float32(golden, isa):
    model, io = golden
    with backends.isa(isa):
        narrow = mo.Megalodon(model.config)
        narrow.load_state_dict(model.state_dict())
        logits = narrow(io["tokens"])
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), io["logits"], rtol=0, atol=5e-5)


def test_rows_of_a_state_are_selected_by_tree_map():
    model, tokens, rows = tiny_model(), tokens_of(3, 21), torch.tensor([2, 0])
    with torch.no_grad():
        _, state = model(tokens[:, :10], return_state=True)
        whole, end = model(tokens[:, 10:], state=state, return_state=True)
        selected = tree_map(lambda tensor: tensor[rows], state)
        logits, end_of_selected = model(tokens[rows, 10:], state=selected, return_state=True)
    torch.testing.assert_close(logits, whole[rows], rtol=0, atol=1e-12)
    expected = tree_leaves(tree_map(lambda tensor: tensor[rows], end))
    torch.testing.assert_close(tree_leaves(end_of_selected), expected, rtol=0, atol=1e-12)


def test_state_given_is_not_changed():
    model, tokens = tiny_model(), tokens_of(2, 12)
    _, state = model(tokens[:, :5], return_state=True)
    before = tree_map_only(torch.Tensor, torch.clone, state)
    model(tokens[:, 5:], state=state, return_state=True)
    torch.testing.assert_close(tree_leaves(state), tree_leaves(before), rtol=0, atol=0)


def test_gradients_flow_through_recurrent_states():
    model, tokens = tiny_model(), tokens_of(1, 12)
    _, state = model(tokens[:, :8], return_state=True)
    logits = model(tokens[:, 8:], state=state)
    (grad,) = torch.autograd.grad(logits.sum(), model.embed.weight)
    assert grad[tokens[0, :4]].abs().sum() > 0
    logits = model(tokens[:, 8:], state=state.detach())
    (grad,) = torch.autograd.grad(logits.sum(), model.embed.weight)
    unseen = [t for t in tokens[0, :8].tolist() if t not in tokens[0, 8:].tolist()]
    assert grad[unseen].abs().sum() == 0


def test_layerwise_checkpointing_gives_the_same_gradients():
    tokens, grads = tokens_of(2, 20), []
    for recompute in (False, True):
        model = tiny_model(layerwise_ckpt=recompute, attention_dropout=0.2, dropout=0.1).train()
        torch.manual_seed(3)
        loss = model(tokens).square().mean()
        loss.backward()
        grads.append([loss.detach(), *(p.grad for p in model.parameters())])
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)


def test_dropout_is_active_in_training_only():
    model, tokens = tiny_model(attention_dropout=0.3, hidden_dropout=0.2, dropout=0.2), tokens_of(1, 16)
    assert not torch.equal(model.train()(tokens), model(tokens))
    assert torch.equal(model.eval()(tokens), model(tokens))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_model_keeps_wide_parameters_and_states(dtype):
    wide = tiny_model(torch.float32)
    model, tokens = tiny_model(torch.float32).to(dtype), tokens_of(2, 20)
    for name, parameter in model.named_parameters():
        linear = name.startswith("embed") or name.split(".")[-2] in "wv wz wr wh1 wh2 fc1 fc2 output".split()
        assert parameter.dtype == (dtype if linear else torch.float32), name
        if not linear:
            assert torch.equal(parameter, wide.get_parameter(name)), f"{name} was rounded"
    logits, state = model(tokens, return_state=True)
    assert logits.dtype == torch.float32
    assert state.layers[0].cema.dtype == torch.complex64 and state.layers[0].norm.mean.dtype == torch.float32
    assert state.layers[0].attention.k.dtype == dtype
    assert (logits - wide(tokens)).abs().mean() < 0.05 * wide(tokens).std()
    logits.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in model.parameters())


def test_autocast():
    model, tokens = tiny_model(torch.float32), tokens_of(2, 20)
    with torch.autocast("cpu", torch.bfloat16):
        logits, state = model(tokens, return_state=True)
    assert logits.dtype == torch.float32 and state.layers[0].attention.k.dtype == torch.bfloat16
    plain = model(tokens)
    assert not torch.equal(logits, plain) and (logits - plain).abs().mean() < 0.05 * plain.std()
    logits.mean().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.slow  # test_programs.py compiles decoding, test_model_loss.py the loss with its gradients
def test_compiles_to_one_graph():
    model, tokens = tiny_model(torch.float32, num_layers=1), tokens_of(2, 20)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens), model(tokens), rtol=1e-5, atol=1e-5)
    compiled(tokens).mean().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_tokens_on_meta_are_refused_by_a_model_with_values():
    tokens = tokens_of(1, 3).to("meta")
    with pytest.raises(ValueError, match="`tokens` must have values, got a tensor on the device meta"):
        tiny_model()(tokens)
    with torch.device("meta"):
        logits, state = mo.Megalodon(mo.MegalodonConfig(**TINY))(tokens, return_state=True)
    assert logits.is_meta and logits.shape == (1, 3, TINY["vocab_size"]) and state.norm.count.is_meta


@pytest.mark.parametrize("kind", ["causal", "encoder"])
def test_features_are_pooled_over_each_sequence(kind):
    """Values at padding do not count, an empty sequence gives zeros, and gradients flow."""
    model = tiny_model(torch.float64)
    if kind == "encoder":
        model = mo.MegalodonEncoder(mo.MegalodonEncoderConfig(**TINY)).double()
    tokens = tokens_of(3, 9)
    pools = {"mean": lambda x: x.mean(0), "max": lambda x: x.amax(0), "last": lambda x: x[-1]}
    ragged = {"lengths": torch.tensor([9, 4, 1]), "starts": torch.tensor([0, 2, 8])}
    packed = {"spans": torch.tensor([[1, 6], [9, 18], [20, 21], [21, 27]])}
    offsets = {"cu_seqlens": torch.tensor([0, 9, 11, 27])}
    for inputs, rows, spans in (
        (tokens, {}, [[0, 9], [9, 18], [18, 27]]),
        (tokens, ragged, [[0, 9], [11, 15], [26, 27]]),
        (tokens, packed, packed["spans"]),
        (tokens.view(1, 27), offsets, [[0, 9], [9, 11], [11, 27]]),
    ):
        features = model.features(inputs, **rows).flatten(0, 1)
        for pool, reduce in pools.items():
            vectors = model.features(inputs, pool=pool, **rows)
            assert_close(vectors, torch.stack([reduce(features[a:b]) for a, b in spans]), tolerance=1e-12)
            vectors.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)
    with pytest.raises(ValueError, match='features: `pool` must be "mean", "max", "last" or None, got \'sum\''):
        model.features(tokens, pool="sum")
    if kind == "causal":
        rows = {"lengths": torch.tensor([9, 0, 1])}
        assert not any(model.features(tokens, pool=pool, **rows)[1].any() for pool in pools)
        vectors, state = model.features(tokens, pool="last", return_state=True)
        assert vectors.shape == (3, 32) and state.num_sequences == 3
