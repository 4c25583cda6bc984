"""Generation: prompts, independence of rows, stops, and continuation from a state."""

import itertools
import math
from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from assertions import assert_refuses
from hypothesis import given
from models import TINY, tiny_model, tokens_of
from torch.utils._pytree import tree_leaves

import megalodon_ops as mo

PROMPT = tokens_of(5, 19)
LENGTHS = torch.tensor([19, 1, 8, 9, 12])  # more than two chunks, a token, a chunk, and others
SAMPLED = dict(top_k=9, top_p=0.95)


@pytest.fixture(scope="module")
def model():
    return tiny_model().eval()


def padded(padding, value=0, prompts=PROMPT, lengths=LENGTHS):
    """Return the prompts in rows of one length, with `value` as padding."""
    rows = torch.full_like(prompts, value)
    for row, length in enumerate(lengths):
        columns = slice(0, length) if padding == "right" else slice(rows.shape[1] - length, None)
        rows[row, columns] = prompts[row, :length]
    return rows


def single_row(model, row, count, **options):
    """Generate a row's new tokens by itself."""
    length = int(LENGTHS[row])
    return model.generate(PROMPT[row : row + 1, :length], max_new_tokens=count, **options)[0, length:]


def assert_states_close(found, expected):
    for a, b in zip(tree_leaves(valid_part(found)), tree_leaves(valid_part(expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def valid_part(state):
    """Return the state with zeros for keys and values beyond each row's position, left over from earlier chunks."""
    layers = []
    for layer in state.layers:
        k, v, position = layer.attention
        is_valid = (torch.arange(k.shape[1]) < position[:, None])[..., None, None]
        layers.append(layer._replace(attention=layer.attention._replace(k=k * is_valid, v=v * is_valid)))
    return replace(state, layers=tuple(layers))


def test_greedy_generation_equals_repeated_forwards(model):
    expected = tokens_of(2, 19)
    with torch.no_grad():
        for _ in range(15):
            expected = torch.cat((expected, model(expected)[:, -1:].argmax(-1)), 1)
    assert torch.equal(model.generate(tokens_of(2, 19), max_new_tokens=15, temperature=0), expected)


@given(
    lengths=st.lists(st.integers(1, 19), min_size=1, max_size=5),
    padding=st.sampled_from(["left", "right"]),
    count=st.integers(0, 11),
    filler=st.sampled_from([0, -100]),
    options=st.sampled_from([dict(temperature=0), dict(seed=3), dict(seed=3, **SAMPLED, min_p=0.01)]),
)
def test_rows_of_a_padded_batch_are_those_of_single_runs(model, lengths, padding, count, filler, options):
    rows, ends = tokens_of(len(lengths), 19), torch.tensor(lengths)
    prompt = padded(padding, filler, rows, lengths)
    found, after = model.generate(
        prompt, max_new_tokens=count, lengths=ends, padding=padding, return_lengths=True, **options
    )
    assert found.shape == (len(lengths), 19 + count) and torch.equal(after, ends + count)
    for row, length in enumerate(lengths):
        own = options if "seed" not in options else {**options, "seed": options["seed"] + row}
        expected = model.generate(rows[row : row + 1, :length], max_new_tokens=count, **own)[0]
        start = 19 - length if padding == "left" else 0
        assert torch.equal(found[row, start : start + length + count], expected)
        assert not found[row, :start].any() and not found[row, start + length + count :].any()


def test_more_rows_than_the_kernels_for_few_take(model):
    prompt = tokens_of(40, 10)
    found = model.generate(prompt, max_new_tokens=5, seed=list(range(100, 140)))
    for row in (0, 17, 39):
        single = model.generate(prompt[row : row + 1], max_new_tokens=5, seed=100 + row)
        assert torch.equal(found[row : row + 1], single)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("length", [1, 9])
def test_other_dtypes_and_autocast(dtype, length):
    model, prompt = tiny_model(torch.float32).eval(), tokens_of(2, length).int()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        found, state = model.generate(prompt, max_new_tokens=9, seed=0, return_state=True)
    assert found.dtype == torch.int32 and state.layers[0].attention.k.dtype == dtype
    assert model.to(torch.bfloat16).generate(prompt, max_new_tokens=9, seed=0).shape == found.shape


def test_a_prompt_is_read_once_and_in_pieces_of_a_chunk():
    model, shapes = tiny_model(), []
    with pytest.warns(UserWarning, match="`embed` is not as the configuration makes it"):
        model.embed.register_forward_hook(lambda module, inputs, output: shapes.append(inputs[0].shape))
        model.generate(tokens_of(1, 50), max_new_tokens=3, num_samples=6, seed=0)
    prompt, decoded = shapes[:-3], shapes[-3:]
    assert sum(math.prod(shape) for shape in prompt) == 49 and max(shape[1] for shape in prompt) == TINY["chunk_size"]
    assert [tuple(shape) for shape in decoded] == [(6, 1)] * 3


def test_samples_of_a_prompt(model):
    found, lengths = model.generate(
        padded("left"), lengths=LENGTHS, padding="left", max_new_tokens=8, num_samples=3, seed=50, return_lengths=True
    )
    assert found.shape == (15, 27) and torch.equal(lengths, LENGTHS.repeat_interleave(3) + 8)
    for row in range(5):
        samples = found[3 * row : 3 * row + 3, 19:]
        assert len({tuple(sample) for sample in samples.tolist()}) == 3
        for i, sample in enumerate(samples):
            assert torch.equal(sample, single_row(model, row, 8, seed=50 + 3 * row + i))


class TestContinuation:
    """5 new tokens and 5 more are the 10 of one call."""

    @pytest.mark.parametrize("options", [dict(temperature=0), dict(seed=4)], ids=["greedy", "seed"])
    def test_equals_one_call(self, model, options):
        whole, end = model.generate(PROMPT, lengths=LENGTHS, max_new_tokens=10, return_state=True, **options)
        first, lengths, state = model.generate(
            PROMPT, lengths=LENGTHS, max_new_tokens=5, return_state=True, return_lengths=True, **options
        )
        last = first.gather(1, lengths[:, None] - 1)
        more, after = model.generate(last, max_new_tokens=5, state=state, return_state=True, **options)
        for row, length in enumerate(lengths.tolist()):
            assert torch.equal(torch.cat([first[row, :length], more[row, 1:]]), whole[row, : length + 5])
        assert_states_close(after, end)

    def test_the_state_is_that_of_all_tokens_but_the_last(self, model):
        found, state = model.generate(PROMPT[:1], max_new_tokens=6, seed=0, return_state=True)
        with torch.no_grad():
            _, expected = model(found[:, :-1], return_state=True)
        assert_states_close(state, expected)

    def test_no_new_tokens_read_the_prompt_but_its_last(self, model):
        found, state = model.generate(PROMPT[:2], max_new_tokens=0, return_state=True)
        assert torch.equal(found, PROMPT[:2]) and state.norm.count.tolist() == [18, 18]

    def test_a_state_from_the_model_is_continued_and_not_changed(self, model):
        with torch.no_grad():
            _, state = model(PROMPT[:, :7], return_state=True)
        before = state.clone()
        found = model.generate(PROMPT[:, 7:], state=state, max_new_tokens=9, seed=2)
        assert torch.equal(found[:, 12:], model.generate(PROMPT, max_new_tokens=9, seed=2)[:, 19:])
        assert all(torch.equal(a, b) for a, b in zip(tree_leaves(state), tree_leaves(before), strict=True))

    def test_samples_equal_repeated_rows_of_a_state(self, model):
        with torch.no_grad():
            _, state = model(PROMPT[:2, :7], return_state=True)
        prompt = PROMPT[:2, 7:11]
        samples = model.generate(prompt, state=state, num_samples=2, max_new_tokens=6, seed=9)
        rows = [0, 0, 1, 1]
        assert torch.equal(samples, model.generate(prompt[rows], state=state[rows], max_new_tokens=6, seed=9))

    def test_states_of_stopped_rows_end_at_their_stops(self, model):
        stops = [t for t in range(TINY["vocab_size"]) if t % 3 == 0]
        options = dict(lengths=LENGTHS, max_new_tokens=12, seed=1, return_lengths=True, return_state=True)
        found, lengths, state = model.generate(PROMPT, stop_tokens=stops, **options)
        assert len(set((lengths - LENGTHS).tolist())) > 2
        for row, length in enumerate(lengths.tolist()):
            with torch.no_grad():
                _, expected = model(found[row : row + 1, : length - 1], return_state=True)
            assert_states_close(state[[row]], expected)


class TestStops:
    def cut(self, tokens, stops):
        """Return the tokens up to the end of the first stop."""
        for end in range(1, len(tokens) + 1):
            if any(tokens[max(end - len(stop), 0) : end] == stop for stop in stops):
                return tokens[:end]
        return tokens

    @pytest.mark.parametrize("padding", ["right", "left"])
    @pytest.mark.parametrize("tokens", [None, 7, [3, 11]])
    @pytest.mark.parametrize("slices", [(), ((0, 3, 2), (2, 5, 1), (4, 0, 3))])
    def test_rows_stop_and_change_no_others(self, model, padding, tokens, slices):
        endless = [single_row(model, row, 20, seed=row).tolist() for row in range(5)]
        sequences = [endless[row][start : start + n] for row, start, n in slices]
        stop_tokens = [tokens] if isinstance(tokens, int) else tokens or []
        stops = [[token] for token in stop_tokens] + sequences
        options = dict(max_new_tokens=20, seed=0, stop_tokens=tokens, stop_sequences=sequences or None)
        prompt = dict(prompt=padded(padding), lengths=LENGTHS, padding=padding)
        found, lengths = model.generate(**prompt, **options, return_lengths=True)
        expected = [self.cut(row, stops) for row in endless]
        assert lengths.tolist() == [n + len(new) for n, new in zip(LENGTHS.tolist(), expected, strict=True)]
        assert found.shape[1] == 19 + max(map(len, expected))
        for row, new in enumerate(expected):
            start = int(LENGTHS[row]) if padding == "right" else 19
            assert found[row, start : start + len(new)].tolist() == new and not found[row, start + len(new) :].any()

    def test_a_sequence_that_began_in_the_prompt_does_not_count(self, model):
        new = single_row(model, 0, 3, seed=0).tolist()
        found = model.generate(PROMPT[:1], max_new_tokens=3, seed=0, stop_sequences=[[int(PROMPT[0, -1]), new[0]]])
        assert found[0, 19:].tolist() == new

    def test_no_stops_are_none(self, model):
        found = model.generate(PROMPT[:1], max_new_tokens=3, seed=0, stop_tokens=[], stop_sequences=[])
        assert torch.equal(found, model.generate(PROMPT[:1], max_new_tokens=3, seed=0))

    def test_a_stream_ends_when_all_rows_have_stopped(self, model):
        stops = list(range(0, TINY["vocab_size"], 4))
        stream = model.stream(PROMPT, lengths=LENGTHS, seed=0, stop_tokens=stops)
        stopped, columns = torch.zeros(5, dtype=torch.bool), []
        for token in stream:
            assert torch.equal(token == -1, stopped)
            stopped |= torch.isin(token, torch.tensor(stops))
            assert torch.equal(stream.stopped, stopped)
            columns.append(token)
        assert stopped.all() and next(stream, None) is None
        found = model.generate(PROMPT, lengths=LENGTHS, seed=0, stop_tokens=stops, max_new_tokens=500)
        assert found.shape[1] == 19 + len(columns)


def test_a_stream_gives_the_tokens_of_generate_and_its_state(model):
    stream = model.stream(PROMPT[:2], seed=5)
    tokens = torch.stack(list(itertools.islice(stream, 6)), 1)
    expected, state = model.generate(PROMPT[:2], max_new_tokens=6, seed=5, return_state=True)
    assert torch.equal(tokens, expected[:, 19:])
    assert all(torch.equal(a, b) for a, b in zip(tree_leaves(stream.state), tree_leaves(state), strict=True))
    ending = model.stream(PROMPT[:2], seed=5, max_new_tokens=6)
    assert torch.equal(torch.stack(list(ending), 1), tokens) and next(ending, None) is None


def test_inference_mode_may_begin_and_end_between_tokens(model):
    options = dict(seed=5, repetition_penalty=1.3, stop_tokens=[3])
    expected = model.generate(PROMPT[:2], max_new_tokens=8, **options)[:, 19:]
    with torch.inference_mode():
        stream = model.stream(PROMPT[:2], **options)
        tokens = [next(stream)]
    tokens += list(itertools.islice(stream, 3))
    with torch.inference_mode():
        tokens += list(itertools.islice(stream, 4))
    assert torch.equal(torch.stack(tokens, 1).clamp(min=0), expected)


def test_more_than_a_thousand_tokens(model):
    found = model.generate(PROMPT[:1], max_new_tokens=1100, seed=0)
    assert found.shape == (1, 1119)
    assert torch.equal(found[:, :25], model.generate(PROMPT[:1], max_new_tokens=6, seed=0))


@pytest.mark.parametrize("penalty", [1.7, 0.6])
def test_the_repetition_penalty_counts_prompt_and_new_tokens(model, penalty):
    expected = [PROMPT[row, :length].tolist() for row, length in enumerate(LENGTHS.tolist())]
    with torch.no_grad():
        for tokens in expected:
            for _ in range(9):
                logits = model(torch.tensor([tokens]))[0, -1]
                for token in set(tokens):
                    logits[token] = logits[token] * penalty if logits[token] < 0 else logits[token] / penalty
                tokens.append(int(logits.argmax()))
    found = model.generate(
        padded("left", 5), lengths=LENGTHS, padding="left", max_new_tokens=9, temperature=0, repetition_penalty=penalty
    )
    assert [row[19 - n :] for row, n in zip(found.tolist(), LENGTHS.tolist(), strict=True)] == expected


def test_the_repetition_penalty_ignores_tokens_that_are_never_predicted():
    model = tiny_model(output_size=30)
    found = model.generate(torch.tensor([[30, 1]]), max_new_tokens=5, seed=0, repetition_penalty=1.5)
    assert found.shape == (1, 7)


REFUSED = {
    "seed": [dict(seed=[1, 2]), dict(seed=-1), dict(seed=[0, 0, 0, 0, -1])],
    "num_samples": [dict(num_samples=2, temperature=0), dict(num_samples=0), dict(num_samples=10**9)],
    "lengths": [dict(padding="left"), dict(lengths=LENGTHS[:2]), dict(lengths=LENGTHS - 1), dict(lengths=LENGTHS + 1)],
    "padding": [dict(padding="both"), dict(padding=None)],
    "stop_tokens": [dict(stop_tokens=31), dict(stop_tokens=[1, -1]), dict(stop_tokens="end"), dict(stop_tokens=[[1]])],
    "stop_sequences": [dict(stop_sequences=[[]]), dict(stop_sequences=[[1, 31]]), dict(stop_sequences=[1])],
    "temperature": [dict(temperature=-1.0), dict(temperature=math.nan)],
    "top_k": [dict(top_k=0)],
    "top_p": [dict(top_p=0.0)],
    "min_p": [dict(min_p=1.5)],
    "repetition_penalty": [dict(repetition_penalty=0.0)],
    "prompt": [dict(prompt=PROMPT[:, :0]), dict(prompt=PROMPT[:0]), dict(prompt=PROMPT[0])],
    "max_new_tokens": [dict(max_new_tokens=-1)],
}


@pytest.mark.parametrize("argument", REFUSED)
def test_invalid_arguments_and_combinations_are_refused(model, argument):
    for wrong in REFUSED[argument]:
        options = dict(prompt=PROMPT, max_new_tokens=1) | wrong
        for call in (model.stream, model.generate):
            assert_refuses(ValueError, "generate", argument, lambda: call(**options))  # noqa: B023


def test_tokens_and_targets_of_wrong_shapes_are_refused(model):
    for tokens in (torch.zeros(3, dtype=torch.long), torch.zeros(1, 3)):
        with pytest.raises(ValueError, match="`tokens` must be integers"):
            model(tokens)
    with pytest.raises(ValueError, match="`targets` must have shape"):
        model.loss(tokens_of(2, 3), tokens_of(1, 3))


def test_a_state_of_other_rows_is_refused(model):
    state = mo.MegalodonState.fresh(model.config, 3, dtype=torch.float64)
    message = r"generate: `state` must have 5 sequences, as many as `prompt`, got 3; .* state\[rows\]"
    with pytest.raises(ValueError, match=message):
        model.generate(PROMPT, max_new_tokens=1, state=state)


def test_temperature_0_takes_the_likeliest_with_all_other_options(model):
    found = model.generate(PROMPT, max_new_tokens=5, temperature=0, seed=1, top_k=3, top_p=0.1, min_p=1)
    assert torch.equal(found, model.generate(PROMPT, max_new_tokens=5, temperature=0))


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}, {"repetition_penalty": 2.0}],
    ids=str,
)
def test_logits_that_are_no_numbers_are_an_error(options):
    """Torch's own error would name an internal tensor, and argmax would choose NaN."""
    model = tiny_model()
    with torch.no_grad():
        model.output.output.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="generate: logits / temperature must be numbers, got NaN or infinity"):
        model.generate(torch.zeros(2, 3, dtype=torch.int64), max_new_tokens=1, **options)
