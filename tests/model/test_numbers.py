"""Models that read numbers: their scale, missing values, states and refusals.

tests/distributed has them on several ranks, tests/model/test_encoder.py the encoder beside a plain model.
"""

import copy

import pytest
import torch
from assertions import assert_close, every_case
from models import TINY, tiny_model, tokens_of
from torch import Tensor

import megalodon_ops as mo
from megalodon_ops.evaluation import evaluate
from megalodon_ops.model.model_state import named_tensors

FORMS = {
    "scaled": {},
    "missing values": dict(missing_values=True),
    "as they are": dict(scale_inputs=False),
    "memory, two chunks": dict(working_memory=True, visible_chunks=2, missing_values=True),
}
CHANGES = {
    "x + 10": lambda x: x + 10,
    "1000 x": lambda x: 1000 * x,
    "0.001 x": lambda x: 0.001 * x,
    "-3e4 + 1e-4 x": lambda x: -3e4 + 1e-4 * x,
}


def model_of_numbers(**options) -> mo.Megalodon:
    return tiny_model(num_features=3, output_size=5, **options)


def encoder_of_numbers(**options) -> mo.MegalodonEncoder:
    torch.manual_seed(0)
    return mo.MegalodonEncoder(mo.MegalodonEncoderConfig(**TINY, num_features=3, num_classes=4, **options)).double()


def series(model: torch.nn.Module, *shape: int, seed: int = 1) -> Tensor:
    """Random walks, with gaps if the model takes them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, 3, dtype=torch.float64, generator=generator).cumsum(1)
    if model.config.missing_values:
        x[torch.rand(x.shape, generator=generator) < 0.3] = torch.nan
    return x


@pytest.mark.parametrize("form", FORMS)
def test_pieces_padding_and_packing_equal_whole_rows(form):
    model, lengths = model_of_numbers(**FORMS[form]), torch.tensor([30, 17])
    x = series(model, 2, 30)
    whole, end = model(x, lengths=lengths, return_state=True)
    assert whole.shape == (2, 30, 5) and model.features(x).shape == (2, 30, TINY["model_dim"])
    padded = x.clone()
    padded[1, 17:] = torch.inf
    assert torch.equal(model(padded, lengths=lengths)[1, :17], whole[1, :17])
    first, state = model(x[:, :13], return_state=True)
    second, after = model(x[:, 13:], state=state, return_state=True, lengths=lengths - 13)
    assert_close(torch.cat([first, second], 1)[1, :17], whole[1, :17], tolerance=1e-11)
    for (name, found), expected in zip(named_tensors(after).items(), named_tensors(end).values(), strict=True):
        if name.startswith(("inputs.", "norm.")):
            assert_close(found, expected, tolerance=1e-11)
    packed, offsets = torch.cat([x[0], x[1, :17]])[None], torch.tensor([0, 30, 47])
    found, states = model(packed, cu_seqlens=offsets, return_state=True)
    assert_close(found[0, 30:], whole[1, :17], tolerance=1e-11)
    rows = states[[1, 0]].reset([1])  # the second sequence goes on, a new one begins
    more = series(model, 2, 4, seed=2)
    expected = torch.cat([model(more[:1], state=states[[1]]), model(more[1:])])
    assert_close(model(more, state=rows), expected, tolerance=1e-11)


def test_outputs_do_not_depend_on_the_units_of_the_inputs():
    with every_case() as case:
        for form in ("scaled", "missing values"):
            for model in (model_of_numbers(**FORMS[form]), encoder_of_numbers(**FORMS[form])):
                x, lengths = series(model, 2, 30), torch.tensor([30, 17])
                expected = model(x, lengths=lengths)[:, :17]
                for name, change in CHANGES.items():
                    with case(type(model).__name__, form, name):
                        found = model(change(x), lengths=lengths)[:, :17]
                        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
        with case("as they are"):
            model = model_of_numbers(scale_inputs=False)
            x = series(model, 1, 30)
            assert (model(x + 10) - model(x)).abs().max() > 0.01


def test_a_constant_feature_reads_as_zeros():
    """The value of a constant does not matter, however large, and rounding makes no noise of it."""
    with every_case() as case:
        for model in (model_of_numbers(), encoder_of_numbers(), model_of_numbers(missing_values=True)):
            x = series(model, 2, 100)
            x[..., 1] = 0
            expected = model(x)
            for value in (0.1, 1e6 + 0.1, -1e12 / 7, 1e-9):
                with case(type(model).__name__, value):
                    x[..., 1] = value
                    assert torch.equal(model(x), expected)


def test_missing_values_count_in_no_statistic_and_get_no_gradient():
    model = model_of_numbers(missing_values=True)
    x = series(model, 1, 40)
    mean, deviation = model.input_scale(x)
    present = [column[~column.isnan()] for column in x[0].T]
    assert (
        x[0, :2].isnan().any() and x[0, -3:].isnan().any()
    )  # before any statistics, and with those of an earlier value
    assert_close(mean[0, -1], torch.stack([column.mean() for column in present]), tolerance=1e-12)
    assert_close(deviation[0, -1], torch.stack([column.std(correction=0) for column in present]), tolerance=1e-12)
    _, state = model(x[:, :13], return_state=True)
    for found, whole in zip(model.input_scale(x[:, 13:], state=state), (mean, deviation), strict=True):
        assert_close(found, whole[:, 13:], tolerance=1e-12)
    leaf = x.clone().requires_grad_()
    model(leaf).square().sum().backward()
    assert leaf.grad.isfinite().all() and not leaf.grad[x.isnan()].any() and leaf.grad[~x.isnan()].count_nonzero() > 60
    assert (model(torch.where(x.isnan(), mean, x)) - model(x)).abs().max() > 1e-3  # a flag tells them apart
    assert model(torch.full_like(x, torch.nan)).isfinite().all()


def test_outputs_return_to_the_units_of_the_data():
    """`input_scale` gives mean and deviation of the values so far, also in a piece that continues a state."""
    model = model_of_numbers()
    x = 7 + 3 * series(model, 2, 30)
    mean, deviation = model.input_scale(x)
    assert_close(mean[:, 9], x[:, :10].mean(1), tolerance=1e-12)
    assert_close(deviation[:, 9], x[:, :10].std(1, correction=0), tolerance=1e-12)
    _, state = model(x[:, :13], return_state=True)
    again = model.input_scale(x[:, 13:], state=state)
    assert_close(again[0], mean[:, 13:], tolerance=1e-12)
    assert_close(again[1], deviation[:, 13:], tolerance=1e-12)
    scaled = torch.where(deviation > 1e-12, (x - mean) / deviation, 0)
    same = model_of_numbers(scale_inputs=False)
    assert_close(same(scaled), model(x), tolerance=1e-10)


def test_files_hold_models_and_states(tmp_path):
    for form, options in FORMS.items():
        model = model_of_numbers(**options)
        model.save(tmp_path / form)
        again = mo.Megalodon.load(tmp_path / form)
        x = series(model, 2, 20)
        expected, state = model(x, return_state=True)
        assert again.config == model.config and torch.equal(again(x), expected)
        assert model.num_parameters() == model.config.num_parameters()
        state.save(tmp_path / "state", model.config)
        read = mo.MegalodonState.load(tmp_path / "state", model.config)
        assert torch.equal(model(x, state=read), model(x, state=state))
        fresh = mo.MegalodonState.fresh(model.config, 2, dtype=torch.float64)
        assert_close(model(x, state=fresh), expected, tolerance=1e-11)
        both = mo.MegalodonState.cat([state, fresh])
        expected = model(x[1:], state=state[[0]])
        assert_close(model(x, state=both[[1, 0]])[1:], expected, tolerance=1e-11)


@torch.no_grad()
def test_a_decoder_gives_the_bits_of_the_layers():
    for form, options in FORMS.items():
        for dtype in (torch.float32, torch.bfloat16):
            model = model_of_numbers(**options).to(dtype)
            x = series(model, 2, 24)
            _, state = model(x[:, :5], return_state=True)
            decoder = mo.Decoder(model, state)
            assert decoder.fused
            for i, piece in enumerate(x[:, 5:].split([1, 1, 2, 1, 7, 1, 6], 1)):
                piece = piece.float() if i == 1 else piece
                y, state = model(piece, state=state, return_state=True)
                assert torch.equal(decoder(piece), y), (form, dtype, i)
            decoder.reorder(torch.tensor([1, 1]))
            more = series(model, 1, 1, seed=3).expand(2, 1, 3)
            assert torch.equal(decoder(more), model(more, state=state[[1, 1]]))
    with pytest.raises(ValueError, match=r"Decoder: `tokens` must have 2 rows, got \(1, 1, 3\)"):
        decoder(x[:1, :1])
    with pytest.raises(ValueError, match=r"Decoder: `tokens` must be finite, got inf at \[0, 0, 0\]"):
        decoder(torch.full((2, 1, 3), torch.inf))


def test_float32_inputs_keep_the_digits_of_the_data():
    model = model_of_numbers().float()
    x = series(model, 1, 50)
    assert_close(model((x + 1e9)), model(x), tolerance=1e-5)  # float64 data, as of time stamps
    assert model(x.bfloat16()).dtype == torch.float32


def test_compiled_and_recomputed_models_give_the_same():
    for form in ("scaled", "missing values"):
        model = model_of_numbers(**FORMS[form], layerwise_ckpt=True).train()
        x = series(model, 2, 20)
        expected = torch.autograd.grad(model(x).square().sum(), [*model.parameters()])
        compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
        found = torch.autograd.grad(compiled(x).square().sum(), [*compiled.parameters()])
        for a, b in zip(found, expected, strict=True):
            assert_close(a, b, tolerance=1e-10)


def test_small_weights_leave_the_input_map_as_it_is(tmp_path):
    with every_case() as case:
        for kind, form in zip(("int8", "int4"), ({}, dict(missing_values=True))):
            with case(kind):
                model = model_of_numbers(**form).float().eval()
                small, x = mo.quantize(model, kind), series(model, 2, 30)
                assert all(torch.equal(*pair) for pair in zip(small.embed.parameters(), model.embed.parameters()))
                assert small.layers[0].mega.wv.weight.dtype == (torch.int8 if kind == "int8" else torch.uint8)
                with torch.no_grad():
                    expected, (found, state) = model(x), small(x, return_state=True)
                    error = (found - expected).std() / expected.std()
                    assert 0 < error < (0.05 if kind == "int8" else 0.4)
                    small.save(tmp_path / kind)
                    loaded = mo.Megalodon.load(tmp_path / kind)
                    assert torch.equal(loaded(x), found) and loaded.quantization == kind
                    decoder, more = mo.Decoder(loaded, state), series(model, 2, 3, seed=2)
                    assert torch.equal(decoder(more[:, :1]), small(more[:, :1], state=state))
                    assert decoder.fused


def test_what_only_text_has_is_refused_by_name(tmp_path):
    model, text = model_of_numbers(), tiny_model()
    x, tokens = series(model, 1, 8), tokens_of(1, 8)
    _, state = model(x, return_state=True)
    reads_numbers = "`num_features` of the model must be None, got 3; it reads numbers"
    not_numbers = r"must be floating-point numbers \(B, L, 3\), got torch.int64"
    no_scale = "must have num_features and scale_inputs"
    no_flag = "`missing_values` must be False without num_features and"
    with_nan, with_inf = x.clone(), x.clone()
    with_nan[0, 5, 1] = torch.nan
    with_inf[0, 5, 1] = -torch.inf
    refused = [
        (reads_numbers, lambda: model.generate(x, max_new_tokens=1)),
        (reads_numbers, lambda: model.stream(x)),
        (reads_numbers, lambda: model.loss(x, tokens)),
        (reads_numbers, lambda: mo.save_official(model, tmp_path / "official")),
        (not_numbers, lambda: model(tokens)),
        (not_numbers, lambda: evaluate(model, [[1, 2]])),
        (r"finite, got nan at \[0, 5, 1\]; a model with missing_values=True takes NaN", lambda: model(with_nan)),
        (r"finite, got -inf at \[0, 5, 1\]", lambda: model_of_numbers(missing_values=True)(with_inf)),
        ("with None scaled features, got one with 3", lambda: text(tokens, state=state)),
        (no_scale, lambda: text.input_scale(x)),
        (no_scale, lambda: model_of_numbers(scale_inputs=False).input_scale(x)),
        (no_flag, lambda: mo.MegalodonConfig(missing_values=True)),
        (no_flag, lambda: model_of_numbers(missing_values=True, scale_inputs=False)),
        ("`share_emb` must be False", lambda: model_of_numbers(share_emb=True)),
        ("`eos_token_id` must be None", lambda: model_of_numbers(eos_token_id=1)),
    ]
    with every_case() as case:
        for i, (message, call) in enumerate(refused):
            with case(i), pytest.raises(ValueError, match=message):
                call()
