"""`Decoder` has the bits of the layers in every configuration; see test_decoder_changes.py for changed modules."""

import copy
import gc
import threading
import weakref
from dataclasses import replace

import pytest
import torch
from assertions import assert_refuses
from decoding import DTYPES, assert_bits_of_layers, assert_equal, assert_error_of_the_layers, assert_same_bits
from decoding import by_decoder, by_layers, model_and_state
from fake_graphs import count, fake_graphs  # noqa: F401
from models import TINY, tiny_model, tokens_of
from torch.utils._pytree import tree_map_only

import megalodon_ops as mo
from backends import DEFAULT_ISA, each_isa, isa
from megalodon_ops.model import layers
from megalodon_ops.ops.linear import linear

VARIANTS = {
    "plain": {},
    "swiglu": dict(swiglu=True, rescale_nffn=True),
    "scaled, tied": dict(scale_emb=True, share_emb=True),
    "memory": dict(working_memory=True),
    "wide memory": dict(working_memory=True, model_dim=64, num_heads=2, z_dim=36, value_dim=78, chunk_size=3),
    "two chunks": dict(visible_chunks=2, chunk_size=6),
    "memory, two chunks": dict(working_memory=True, visible_chunks=2, chunk_size=3),
    "not affine": dict(norm_affine=False, cema_ndim=1),
    "wide": dict(
        model_dim=72, num_heads=3, z_dim=30, value_dim=51, ffn_hidden_dim=100, cema_ndim=17, norm_num_groups=8
    ),
}
pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(params=["recorded", "captured"])
def is_captured(request):
    """Run the test with steps that are recorded on the CPU, and with CUDA graphs, on emulated kernels."""
    if request.param == "captured":
        request.getfixturevalue("fake_graphs")
    return request.param == "captured"


@each_isa
@pytest.mark.parametrize("variant", VARIANTS)
def test_bits_are_those_of_the_layers(name, variant):
    """Each instruction set runs each variant, with one dtype in turn; the default set with all dtypes."""
    turn = [*VARIANTS].index(variant) % len(DTYPES)
    with isa(name):
        for dtype in DTYPES if name == DEFAULT_ISA else [DTYPES[turn]]:
            assert_bits_of_layers(*model_and_state(dtype, rows=3, **VARIANTS[variant]), rows=3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "length"), [(1, 1), (2, 3), (1, 8), (8, 1)])
@pytest.mark.parametrize("working_memory", [False, True])
def test_bits_are_those_of_the_layers_for_few_tokens(dtype, rows, length, working_memory):
    assert_bits_of_layers(*model_and_state(dtype, rows, working_memory=working_memory), rows, length)


@pytest.mark.parametrize(("length", "variant"), [(0, {}), (40, {}), (40, dict(visible_chunks=2, chunk_size=24))])
def test_more_tokens_than_the_kernels_for_few_take_run_through_the_layers(length, variant):
    """Also up to the end of the second chunk."""
    pieces = tokens_of(2, length + 6).split([1, length, 1, 1, 3], 1)
    assert_bits_of_layers(*model_and_state(rows=2, **variant), pieces=pieces)


def test_more_rows_than_the_kernels_for_few_take_run_through_the_layers():
    most = linear.most_few_rows(torch.float32)
    assert_bits_of_layers(*model_and_state(rows=most + 1), rows=most + 1, fused=False)
    assert_bits_of_layers(*model_and_state(rows=most), rows=most)


def test_given_and_returned_states_do_not_change():
    model, state = model_and_state()
    before = tree_map_only(torch.Tensor, torch.clone, state)
    decoder = mo.Decoder(model, state)
    decoder(tokens_of(1, 1))
    returned = decoder.state
    copied = tree_map_only(torch.Tensor, torch.clone, returned)
    decoder(tokens_of(1, 1))
    assert_same_bits((before, copied), (state, returned))


def test_a_state_without_residuals_counts_them_as_zero():
    model, state = model_and_state()
    drop_residual = lambda norm: norm._replace(residual=None)  # noqa: E731
    layers = tuple(layer._replace(norm=drop_residual(layer.norm)) for layer in state.layers)
    assert_bits_of_layers(model, mo.MegalodonState(layers, drop_residual(state.norm)), pieces=[tokens_of(1, 1)])


def test_parameters_need_not_be_contiguous():
    model, state = model_and_state()
    block = model.layers[0].mega
    block.wv.weight.data = block.wv.weight.data.t().contiguous().t()
    block.cema.alpha.data = block.cema.alpha.data.repeat_interleave(2, 1)[:, ::2]
    assert not block.wv.weight.is_contiguous()
    assert_bits_of_layers(model, state)


def test_parameters_changed_in_place_are_seen(is_captured):
    model, state = model_and_state()
    decoder, pieces = mo.Decoder(model, state), tokens_of(1, 5).split(1, 1)
    by_decoder(decoder, pieces[:3])
    state = decoder.state
    with torch.no_grad():
        model.layers[1].mega.wv.weight.mul_(1.5)
        model.output.output.weight.mul_(0.5)
    assert_equal(by_decoder(decoder, pieces[3:]), by_layers(model, state, pieces[3:]))


def test_a_decoder_made_in_inference_mode_works_outside():
    model, tokens = tiny_model(torch.float32).eval(), tokens_of(1, 8)
    with torch.inference_mode():
        _, state = model(tokens[:, :5], return_state=True)
        decoder = mo.Decoder(model, state)
        first = decoder(tokens[:, 5:6])
    second = decoder(tokens[:, 6:7])
    assert_same_bits([first, second], by_layers(model, state, tokens[:, 5:7].split(1, 1))[:2])


def test_calls_of_several_lengths_share_the_state(is_captured):
    """A length is captured when it comes a second time; more than 8 tokens of a row run through the layers."""
    model, state = model_and_state(rows=2)
    pieces = tokens_of(2, 30).split([1, 3, 1, 9, 3, 3, 1, 9], 1)
    assert_equal(by_decoder(mo.Decoder(model, state), pieces), by_layers(model, state, pieces))
    if is_captured:
        assert (count("capture"), count("replay")) == (2, 4)


def test_autocast_is_that_of_the_constructor():
    model, state = model_and_state()
    token = tokens_of(1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        _, state = model(tokens_of(1, 5), return_state=True)
        expected = by_layers(model, state, [token])[0]
        decoder = mo.Decoder(model, state)
    assert not decoder.fused and torch.equal(decoder(token), expected)


@pytest.mark.parametrize("autocast", [False, True])
def test_coefficients_are_computed_when_it_is_made(autocast, monkeypatch):
    calls, coefficients = [], layers.cema_coefficients
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model, state = model_and_state()
        monkeypatch.setattr(layers, "cema_coefficients", lambda *args: calls.append(args) or coefficients(*args))
        decoder = mo.Decoder(model, state)
    assert len(calls) == len(model.layers)
    for piece in tokens_of(1, 6).split([1, 1, 3, 1], 1):
        decoder(piece)
    assert len(calls) == len(model.layers)
    model(tokens_of(1, 1))
    assert len(calls) == 2 * len(model.layers)


def test_threads_do_not_change_its_bits(two_threads):
    model, state = model_and_state(rows=2)
    pieces = tokens_of(2, 3).split(1, 1)
    first = by_decoder(mo.Decoder(model, state), pieces)
    torch.set_num_threads(1)
    assert_same_bits(by_decoder(mo.Decoder(model, state), pieces), first)


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.filterwarnings("ignore:Decoder")
def test_threads_that_call_one_decoder_wait_for_each_other(hooked, is_captured):
    model, state = model_and_state()
    if hooked:
        model.layers[0].mega.wv.register_forward_hook(lambda module, args, y: y)
    decoder, token = mo.Decoder(model, state), tokens_of(1, 1)
    threads = [threading.Thread(target=lambda: [decoder(token) for _ in range(4)]) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_equal(decoder.state, by_layers(model, state, [token] * 12)[12:])
    if is_captured:
        assert count("capture") == (0 if hooked else 1)


def test_memory_is_freed_with_the_last_reference(is_captured):
    gc.disable()
    try:
        decoder = mo.Decoder(*model_and_state())
        by_decoder(decoder, tokens_of(1, 3).split(1, 1))
        held = weakref.ref(decoder._like), weakref.ref(decoder._steps[1])
        del decoder
        assert [reference() for reference in held] == [None, None]
    finally:
        gc.enable()


def test_layers_in_another_order_still_run_in_kernels():
    model, state = model_and_state(num_layers=3)
    model.layers = model.layers[::-1]
    assert_bits_of_layers(model, state)


def test_biases_may_be_added_and_removed():
    model, state = model_and_state()
    model.layers[0].mega.wz.bias = None
    model.layers[0].mega.wh2.bias = torch.nn.Parameter(torch.randn(TINY["model_dim"]))
    assert_bits_of_layers(model, state)


def test_dropout_in_training_runs_the_layers(is_captured):
    model, state = model_and_state(dropout=0.5)
    assert mo.Decoder(model, state).fused
    decoder = mo.Decoder(model.train(), state)
    by_decoder(decoder, tokens_of(1, 3).split(1, 1))
    assert not decoder.fused and not decoder._steps


def test_errors():
    model, state = model_and_state(rows=2)
    decoder, token = mo.Decoder(model, state), tokens_of(2, 1)
    for wrong in (token[0], token[:1], token.float(), token.bool(), token[None]):
        assert_refuses(ValueError, "Decoder", "tokens", lambda: decoder(wrong))  # noqa: B023
    used = mo.Decoder(model, state)  # it has recorded a step
    used(token)
    for wrong in (-1, TINY["vocab_size"]):
        for each in (decoder, used):
            with pytest.raises(IndexError, match=rf"Decoder: `tokens` must be in \[0, 31\), got {wrong}"):
                each(torch.full_like(token, wrong))
    assert torch.equal(used(token), by_layers(model, state, [token, token])[1])
    for wrong in ([0, 2], [-1, 0]):
        with pytest.raises(IndexError, match=r"Decoder: `rows` must be in \[0, 2\)"):
            decoder.reorder(torch.tensor(wrong))
    assert_same_bits(by_decoder(decoder, [token]), by_layers(model, state, [token]))
    one_layer = replace(state, layers=state.layers[:1])
    for wrong in (None, (*vars(state).values(),), one_layer, state.to("meta")):
        assert_refuses(ValueError, "Decoder", "state", lambda: mo.Decoder(model, wrong))  # noqa: B023
    for name in ("layers.1.mega.cema.alpha", "layers.0.mega.wv.weight", "layers.0.nffn.norm.bias", "embed.weight"):
        for change in (torch.Tensor.double, lambda t: t[None]):
            broken = copy.deepcopy(model)
            broken.get_parameter(name).data = change(broken.get_parameter(name).data)
            assert_error_of_the_layers(broken, state, token)

    def with_layer(**fields):
        return replace(state, layers=(state.layers[0]._replace(**fields), *state.layers[1:]))

    norm, attention = state.layers[0].norm, state.layers[0].attention
    far = attention.position + 100
    _, other = model_and_state(rows=2, chunk_size=TINY["chunk_size"] + 1)
    for name, wrong in {
        "state.layers.0.norm.count": with_layer(norm=norm._replace(count=norm.count - 100)),
        "state.layers.0.norm.mean": with_layer(norm=norm._replace(mean=norm.mean[:1])),
        "state.layers.0.cema": with_layer(cema=state.layers[0].cema[:1]),
        "state.layers.0.attention.position": with_layer(attention=attention._replace(position=far)),
        "state.layers.0.attention.k": other,
    }.items():
        assert_refuses(ValueError, "Decoder", name, lambda: mo.Decoder(model, wrong))  # noqa: B023
    assert_error_of_the_layers(model, state.to(torch.float64), token)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_tokens_of_other_types_and_strides(dtype):
    model, state = model_and_state(rows=2)
    tokens = tokens_of(2, 8).to(dtype)
    pieces = [tokens[:, i : i + 2] for i in range(0, 8, 2)]
    expected = by_layers(model, state, [piece.long().contiguous() for piece in pieces])
    assert_same_bits(by_decoder(mo.Decoder(model, state), pieces), expected)


def test_replaced_rows_go_on_as_in_a_decoder_of_their_own():
    """To the bit; the other rows do not change, and beams of replaced rows share nothing with older ones."""
    for variant in ("plain", "memory, two chunks"):
        model, state = model_and_state(rows=3, **VARIANTS[variant])
        tokens = tokens_of(3, 9)
        _, others = model(tokens[:, :7], return_state=True)
        decoder = mo.Decoder(model, state)
        single = [mo.Decoder(model, state[[row]]) for row in range(3)]
        decoder(tokens[:, :1])
        for row, one in enumerate(single):
            one(tokens[[row], :1])
        decoder.reorder(torch.tensor([0, 0, 2]))
        single[1] = mo.Decoder(model, single[0].state)
        decoder.replace(torch.tensor([2, 0]), others[[1, 0]])
        single[2] = mo.Decoder(model, others[[1]])
        single[0] = mo.Decoder(model, others[[0]])
        for t in range(1, 5):
            found = decoder(tokens[:, t : t + 1])
            for row, one in enumerate(single):
                assert torch.equal(found[[row]], one(tokens[[row], t : t + 1])), (variant, t, row)
        decoder.reorder(torch.tensor([2, 2, 2]))
        single = [mo.Decoder(model, single[2].state) for _ in range(3)]
        found = decoder(tokens[:, :1])
        assert all(torch.equal(found[[row]], one(tokens[[row], :1])) for row, one in enumerate(single))
    longer = model_and_state(rows=1, **VARIANTS[variant] | dict(chunk_size=24))[1]
    for rows, wrong, message in (
        (torch.tensor([0, 0]), others[:2], "`rows` must be different integers"),
        (torch.tensor([0]), others[:2], "`state` must have 1 sequences, as many as `rows`, got 2"),
        (torch.tensor([3]), others[:1], r"`rows` must be in \[0, 3\), got \[3\]"),
        (torch.tensor([0]), others[:1].to(torch.float64), "must be torch.float32 beside the other tensors"),
        (torch.tensor([0]), longer[:1], r"`state.layers.0.attention.k` must have shape .* got \(1, 48,"),
    ):
        with pytest.raises((ValueError, IndexError, TypeError), match=message):
            decoder.replace(rows, wrong)
