"""Sampling: filters, draws and random numbers."""

import itertools

import pytest
import torch
from models import tiny_model, tokens_of

from megalodon_ops.inference import sampling
from megalodon_ops.inference.sampling import Sampling, numbers_of_seeds

VALUES = {"temperature": (0.5, 1.5), "top_k": (3, 99), "top_p": (0.6, 1.0, 1e-9), "min_p": (0.2, 0.0, 1.0)}
OPTIONS = [
    {},
    *({name: value} for name, values in VALUES.items() for value in values),
    {"repetition_penalty": 0.5},
    {"top_k": 8, "top_p": 0.8},
    {"top_k": 2, "top_p": 5e-324},
    {"top_k": 6, "top_p": 0.9, "min_p": 0.3},
    {"top_p": 0.7, "temperature": 0.8, "repetition_penalty": 1.4},
]


def expected_probabilities(logits, seen, options):
    """Apply the definitions of the filters to one row, one after the other."""
    logits = logits.double().clone()
    penalty = options.get("repetition_penalty", 1.0)
    logits[seen] = torch.where(logits[seen] < 0, logits[seen] * penalty, logits[seen] / penalty)
    probability, tokens = (logits / options.get("temperature", 1.0)).softmax(0).sort(descending=True)
    probability[options.get("top_k", len(tokens)) :] = 0
    probability /= probability.sum()
    of_likelier_tokens = probability.cumsum(0) - probability
    probability[(of_likelier_tokens >= options.get("top_p", 1.0)) & (torch.arange(len(tokens)) > 0)] = 0
    probability[probability < options.get("min_p", 0.0) * probability.max()] = 0
    return torch.zeros_like(probability).scatter(0, tokens, probability / probability.sum())


@pytest.mark.parametrize("few", [1024, 2])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_evenly_spaced_numbers_draw_each_token_by_its_probability(monkeypatch, options, few, dtype):
    monkeypatch.setattr(sampling, "_FEW_TOKENS", few)
    logits = 2 * torch.randn(3, 31, dtype=dtype, generator=torch.Generator().manual_seed(5))
    seen = torch.rand(3, 31, generator=torch.Generator().manual_seed(6)) < 0.3
    draws = 5000
    numbers = (torch.arange(draws).double() + 0.5) / draws
    for row in range(3):
        drawn = Sampling(**options).choose(logits[row].expand(draws, -1), iter([numbers]), seen[row].expand(draws, -1))
        share = drawn.bincount(minlength=31) / draws
        expected = expected_probabilities(logits[row], seen[row], options)
        assert (share - expected).abs().max() <= 1.01 / draws
        assert not share[expected == 0].any()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("neighbours", [0.0, 0.01, 30.0])
def test_a_draw_does_not_depend_on_the_other_rows(monkeypatch, options, neighbours):
    """Other rows decide whether a few tokens are sorted or all; ties, as in bfloat16, have no order."""
    monkeypatch.setattr(sampling, "_FEW_TOKENS", 8)
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(20, 40, generator=random)
    logits[::2] = (2 * logits[::2]).round()
    logits[1::2] *= neighbours
    seen = torch.rand(20, 40, generator=random) < 0.2
    numbers = torch.rand(20, generator=random).double()
    together = Sampling(**options).choose(logits, iter([numbers]), seen)
    for row in range(20):
        one = slice(row, row + 1)
        assert Sampling(**options).choose(logits[one], iter([numbers[one]]), seen[one]) == together[row]


def test_a_large_vocabulary_is_sorted_only_where_it_must_be(monkeypatch):
    logits = 4 * torch.randn(1, 32000, generator=torch.Generator().manual_seed(0))
    number = torch.tensor([0.77], dtype=torch.float64)
    drawn = Sampling(top_p=0.9).choose(logits, iter([number]))
    monkeypatch.setattr(sampling, "_FEW_TOKENS", 1)
    assert Sampling(top_p=0.9).choose(logits, iter([number])) == drawn
    monkeypatch.undo()

    def fail(*args, **options):
        raise AssertionError("sorted")

    monkeypatch.setattr(torch.Tensor, "sort", fail)
    for options in ({"top_p": 0.9}, {"top_k": 50}, {"min_p": 0.1}, {}):
        Sampling(**options).choose(logits, iter([number]))
    with pytest.raises(AssertionError, match="sorted"):
        Sampling(top_p=0.9).choose(0 * logits, iter([number]))


@pytest.mark.parametrize("size", [1, 3, 31, 32000])
def test_the_least_and_the_largest_number_draw_tokens_that_may_be_drawn(size):
    largest = torch.tensor([1 - 2.0**-52], dtype=torch.float64)
    for seed in range(50):
        logits = torch.randn(1, size, generator=torch.Generator().manual_seed(seed))
        first, last = size // 4, size // 2
        logits[:, :first] = logits[:, last + 1 :] = -torch.inf
        assert Sampling().choose(logits, iter([0 * largest])) == first
        assert Sampling().choose(logits, iter([largest])) == last


def test_numbers_of_a_seed_depend_on_seed_and_position_alone():
    def numbers(seeds, positions, count):
        stream = numbers_of_seeds(seeds, torch.tensor(positions), torch.device("cpu"))
        return torch.stack(list(itertools.islice(stream, count)), 1)

    long = numbers([5, 2**63 - 1], [0, 2**40], 300)
    assert torch.equal(numbers([5], [70], 100)[0], long[0, 70:170])
    assert torch.equal(numbers([3, 2**63 - 1, 5], [9, 2**40 + 1, 0], 299)[1], long[1, 1:])
    assert not torch.isin(numbers([5], [2**32], 300), long[0]).any()  # the upper half of a position counts
    everything = numbers(list(range(500)), [0] * 500, 200)
    assert everything.unique().numel() == everything.numel()
    assert everything.min() >= 0 and everything.max() < 1 and everything.dtype == torch.float64
    counts = (everything.flatten() * 100).long().bincount(minlength=100)
    assert ((counts - 1000) ** 2 / 1000).sum() < 160  # chi-squared, 99 degrees of freedom
    for shifted in (everything[:-1] * everything[1:], everything[:, :-1] * everything[:, 1:]):
        assert abs(shifted.mean() - 0.25) < 4 * 0.22 / shifted.numel() ** 0.5  # neighbours are not correlated


def test_tokens_are_drawn_by_their_probabilities():
    model, draws = tiny_model(), 4000
    with torch.no_grad():
        probability = model(tokens_of(1, 1))[0, -1].softmax(0)
    torch.manual_seed(3)
    for seed in (None, 3):
        drawn = model.generate(tokens_of(1, 1), max_new_tokens=1, num_samples=draws, seed=seed)[:, 1]
        share = drawn.bincount(minlength=31) / draws
        assert ((share - probability).abs() <= 5 * (probability * (1 - probability) / draws).sqrt()).all()


def test_draws_depend_on_the_seed_or_on_torchs_generator():
    model, prompt = tiny_model(), tokens_of(1, 1).expand(200, 1)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    seven = model.generate(prompt, max_new_tokens=2, seed=7)
    model.generate(prompt, max_new_tokens=2, temperature=0)
    assert torch.equal(torch.get_rng_state(), before), "nothing was drawn by torch"
    first, second = (model.generate(prompt, max_new_tokens=2) for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(model.generate(prompt, max_new_tokens=2), first)
    assert not torch.equal(first, second) and not torch.equal(first, seven)


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.filterwarnings("ignore")
def test_filters_are_those_of_transformers(options):
    """The logits have no ties, of which transformers keeps those for top_k and drops those for top_p."""
    processors = pytest.importorskip("transformers.generation.logits_process")
    logits = 2 * torch.randn(1, 31, generator=torch.Generator().manual_seed(5))
    prompt, scores = torch.tensor([[3, 5, 3, 30]]), logits.clone()
    order = {
        "repetition_penalty": processors.RepetitionPenaltyLogitsProcessor,
        "temperature": processors.TemperatureLogitsWarper,
        "top_k": processors.TopKLogitsWarper,
        "top_p": processors.TopPLogitsWarper,
        "min_p": processors.MinPLogitsWarper,
    }
    for name, processor in order.items():
        if name in options:
            scores = processor(options[name])(prompt, scores)
    seen = torch.zeros(1, 31, dtype=torch.bool).scatter(1, prompt, True)
    draws = 5000
    numbers = (torch.arange(draws).double() + 0.5) / draws
    drawn = Sampling(**options).choose(logits.expand(draws, -1), iter([numbers]), seen.expand(draws, -1))
    share = drawn.bincount(minlength=31) / draws
    assert (share - scores[0].softmax(0)).abs().max() <= 1.01 / draws


def test_temperature_and_top_p_of_each_row_give_the_rows_of_single_calls():
    """To the bit, whatever the other rows ask for."""
    temperatures = [1.0, 0.7, 0.0, 1.6, 0.7]
    shares = [1.0, 0.9, 0.5, 0.3, 1.0]  # top_p
    logits = 3 * torch.randn(5, 3000, generator=torch.Generator().manual_seed(0))
    logits[:, 5:9] = logits[:, 5:6]  # ties
    numbers = torch.rand(500, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for options in ({}, dict(top_k=40), dict(min_p=0.02), dict(top_k=40, min_p=0.05)):
        found = [Sampling(temperatures, top_p=shares, **options).choose(logits, iter([draw])) for draw in numbers]
        for row, (temperature, share) in enumerate(zip(temperatures, shares, strict=True)):
            one = Sampling(temperature, top_p=share, **options)
            expected = [one.choose(logits[[row]], iter([draw[[row]]])) for draw in numbers]
            assert [int(tokens[row]) for tokens in found] == [int(tokens) for tokens in expected], (options, row)


def test_rows_of_a_batch_have_their_own_temperature():
    model, prompt = tiny_model(), tokens_of(3, 5)
    options = dict(max_new_tokens=12, seed=[7, 8, 9])
    found = model.generate(prompt, temperature=[0.0, 0.8, 1.2], top_p=[1.0, 0.5, 1.0], **options)
    for row, (temperature, share) in enumerate([(0.0, 1.0), (0.8, 0.5), (1.2, 1.0)]):
        alone = model.generate(prompt[[row]], temperature=temperature, top_p=share, max_new_tokens=12, seed=[7 + row])
        assert torch.equal(found[[row]], alone)
    for name, wrong in (("temperature", [1.0, 1.0]), ("top_p", [0.5] * 4)):
        with pytest.raises(ValueError, match=f"`{name}` must be one number, or one for each of 3 rows"):
            model.generate(prompt, max_new_tokens=1, **{name: wrong})
    with pytest.raises(ValueError, match="`top_p` must be a probability in .0, 1., one for each row, got 0.0"):
        model.generate(prompt, max_new_tokens=1, top_p=[0.5, 0.0, 1.0])
