"""Speculative decoding: a draft changes how often the model is called, but no token, state or end."""

import itertools
import math

import pytest
import torch
from assertions import every_case
from models import TINY, tiny_model, tokens_of
from torch.utils._pytree import tree_leaves

from megalodon_ops.inference.decoder import Decoder

OPTIONS = {
    "greedy": dict(temperature=0.0),
    "drawn": dict(temperature=0.7),
    "filtered": dict(temperature=1.2, top_k=20, top_p=0.9, min_p=0.01),
    "penalty": dict(temperature=0.0, repetition_penalty=1.3),
    "penalty, drawn": dict(repetition_penalty=1.3),
    "rows": dict(temperature=[0.0, 0.5, 1.0], top_p=[1.0, 0.5, 0.9], seed=[7, 3, 11]),
    "stops": dict(stop_tokens=[1, 4, 9, 16, 25]),
    "stop sequences": dict(temperature=0.3, stop_sequences=[[a, b] for a, b in itertools.product(range(31), range(9))]),
}


@pytest.fixture(scope="module")
def models():
    """A model, and a draft that guesses some of its tokens: the model with other output weights."""
    model, draft = tiny_model().eval(), tiny_model().eval()
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    return model, draft


def count_calls(monkeypatch, model):
    """A list to which each call of the model's decoder appends its number of tokens of a row."""
    calls, call = [], Decoder.__call__

    def counted(self, tokens):
        if self._model is model:
            calls.append(tokens.shape[1])
        return call(self, tokens)

    monkeypatch.setattr(Decoder, "__call__", counted)
    return calls


@pytest.mark.parametrize(("kind", "lengths_of_drafts"), [("own", [4]), ("near", [1, 5]), ("prompt", [4])])
def test_tokens_are_those_without_a_draft(models, kind, lengths_of_drafts):
    model, near = models
    draft = dict(own=model, near=near, prompt="prompt")[kind]
    prompt, lengths = tokens_of(3, 11), torch.tensor([11, 4, 7])
    with every_case() as case:
        for (name, options), draft_tokens in itertools.product(OPTIONS.items(), lengths_of_drafts):
            common = dict(max_new_tokens=25, lengths=lengths, padding="right", return_lengths=True, return_state=True)
            options = dict(seed=5) | options | common
            with case(f"{name}, {draft_tokens}"):
                expected, ends, end_state = model.generate(prompt, **options)
                found, found_ends, state = model.generate(prompt, draft=draft, draft_tokens=draft_tokens, **options)
                assert torch.equal(found, expected) and torch.equal(found_ends, ends)
                token = expected[:, :1]
                assert (model(token, state=state) - model(token, state=end_state)).abs().max() < 1e-11


def test_samples_of_one_prompt(models):
    model, draft = models
    prompt, options = tokens_of(2, 9), dict(max_new_tokens=12, num_samples=3, seed=1)
    expected = model.generate(prompt, **options)
    for each in (draft, "prompt"):
        assert torch.equal(model.generate(prompt, draft=each, **options), expected)


def test_a_draft_that_is_right_saves_calls(models, monkeypatch):
    model, draft = models
    calls = count_calls(monkeypatch, model)
    options = dict(max_new_tokens=31, temperature=0.0)
    expected = model.generate(tokens_of(1, 9), **options)
    assert calls == [1] * 31
    # Tokens that stay of several calls may take a call of their own, below the calls that are counted.
    always_right = tiny_model().eval()
    for each in (always_right, draft):
        calls.clear()
        assert torch.equal(model.generate(tokens_of(1, 9), draft=each, draft_tokens=4, **options), expected)
        if each is always_right:
            assert calls == [5] * 6 + [1]
        else:
            assert math.ceil(31 / 5) < len(calls) < 31
    repeated = torch.cat([expected, expected[:, 9:20]], 1)  # its end was followed by the next tokens
    calls.clear()
    model.generate(repeated, draft="prompt", draft_tokens=8, max_new_tokens=9, temperature=0.0)
    assert 1 < len(calls) <= 9 and calls[0] == 9


def test_states_of_a_stream_are_those_of_its_tokens(models):
    """Also between tokens that were chosen in one call, and where a row has stopped."""
    model, draft = models
    options = dict(max_new_tokens=20, temperature=0.8, seed=3, stop_tokens=[5, 6, 7])
    plain = model.stream(tokens_of(3, 9), **options)
    fast = model.stream(tokens_of(3, 9), draft=model, draft_tokens=5, **options)
    for expected, found in itertools.zip_longest(plain, fast):
        assert torch.equal(found, expected) and torch.equal(fast.stopped, plain.stopped)
        states = [model(tokens_of(3, 2), state=stream.state) for stream in (fast, plain)]
        assert (states[0] - states[1]).abs().max() < 1e-11
    assert bool(plain.stopped.any())


def test_a_draft_begins_with_the_prompt_of_a_continued_text(models):
    model, draft = models
    options = dict(max_new_tokens=10, temperature=0.0)
    tokens, state = model.generate(tokens_of(1, 9), return_state=True, **options)
    expected = model.generate(tokens[:, -1:], state=state, **options)
    for each in (draft, model, "prompt"):
        assert torch.equal(model.generate(tokens[:, -1:], state=state, draft=each, **options), expected)
    assert all(not leaf.isnan().any() for leaf in tree_leaves(state))


def test_errors(models):
    model, prompt = models[0], tokens_of(1, 5)
    other = tiny_model(vocab_size=TINY["vocab_size"] + 1)
    numbers, layer = tiny_model(num_features=2), torch.nn.Linear(2, 2)
    for draft, error in ((other, ValueError), (numbers, ValueError), ("lookup", TypeError), (layer, TypeError)):
        with pytest.raises(error, match="generate: `draft` must"):
            model.generate(prompt, max_new_tokens=2, draft=draft)
    for wrong in (0, -1, 1.5):
        with pytest.raises((ValueError, TypeError), match="generate: `draft_tokens` must"):
            model.generate(prompt, max_new_tokens=2, draft="prompt", draft_tokens=wrong)
    with pytest.raises(TypeError, match="draft is its name here"):
        model.generate(prompt, max_new_tokens=2, assistant_model=model)
