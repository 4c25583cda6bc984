"""The model: golden logits and gradients, streaming, packing, dtypes, generation."""

import json
import math
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from safetensors.torch import load_file
from torch.utils._pytree import tree_map

import megalodon_ops as mo
from megalodon_ops import loss
from megalodon_ops import model as model_module

DATA = Path(__file__).parent / "data"
GOLDEN = json.loads((DATA / "official_c.json").read_text())
BUFFERS = ("rope.freqs", "prior_count", "prior_mean", "prior_logv")
TINY = dict(
    num_layers=2, model_dim=32, z_dim=16, value_dim=24, num_heads=2, ffn_hidden_dim=40, cema_ndim=4, chunk_size=8,
    vocab_size=31, norm_num_groups=4,
)  # fmt: skip


def tiny_model(dtype=torch.float64, **overrides) -> mo.Megalodon:
    """A model with every parameter random, so that no offset hides behind its zero."""
    torch.manual_seed(0)
    model = mo.Megalodon(mo.MegalodonConfig(**{**TINY, **overrides})).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("weight", "bias", "gamma", "beta")) and parameter.dim() == 1 or "mega." in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tokens_of(*shape: int) -> torch.Tensor:
    return torch.randint(TINY["vocab_size"], shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def golden():
    """(model in float64 with the released parameters, inputs and outputs)."""
    model = mo.Megalodon(mo.MegalodonConfig.from_dict(GOLDEN["config"])).double()
    weights = load_file(DATA / "official_c_state.safetensors")
    model.load_state_dict({name: weights[name] for name in weights if not name.endswith(BUFFERS)}, strict=True)
    return model, load_file(DATA / "official_c_io_f64.safetensors")


def test_golden_parameter_names(golden):
    assert [name for name, _ in golden[0].named_parameters()] == GOLDEN["param_names"]


def test_golden_logits_and_hidden_states(golden, backend):
    model, io = golden
    hidden = []
    hooks = [layer.register_forward_hook(lambda module, args, out: hidden.append(out)) for layer in model.layers]
    logits = model(io["tokens"])
    for hook in hooks:
        hook.remove()
    for index, out in enumerate(hidden):
        torch.testing.assert_close(out, io[f"hidden_after_layer{index}"], rtol=0, atol=1e-11)
    torch.testing.assert_close(logits, io["logits"], rtol=0, atol=1e-11)


def test_golden_gradients(golden, backend):
    model, io = golden
    grads = load_file(DATA / "official_c_grads_f64.safetensors")
    loss = F.cross_entropy(model(io["tokens"]).flatten(0, 1), io["targets"].flatten())
    torch.testing.assert_close(loss, io["loss"].reshape(()), rtol=1e-12, atol=0)
    model.zero_grad()
    loss.backward()
    for name, parameter in model.named_parameters():
        expected = grads[f"grad.{name}"]
        error = (parameter.grad - expected).norm() / expected.norm()
        assert error < 1e-10, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("plan", GOLDEN["plans"])
def test_golden_streaming_plans(golden, plan, backend):
    model, io = golden
    pieces, state = [], None
    with torch.no_grad():
        for piece in io["tokens"].split(GOLDEN["plans"][plan], dim=1):
            logits, state = model(piece, state=state, return_state=True)
            pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces, 1), io["logits"], rtol=0, atol=1e-11)


def test_golden_end_state(golden, backend):
    model, io = golden
    tokens, state, pieces = io["tokens"][:, : GOLDEN["ragged"]], None, []
    with torch.no_grad():
        for piece in tokens.split(GOLDEN["ragged_plan"], dim=1):
            logits, state = model(piece, state=state, return_state=True)
            pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces, 1), io["ragged_logits"], rtol=0, atol=1e-11)
    position = GOLDEN["ragged"] % GOLDEN["chunk"]
    for index, layer in enumerate(state.layers):
        cache = {key.split(".", 1)[1]: value for key, value in io.items() if key.startswith(f"cache{index}.")}
        torch.testing.assert_close(torch.view_as_real(layer.cema).flatten(), cache["hx"].flatten(), rtol=0, atol=1e-11)
        torch.testing.assert_close(layer.norm.mean.flatten(), cache["norm_mean"].flatten(), rtol=0, atol=1e-11)
        torch.testing.assert_close(layer.norm.var.flatten(), cache["norm_var"].flatten(), rtol=0, atol=1e-11)
        assert layer.attention.position.tolist() == [position] * tokens.shape[0]
        for ours, theirs in ((layer.attention.k, cache["k_roped"]), (layer.attention.v, cache["v"])):
            torch.testing.assert_close(ours[:, :position].flatten(), theirs.flatten(), rtol=0, atol=1e-11)


@pytest.mark.parametrize("isa", mo._C.available_isas())
def test_golden_logits_float32(golden, isa, monkeypatch):
    model, io = golden
    active = mo._C.active_isa()
    mo._C.set_isa(isa)
    try:
        narrow = mo.Megalodon(model.config)
        narrow.load_state_dict(model.state_dict())
        logits = narrow(io["tokens"])
    finally:
        mo._C.set_isa(active)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), io["logits"], rtol=0, atol=5e-5)


@given(
    cuts=st.lists(st.integers(0, 37), max_size=6), options=st.sampled_from([{}, {"swiglu": True, "rescale_nffn": True}])
)
def test_any_split_streams_the_same(cuts, options):
    model, tokens = tiny_model(**options), tokens_of(2, 37)
    whole = model(tokens)
    bounds = [0, *sorted(cuts), 37]
    state, pieces = None, []
    for start, end in zip(bounds, bounds[1:]):
        logits, state = model(tokens[:, start:end], state=state, return_state=True)
        pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-12)


def test_rows_of_a_state_are_picked_by_tree_map():
    model, tokens, rows = tiny_model(), tokens_of(3, 21), torch.tensor([2, 0])
    with torch.no_grad():
        _, state = model(tokens[:, :10], return_state=True)
        whole, end = model(tokens[:, 10:], state=state, return_state=True)
        picked = tree_map(lambda tensor: tensor[rows], state)
        logits, end_of_picked = model(tokens[rows, 10:], state=picked, return_state=True)
    torch.testing.assert_close(logits, whole[rows], rtol=0, atol=1e-12)
    torch.testing.assert_close(end_of_picked, tree_map(lambda tensor: tensor[rows], end), rtol=0, atol=1e-12)


def test_packed_documents_equal_separate_ones():
    model, lengths = tiny_model(), [5, 1, 0, 19, 8]
    tokens = tokens_of(1, sum(lengths) + 3)  # three tokens of padding
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    packed, state = model(tokens, cu_seqlens=cu_seqlens, return_state=True)
    for s, length in enumerate(lengths):
        part = slice(int(cu_seqlens[s]), int(cu_seqlens[s + 1]))
        if length:
            alone, alone_state = model(tokens[:, part], return_state=True)
            torch.testing.assert_close(packed[:, part], alone, rtol=0, atol=1e-12)
            torch.testing.assert_close(state.layers[1].cema[s], alone_state.layers[1].cema[0], rtol=0, atol=1e-12)
    assert packed.isfinite().all()


def test_padding_changes_nothing():
    model, tokens = tiny_model(), tokens_of(3, 20)
    lengths = torch.tensor([20, 7, 0])
    other = tokens.clone()
    other[1, 7:], other[2] = 0, 0
    logits, state = model(tokens, lengths=lengths, return_state=True)
    changed, changed_state = model(other, lengths=lengths, return_state=True)
    torch.testing.assert_close(logits[1, :7], changed[1, :7], rtol=0, atol=0)
    torch.testing.assert_close(state.layers, changed_state.layers, rtol=0, atol=0)
    torch.testing.assert_close(logits[1, :7], model(tokens[1:2, :7])[0], rtol=0, atol=1e-12)


@pytest.fixture(params=[False, True], ids=["one-block", "blocks"])
def blocks(request, monkeypatch):
    """The loss of all tokens at once, and of 64 at a time."""
    if request.param:
        monkeypatch.setattr(loss, "_CPU_BLOCK", 1)


def test_golden_loss_and_gradients_in_blocks(golden, blocks):
    model, io = golden
    grads = load_file(DATA / "official_c_grads_f64.safetensors")
    found = model.loss(io["tokens"], io["targets"])
    torch.testing.assert_close(found, io["loss"].reshape(()), rtol=1e-12, atol=0)
    model.zero_grad()
    found.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[f"grad.{name}"], rtol=1e-9, atol=1e-11)


def test_loss_streams(blocks):
    model, tokens, targets = tiny_model(), tokens_of(4, 50), tokens_of(4, 51)[:, 1:]
    whole = model.loss(tokens, targets, reduction="none")
    torch.testing.assert_close(whole.mean(), model.loss(tokens, targets), rtol=1e-12, atol=0)
    first, state = model.loss(tokens[:, :20], targets[:, :20], reduction="none", return_state=True)
    torch.testing.assert_close(state, model(tokens[:, :20], return_state=True)[1], rtol=0, atol=0)
    rest = model.loss(tokens[:, 20:], targets[:, 20:], reduction="none", state=state)
    torch.testing.assert_close(torch.cat((first, rest), 1), whole, rtol=0, atol=1e-12)


def test_loss_counts_no_padding(blocks):
    model, tokens, targets = tiny_model(), tokens_of(4, 50), tokens_of(4, 51)[:, 1:].clone()
    targets[0, :9] = -100
    lengths, position = torch.tensor([50, 17, 0, 31]), torch.arange(50)
    inside = position < lengths[:, None]
    rows = F.cross_entropy(model(tokens, lengths=lengths)[inside], targets[inside])
    garbage = targets.where(inside, 10**6)
    torch.testing.assert_close(model.loss(tokens, garbage, lengths=lengths), rows, rtol=1e-12, atol=0)
    bytes_ = model.loss(tokens[1:], targets[1:].to(torch.uint8), lengths=lengths[1:])
    torch.testing.assert_close(bytes_, model.loss(tokens[1:], targets[1:], lengths=lengths[1:]), rtol=0, atol=0)

    row, row_targets, cu_seqlens = tokens.reshape(1, 200), targets.reshape(1, 200), torch.tensor([5, 60, 60, 190])
    documents = F.cross_entropy(model(row, cu_seqlens=cu_seqlens)[0, 5:190], row_targets[0, 5:190])
    row_targets[0, :5], row_targets[0, 190:] = -7, 10**6
    options = dict(cu_seqlens=cu_seqlens.int(), ignore_index=-100)
    torch.testing.assert_close(model.loss(row, row_targets, **options), documents, rtol=1e-12, atol=0)
    each = model.loss(row, row_targets, reduction="none", **options)
    assert not each[0, :5].any() and not each[0, 190:].any() and each.count_nonzero() == 185 - 4


def test_loss_of_a_16_bit_model_and_under_autocast(blocks):
    model, tokens = tiny_model(torch.float32), tokens_of(3, 41)
    wanted = model.loss(tokens[:, :-1], tokens[:, 1:])
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model.loss(tokens[:, :-1], tokens[:, 1:])
    mixed.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    narrow = model.bfloat16().loss(tokens[:, :-1], tokens[:, 1:])
    narrow.backward()
    assert all(p.grad.dtype == p.dtype for p in model.parameters())
    for found in (mixed, narrow):
        assert found.dtype == torch.float32 and found != wanted
        torch.testing.assert_close(found, wanted, rtol=0.02, atol=0)


def test_loss_compiles_to_one_graph(blocks):
    model, tokens = tiny_model(torch.float32, num_layers=1), tokens_of(4, 21)
    compiled = torch.compile(model.loss, fullgraph=True, backend="aot_eager")
    lengths = torch.tensor([20, 3, 11, 20])
    grads = []
    for function in (model.loss, compiled):
        found = function(tokens[:, :-1], tokens[:, 1:], lengths=lengths)
        grads.append((found.detach(), *torch.autograd.grad(found, tuple(model.parameters()))))
    torch.testing.assert_close(*grads)


def test_state_given_is_not_changed():
    model, tokens = tiny_model(), tokens_of(2, 12)
    _, state = model(tokens[:, :5], return_state=True)
    before = torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, state)
    model(tokens[:, 5:], state=state, return_state=True)
    torch.testing.assert_close(state, before, rtol=0, atol=0)


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
        linear = name.startswith("embed") or name.split(".")[-2] in {
            "wv",
            "wz",
            "wr",
            "wh1",
            "wh2",
            "fc1",
            "fc2",
            "output",
        }
        assert parameter.dtype == (dtype if linear else torch.float32), name
        if not linear:
            assert torch.equal(parameter, wide.get_parameter(name)), f"{name} was rounded on the way"
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


def test_compiles_to_one_graph():
    model, tokens = tiny_model(torch.float32, num_layers=1), tokens_of(2, 20)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens), model(tokens), rtol=1e-5, atol=1e-5)
    compiled(tokens).mean().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_shared_and_scaled_embedding():
    model = tiny_model(share_emb=True, scale_emb=True)
    assert model.output.output.weight is model.embed.weight
    assert model(tokens_of(1, 3)).shape == (1, 3, TINY["vocab_size"])


def test_greedy_generation_equals_repeated_forwards():
    model, prompt = tiny_model(), tokens_of(2, 19)  # more than two chunks
    expected = prompt
    with torch.no_grad():
        for _ in range(15):
            expected = torch.cat((expected, model(expected)[:, -1:].argmax(-1)), 1)
    assert torch.equal(model.generate(prompt, max_new_tokens=15, temperature=0), expected)


def test_generation_from_padded_prompts():
    model, prompt = tiny_model(), tokens_of(3, 19)
    lengths = torch.tensor([19, 4, 9])
    together = model.generate(prompt, max_new_tokens=6, temperature=0, lengths=lengths)
    assert together.shape == (3, 25)
    for row, length in enumerate(lengths.tolist()):
        alone = model.generate(prompt[row : row + 1, :length], max_new_tokens=6, temperature=0)
        assert torch.equal(together[row, : length + 6], alone[0]) and not together[row, length + 6 :].any()


@pytest.mark.parametrize("few", [1024, 2])
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.5}, {"top_k": 3}, {"top_k": 99}, {"top_p": 0.6}, {"top_p": 1.0}, {"top_k": 8, "top_p": 0.8}],
    ids=str,
)
def test_tokens_are_drawn_by_their_probabilities(monkeypatch, options, few):
    monkeypatch.setattr(model_module, "_FEW_TOKENS", few)
    model, draws = tiny_model(), 4000
    with torch.no_grad():
        logits = model(tokens_of(1, 1))[0, -1] / options.get("temperature", 1.0)
    probability, tokens = logits.softmax(0).sort(descending=True)
    probability[options.get("top_k", len(tokens)) :] = 0
    probability /= probability.sum()
    probability[probability.cumsum(0) - probability >= options.get("top_p", 1.0)] = 0
    probability /= probability.sum()
    generator = torch.Generator().manual_seed(3)
    drawn = model.generate(tokens_of(1, 1).expand(draws, 1), max_new_tokens=1, generator=generator, **options)[:, 1]
    share = drawn.bincount(minlength=len(tokens))[tokens] / draws
    assert not share[probability == 0].any()
    assert ((share - probability).abs() <= 5 * (probability * (1 - probability) / draws).sqrt()).all()


def test_draws_depend_on_the_generator_alone():
    model, prompt = tiny_model(), tokens_of(1, 1).expand(200, 1)
    draw = lambda seed: model.generate(prompt, max_new_tokens=2, generator=torch.Generator().manual_seed(seed))  # noqa: E731
    assert torch.equal(draw(7), draw(7)) and not torch.equal(draw(7), draw(8))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(torch.zeros(3, dtype=torch.long)), "`tokens` must be integers"),
        (lambda m: m(torch.zeros(1, 3)), "`tokens` must be integers"),
        (lambda m: m.loss(tokens_of(2, 3), tokens_of(1, 3)), "`targets` must have shape"),
        (lambda m: m.generate(torch.zeros(1, 0, dtype=torch.long), max_new_tokens=1), "L >= 1"),
        (lambda m: m.generate(tokens_of(1, 3)[0], max_new_tokens=1), "`prompt` must have shape"),
        (lambda m: m.generate(tokens_of(1, 3), max_new_tokens=-1), "`max_new_tokens`"),
        (lambda m: m.stream(tokens_of(1, 3), temperature=-1.0), "`temperature`"),
        (lambda m: m.stream(tokens_of(1, 3), temperature=math.nan), "`temperature`"),
        (lambda m: m.stream(tokens_of(2, 3), lengths=torch.tensor([3])), "`lengths` must have shape"),
        (lambda m: m.generate(tokens_of(1, 3), max_new_tokens=1, top_k=0), "`top_k`"),
        (lambda m: m.generate(tokens_of(1, 3), max_new_tokens=1, top_p=0.0), "`top_p`"),
        (lambda m: m.generate(tokens_of(1, 3), max_new_tokens=1, lengths=torch.tensor([4])), "`lengths`"),
    ],
)
def test_wrong_arguments_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny_model())
