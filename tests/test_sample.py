"""The sample of held-out text that a run looks at."""

import math

import pytest
import torch

import megalodon_ops as mo
from megalodon_ops.evaluation import Document, evaluate
from megalodon_ops.tokenizers import ByteTokenizer, Tokenizer
from megalodon_ops.training.sample import UNCOUNTED, HeldOutSample

BYTES = ByteTokenizer()
TEXTS = [bytes((7 * i + 3 * j) % 251 for j in range(size)) for i, size in enumerate([5000, 10, 300, 20_000, 1])]


def tiny(tokenizer: Tokenizer = BYTES) -> mo.Megalodon:
    torch.manual_seed(0)
    config = mo.MegalodonConfig(
        num_layers=1, model_dim=32, z_dim=16, value_dim=32, ffn_hidden_dim=32, chunk_size=64, norm_num_groups=4,
        vocab_size=tokenizer.vocab_size, output_size=tokenizer.output_size,
    )  # fmt: skip
    return mo.Megalodon(config)


def counted(sample: HeldOutSample) -> list[int]:
    return [token for stretch in sample.stretches for token in stretch.targets.tolist() if token != UNCOUNTED]


def test_a_short_text_counts_whole_and_as_evaluate_has_it():
    model = tiny()
    nats, num_bytes = HeldOutSample(TEXTS, BYTES, 64, num_bytes=1 << 16).nats_and_bytes(model)
    (whole,) = evaluate(model, [Document([BYTES.start, *text], len(text)) for text in TEXTS])
    assert num_bytes == sum(map(len, TEXTS))
    assert nats == pytest.approx(whole.nats, rel=1e-5)


def test_stretches_are_spread_evenly_over_all_documents():
    sample = HeldOutSample([bytes([i]) * 1000 for i in range(50)], BYTES, 64, num_bytes=5000, stretch=50)
    tokens = counted(sample)
    assert {value: tokens.count(value) for value in set(tokens)} == dict.fromkeys(range(50), 100)


def test_a_stretch_is_predicted_from_what_is_before_it():
    (text,) = TEXTS[3:4]
    sample = HeldOutSample([text], BYTES, 300, num_bytes=40, stretch=40)
    (stretch,) = sample.stretches
    begin, end, chunk = 10_000 - 20, 10_000 + 20, 9_900
    assert stretch.tokens.tolist() == [BYTES.start, *text[chunk : end - 1]]
    assert stretch.targets.tolist() == [*[UNCOUNTED] * (begin - chunk), *text[begin:end]]
    assert stretch.num_bytes == 40


def test_a_stretch_goes_on_in_the_next_document():
    """Without this, beginnings of documents would count less often than the rest."""
    texts = [b"a" * 95, b"b" * 105]
    sample = HeldOutSample(texts, BYTES, 64, num_bytes=20, stretch=20)
    assert sorted(counted(sample)) == [97] * 5 + [98] * 15
    assert sorted(stretch.tokens[:2].tolist() for stretch in sample.stretches) == [[256, 97], [256, 98]]


@pytest.mark.parametrize("rows", [1, 3])
def test_parts_add_up(rows):
    model = tiny()
    sample = HeldOutSample(TEXTS, BYTES, 64, num_bytes=4096, stretch=64)
    whole = sample.nats_and_bytes(model)
    parts = [sample.nats_and_bytes(model, part, rows) for part in range(rows)]
    assert [sum(column) for column in zip(*parts, strict=True)] == pytest.approx(whole, rel=1e-5)


def test_tokens_count_for_the_bytes_that_they_hold():
    """A uniform model of V tokens needs log2(V) bits a token, so its figure is that of the tokens that begin in a stretch."""
    text = b"to be or not to be, that is the question. " * 400
    tokenizer = Tokenizer.train([text], vocab_size=300)
    model = tiny(tokenizer)
    torch.nn.init.zeros_(model.output.output.weight)
    sample = HeldOutSample([text], tokenizer, 128, num_bytes=4096)
    nats, num_bytes = sample.nats_and_bytes(model)
    assert nats == pytest.approx(len(counted(sample)) * math.log(tokenizer.output_size), rel=1e-5)
    assert num_bytes == pytest.approx(sum(map(len, tokenizer.text_of(counted(sample)))))
    assert 3900 < num_bytes < 4300


def test_the_model_is_left_as_it_was_and_losses_must_be_finite():
    model = tiny().train()
    HeldOutSample(TEXTS, BYTES, 64, num_bytes=1000).nats_and_bytes(model)
    assert model.training
    torch.nn.init.constant_(model.output.output.weight, math.nan)
    with pytest.raises(FloatingPointError, match="the loss of held-out text is nan"):
        HeldOutSample(TEXTS, BYTES, 64, num_bytes=1000).nats_and_bytes(model)
    assert model.training


def test_no_part_is_no_text():
    assert HeldOutSample([b"abc"], BYTES, 64).nats_and_bytes(tiny(), part=1, parts=2) == (0.0, 0.0)
