"""Generation: what is drawn, from which prompts, and wrong arguments of the model and its methods."""

import math

import pytest
import torch
from models import tiny_model, tokens_of

from megalodon_ops.model import model as model_module


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
        (lambda m: m.generate(tokens_of(1, 3)[0], max_new_tokens=1), "`prompt` must be integers"),
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


@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.9}], ids=str)
def test_logits_that_are_no_numbers_are_an_error(options):
    """Torch's own error speaks of a tensor that the caller does not know, and argmax takes NaN for the largest."""
    model = tiny_model()
    with torch.no_grad():
        model.output.output.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="generate: logits / temperature must be numbers, got NaN or infinity"):
        model.generate(torch.zeros(2, 3, dtype=torch.int64), max_new_tokens=1, **options)
