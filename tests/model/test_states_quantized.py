"""States with keys and values of 8 bits: decoding, generation, rows, files, and models that refuse them."""

from dataclasses import replace

import pytest
import torch
from assertions import every_case
from backends import each_isa, isa
from decoding import assert_bits_of_layers, assert_equal, by_decoder, model_and_state
from models import tiny_model, tokens_of

import megalodon_ops as mo
from megalodon_ops.storage.files import FileError
from megalodon_ops.model.model_state import named_tensors
from megalodon_ops.ops.common.quantized_rows import unpack_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
VARIANTS = {
    "plain": {},
    "two chunks": dict(visible_chunks=2),
    "wide": dict(model_dim=136, num_heads=2, z_dim=20, value_dim=50, ffn_hidden_dim=129, norm_num_groups=8),
}
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def model_and_small_state(dtype=torch.float32, **overrides):
    model, state = model_and_state(dtype, rows=3, **overrides)
    return model, state.quantize_cache()


@each_isa
def test_decoder_has_the_bits_of_the_layers(name):
    """Across the ends of chunks; rows of one token and of several."""
    with isa(name), every_case() as each:
        for i, (variant, options) in enumerate(VARIANTS.items()):
            for length in (1, 2, 6):
                with each(variant, length):
                    model, state = model_and_small_state(DTYPES[(i + length) % 3], **options)
                    assert_bits_of_layers(model, state, rows=3, length=length)


def test_small_weights_decode_with_it():
    model, state = model_and_small_state(torch.bfloat16)
    assert_bits_of_layers(mo.quantize(model, "int4"), state, rows=3)


def test_decoder_takes_back_reorders_and_replaces():
    model, state = model_and_small_state(chunk_size=8)
    tokens, rows = tokens_of(3, 9), torch.tensor([2, 2, 0])
    decoder, other = mo.Decoder(model, state, undo=4), mo.Decoder(model, state)
    decoder(tokens[:, :5])  # ends a chunk
    decoder.undo(4)
    other(tokens[:, :1])
    assert_equal(decoder.state, other.state)
    decoder.reorder(rows)
    reordered = other.state[rows]
    assert_equal(decoder.state, reordered)
    decoder.replace(torch.tensor([1]), state[[0]])
    assert_equal(decoder.state, mo.MegalodonState.cat([reordered[[0]], state[[0]], reordered[[2]]]))
    assert decoder.state.cache_dtype == torch.int8


def test_keys_and_values_stand_for_those_of_the_exact_state():
    """Prompts read at once, and token by token: equal up to the rounding."""
    model, tokens = tiny_model(torch.float32, chunk_size=16).eval(), tokens_of(2, 30)
    fresh = mo.MegalodonState.fresh(model.config, 2, cache_dtype=torch.int8)
    with torch.no_grad():
        logits, exact = model(tokens, return_state=True)
        at_once, state = model(tokens, state=fresh, return_state=True)
    assert torch.equal(at_once, logits) and state.cache_dtype == torch.int8 and exact.cache_dtype == torch.float32
    for layer, small in zip(exact.quantize_cache().layers, state.layers, strict=True):
        seen = 30 % 16
        assert torch.equal(layer.attention.k[:, :seen], small.attention.k[:, :seen])
        assert torch.equal(layer.attention.v[:, :seen], small.attention.v[:, :seen])
    for layer, small in zip(exact.layers, state.layers, strict=True):
        for x, y in zip(layer.attention[:2], small.attention[:2], strict=True):
            assert 0 < (unpack_rows(y) - x).abs().max() <= x.abs().max() / 254 * 1.001
    decoded = torch.cat(by_decoder(mo.Decoder(model, fresh), tokens.split(1, 1))[:30], 1)
    assert 0 < (decoded - logits).std() < 0.01 * logits.std()


def test_generate_keeps_8_bits():
    model, prompt = tiny_model(torch.float32).eval(), tokens_of(2, 11)
    fresh = mo.MegalodonState.fresh(model.config, 2, cache_dtype=torch.int8)
    options = dict(max_new_tokens=9, seed=3)
    tokens, state = model.generate(prompt, cache_dtype=torch.int8, return_state=True, **options)
    assert state.cache_dtype == torch.int8
    with every_case() as each:
        with each("a state of 8 bits"):
            again, after = model.generate(prompt, state=fresh, return_state=True, **options)
            assert torch.equal(again, tokens)
            assert_equal(after, state)
        with each("a state that is not of 8 bits yet"):
            _, exact = model.generate(prompt, max_new_tokens=1, seed=3, return_state=True)
            more = dict(max_new_tokens=8, seed=3, return_state=True)
            found, after = model.generate(tokens[:, 11:12], state=exact, cache_dtype=torch.int8, **more)
            assert torch.equal(found[:, 1:], tokens[:, 12:]) and after.cache_dtype == torch.int8
        with each("several samples, a draft"):
            _, state = model.generate(
                prompt[:1], num_samples=3, cache_dtype=torch.int8, draft="prompt", return_state=True, **options
            )
            assert state.num_sequences == 3 and state.cache_dtype == torch.int8


@pytest.mark.parametrize("working_memory", [False, True])
def test_quantised_models_generate_with_8_bits(working_memory):
    small, prompt = mo.quantize(tiny_model(torch.float32, working_memory=working_memory), "int8"), tokens_of(2, 11)
    options = dict(max_new_tokens=9, temperature=0, return_state=True)
    tokens, state = small.generate(prompt, **options)
    expected = torch.float32 if working_memory else torch.int8
    assert state.cache_dtype == expected
    same, after = small.generate(prompt, cache_dtype=expected, **options)
    assert torch.equal(same, tokens)
    assert_equal(after, state)
    _, exact = small.generate(prompt, cache_dtype=torch.float32, **options)
    _, continued = small.generate(tokens[:, -1:], state=exact, **options)
    assert exact.cache_dtype == continued.cache_dtype == torch.float32


def test_rows_files_and_casts_keep_8_bits(tmp_path):
    model, state = model_and_small_state()
    state.save(tmp_path / "state", model.config)
    results = {
        "loaded": (mo.MegalodonState.load(tmp_path / "state", model.config), state),
        "cast": (state.to(torch.bfloat16), state),
        "again": (state.quantize_cache(), state),
        "joined": (mo.MegalodonState.cat([state[[1, 0]], state[2:]])[[1, 0, 2]], state),
        "reset": (state.reset([0, 1, 2]), mo.MegalodonState.fresh(model.config, 3, cache_dtype=torch.int8)),
    }
    with every_case() as each:
        for name, (found, expected) in results.items():
            with each(name):
                assert_equal(found, expected)
    named_tensors(state)["layers.1.attention.v"][0, 0, 0, -4:] = -1  # NaN
    with pytest.raises(ValueError, match=r"MegalodonState.save: .*`layers.1.attention.v` must be finite"):
        state.save(tmp_path / "state", model.config)
    other = tiny_model(torch.float32, value_dim=32).config
    with pytest.raises(FileError, match="another configuration: its `value_dim`"):
        mo.MegalodonState.load(tmp_path / "state", other)


def test_gradients_flow_through_the_call_and_not_into_the_cache():
    model, state = model_and_small_state()
    model.train()
    layers = []
    for layer in state.layers:
        k, v = unpack_rows(layer.attention.k), unpack_rows(layer.attention.v)
        layers.append(layer._replace(attention=layer.attention._replace(k=k, v=v)))
    exact = replace(state, layers=tuple(layers))
    grads = []
    for past in (state, exact):
        model.loss(tokens_of(3, 12), tokens_of(3, 12), state=past).backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
        model.zero_grad()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-4, atol=1e-6)


def test_what_cannot_have_8_bits_is_refused():
    model, prompt = tiny_model().eval(), tokens_of(1, 3)
    with_memory = tiny_model(torch.float32, working_memory=True).eval()
    _, wide = model(prompt, return_state=True)
    _, memory = with_memory(prompt, return_state=True)
    small = dict(cache_dtype=torch.int8)
    single = tiny_model(torch.float32).eval()
    eight = mo.MegalodonState.fresh(model.config, 1, **small)
    calls = {
        "generate: `cache_dtype` must be torch.int8 or None, as `state` has 8 bits, got torch.float32": lambda: (
            single.generate(prompt, max_new_tokens=1, state=eight, cache_dtype=torch.float32)
        ),
        "MegalodonState.quantize_cache: .* float64 activations, got torch.int8": wide.quantize_cache,
        "MegalodonState.quantize_cache: .* a working memory, .* got torch.int8": memory.quantize_cache,
        "MegalodonState.fresh: .* a working memory, .* got torch.int8": lambda: mo.MegalodonState.fresh(
            with_memory.config, 1, **small
        ),
        "MegalodonState.fresh: `cache_dtype` must be torch.int8, torch.float32 or None, got torch.float16": lambda: (
            mo.MegalodonState.fresh(model.config, 1, cache_dtype=torch.float16)
        ),
        "generate: .* float64 activations, got torch.int8": lambda: model.generate(prompt, max_new_tokens=1, **small),
        "generate: `cache_dtype` must be torch.int8, torch.float64 or None, got 'int8'": lambda: model.generate(
            prompt, max_new_tokens=1, cache_dtype="int8"
        ),
    }
    with every_case() as each:
        for message, call in calls.items():
            with each(message), pytest.raises(ValueError, match=message):
                call()
