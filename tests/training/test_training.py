"""`megalodon_ops.training`: a user's training loop over BPE tokens, its resume, batches, and wrong calls."""

import argparse
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import megalodon_ops as mo
from megalodon_ops import training
from megalodon_ops.cli.generate import continue_prompt
from megalodon_ops.evaluation import Document, evaluate
from megalodon_ops.tokenizers import ByteTokenizer, Tokenizer

SIZE = dict(num_layers=2, model_dim=32, z_dim=16, value_dim=32, ffn_hidden_dim=32, chunk_size=16, norm_num_groups=4)
CONFIG = mo.MegalodonConfig(vocab_size=9, **SIZE)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Faster on models this small."""
    with training.threads(1):
        yield


@pytest.fixture(scope="module")
def text():
    """Some sources of Python's standard library, 200 KB."""
    folder = Path(argparse.__file__).parent
    return training.hold_out((folder / f"{name}.py").read_bytes() for name in ("argparse", "ast", "bdb", "cmd", "code"))


@pytest.fixture(scope="module")
def bpe(text):
    pytest.importorskip("tokenizers")
    return Tokenizer.train(text.train, vocab_size=500)


class Loop:
    """A user's training loop."""

    def __init__(self, text, tokenizer, context="streamed"):
        torch.manual_seed(0)
        self.tokenizer = tokenizer
        config = mo.MegalodonConfig(vocab_size=tokenizer.vocab_size, eos_token_id=tokenizer.end, **SIZE)
        self.model = mo.Megalodon(config)
        self.optimizer = training.adamw(self.model, lr=1e-2)
        self.schedule = training.Schedule(lr=1e-2, warmup=5, steps=60)
        tokens = tokenizer.encode_batch(text.train)
        self.batches = training.Batches(tokens, 4, 32, start=tokenizer.start, context=context)
        self.reader = training.Reader(self.model, carries=context == "streamed")
        self.step = 0

    def run(self, steps):
        losses = []
        for batch in self.batches:
            self.schedule.apply(self.optimizer, self.step)
            loss = self.reader.loss(batch)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(loss.item())
            self.step += 1
            if len(losses) == steps:
                return losses

    def save(self, run):
        record = {"batches": self.batches.position(), "schedule": self.schedule.position()}
        options = dict(optimizer=self.optimizer, state=self.reader.rows(), tokenizer=self.tokenizer, record=record)
        training.save_checkpoint(run, self.step, self.model, **options)

    def load(self, run):
        found = training.load_checkpoint(run)
        found.load_weights(self.model)
        found.load_optimizer(self.optimizer, self.model)
        self.batches.seek(found.record["batches"])
        self.schedule.seek(found.record["schedule"], found.step, 0.0)
        self.reader.seek(found.state)
        self.step = found.step


@pytest.mark.parametrize("context", ["streamed", "packed"])
def test_a_loop_over_bpe_tokens_resumes_to_equal_losses(text, bpe, tmp_path, context):
    whole = Loop(text, bpe, context)
    before = whole.run(15)
    whole.save(tmp_path)
    after = whole.run(15)
    assert sum(after[-5:]) / 5 < before[0] - 1 and before[0] == pytest.approx(math.log(bpe.vocab_size), rel=0.2)

    again = Loop(text, bpe, context)
    again.run(2)
    again.load(tmp_path)
    assert again.run(15) == after
    found = training.load_checkpoint(tmp_path)
    assert found.tokenizer().fingerprint == bpe.fingerprint
    model, tokenizer, _ = training.load_any(tmp_path)
    ids = torch.tensor([[tokenizer.start, *tokenizer.encode("def ")]])
    written = model.generate(ids, max_new_tokens=20, temperature=0.0)[0, 1:].tolist()
    assert tokenizer.decode(written).startswith(b"def ")


def test_a_uniform_model_has_the_bits_of_its_ids(text, bpe):
    """It has log2(ids) * tokens / bytes bits per byte, so bytes and BPE are comparable on one text."""
    document = text.held_out[0][:5000]
    bits = {}
    for tokenizer in (ByteTokenizer(), bpe):
        config = mo.MegalodonConfig(vocab_size=tokenizer.vocab_size, **SIZE)
        model = mo.Megalodon(config)
        torch.nn.init.zeros_(model.output.output.weight)
        ids = tokenizer.encode(document)
        whole = Document(torch.tensor([tokenizer.start, *ids]), num_bytes=len(document))
        (result,) = evaluate(model, [whole])
        bits[tokenizer.byte_level] = result.bits_per_byte
        assert result.tokens == len(ids)
        expected = math.log2(tokenizer.vocab_size) * len(ids) / len(document)
        assert result.bits_per_byte == pytest.approx(expected, rel=1e-5)
        batches = training.Batches([ids], 2, 100, start=tokenizer.start, end=None, seed=None)
        reader = training.Reader(model)
        nats = sum(reader.loss(batch, "none").double().sum().item() for batch in batches)
        assert nats / math.log(2) / len(document) == pytest.approx(expected, rel=1e-5)
    assert bits[True] == pytest.approx(math.log2(257)) and bits[False] < 6


@pytest.mark.parametrize(
    ("shape", "seed", "count"),
    [((1, 200), 1, 15), ((1, 1), None, 60), ((2, 5), 1, 30), ((3, 13), None, 30), ((4, 16), 1, 20)],
    ids=str,
)
def test_a_reader_carries_the_state_of_each_row(shape, seed, count):
    """In arbitrary rows and pieces, every token has the loss of one call on its document."""
    torch.manual_seed(0)
    model = mo.Megalodon(mo.MegalodonConfig(vocab_size=50, output_size=49, **SIZE)).eval()
    documents = [torch.randint(49, (n,)) for n in (1, 7, 8, 30, 65, 3)]
    whole = {}
    for document in documents:
        logits = model(torch.cat([torch.tensor([49]), document[:-1]])[None])[0]
        losses = torch.nn.functional.cross_entropy(logits, document, reduction="none").tolist()
        whole.update({(*document[: end + 1].tolist(),): loss for end, loss in enumerate(losses)})
    batches = training.Batches(documents, *shape, start=49, end=None, seed=seed)
    reader = training.Reader(model)
    rows: list[list[int]] = [[] for _ in range(shape[0])]
    for batch, _ in zip(batches, range(count), strict=False):
        losses = reader.loss(batch, "none")[0].tolist()
        before, bounds = rows, batch.cu_seqlens.tolist()
        read = [[] if row < 0 else list(before[row]) for row in batch.carry.tolist()]
        for sequence, (begin, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
            for token, loss in zip(batch.targets[0, begin:end].tolist(), losses[begin:end], strict=True):
                read[sequence].append(token)
                assert loss == pytest.approx(whole[(*read[sequence],)], rel=1e-4, abs=1e-4)
        rows = [read[sequence] for sequence in batch.last.tolist()]


def test_a_model_learns_where_documents_end(tmp_path):
    """Generated text then ends by itself, in the library, from a folder and on the command line."""
    documents = [b"one.", b"to two,", b"a third"]
    torch.manual_seed(0)
    model = mo.Megalodon(mo.MegalodonConfig(vocab_size=257, eos_token_id=256, **{**SIZE, "num_layers": 1}))
    optimizer, reader = training.adamw(model, lr=2e-2), training.Reader(model, carries=False)
    for _, batch in zip(range(40), training.Batches(documents, 2, 24, context="packed"), strict=False):
        reader.loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save(tmp_path / "model")
    for document in documents:
        prompt, options = torch.tensor([[256, document[0]]]), dict(max_new_tokens=50, temperature=0)
        (written,) = mo.Megalodon.load(tmp_path / "model").generate(prompt, **options).tolist()
        assert written == [256, *document, 256]
        assert model.eval().generate(prompt, stop_tokens=[], **options).shape == (1, 52)
        texts = continue_prompt(model, ByteTokenizer(), document[:1], num_tokens=50, temperature=0)
        assert document[:1] + b"".join(text for _, text in texts) == document


def test_generation_stops_at_the_tokenizers_end():
    """Its end is another token than its start here. All 257 tokens are equally likely."""

    class EndTokenizer(ByteTokenizer):
        end = 3

    model = mo.Megalodon(mo.MegalodonConfig(vocab_size=257, **SIZE)).eval()
    torch.nn.init.zeros_(model.output.output.weight)
    for seed in range(4):
        written = b"".join(text for _, text in continue_prompt(model, EndTokenizer(), b"a", num_tokens=3000, seed=seed))
        assert len(written) < 3000 and b"\3" not in written


@pytest.mark.parametrize("kind", [bytes, bytearray, list, partial(np.array, dtype=np.uint16), np.array, torch.tensor])
def test_batches_of_all_kinds_of_ids_equal_those_of_bytes(kind):
    documents = [bytes(range(n, n + 30)) for n in range(0, 90, 30)] + [b""]
    wanted = training.Batches(documents, 2, 7, seed=3)
    found = training.Batches([kind(list(document)) for document in documents], 2, 7, seed=3)
    for _ in range(20):
        for one, other in zip(found.next(), wanted.next(), strict=True):
            assert torch.equal(one, other) and one.dtype == torch.int64


def test_batches_of_a_memory_map(tmp_path):
    np.arange(1000, dtype=np.int32).tofile(tmp_path / "tokens")
    tokens = np.memmap(tmp_path / "tokens", dtype=np.int32, mode="r")
    read = [batch.targets[0] for batch in training.Batches([tokens], 1, 64, start=5, seed=None)]
    assert torch.cat(read).tolist() == [*range(1000), 5]


def test_parameter_groups():
    model = mo.Megalodon(mo.MegalodonConfig(vocab_size=9, **SIZE))
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed, others = ({names[p] for p in group["params"]} for group in training.parameter_groups(model))
    assert decayed | others == set(names.values()) and not decayed & others
    assert all(name.endswith("weight") and "norm" not in name for name in decayed)
    assert {"embed.weight", "output.output.weight", "layers.0.mega.wz.weight"} <= decayed
    assert {"layers.0.mega.cema.alpha", "layers.1.mega.gamma", "layers.0.mega.wz.bias"} <= others
    model.requires_grad_(False)
    model.embed.weight.requires_grad_(True)
    assert [len(group["params"]) for group in training.parameter_groups(model, weight_decay=0.2)] == [1, 0]


def test_the_schedule_sets_the_rate_of_every_group():
    model = mo.Megalodon(mo.MegalodonConfig(vocab_size=9, **SIZE))
    optimizer, schedule = training.adamw(model, lr=1.0), training.Schedule(lr=1.0, warmup=2, steps=10)
    for step in range(10):
        assert schedule.apply(optimizer, step) == schedule.lr(step)
        assert {group["lr"] for group in optimizer.param_groups} == {schedule.lr(step)}
    assert schedule.finished(10) and not schedule.finished(9)


def batches(*documents, rows=1, length=2, **options):
    return training.Batches([*documents], rows, length, **options)


def seek(**position):
    batches(b"a").seek(position)


def save(model, state=None):
    training.save_checkpoint("run", 1, model, state=state)


def state_of(**fields):
    return mo.MegalodonState.fresh(replace(CONFIG, **fields), 1)


MODEL, OTHER = mo.Megalodon(CONFIG), torch.nn.Linear(2, 2)
NOT_IDS = "Batches: `documents` must be of bytes or ids, integers of at least 0, got"
NOT_INSIDE = "Batches.seek: `position` must have as many rows as these batches, and offsets inside these documents"
NOT_ITS = "save_checkpoint: `state` must be of `model`, got another model's: its tensors are not those of its config:"
NO_DECAY = "parameter_groups: `weight_decay` must be a number of at least 0, got -1."
ROWS = "draw_metrics: `rows` must be a list of `read_metrics`, got"
WRONG = [
    (lambda: batches(b"a", rows=0), "Batches: `rows` must be a positive integer"),
    (lambda: batches(b"a", length=2.5), "Batches: `length` must be a positive integer"),
    (lambda: batches(b"a", context="both"), 'Batches: `context` must be "streamed" or'),
    (lambda: batches(b"a", context_length=0), "Batches: `context_length` must be a positive integer, or None, got 0"),
    (lambda: batches(), "Batches: `documents` must hold a token, got none"),
    (lambda: batches(b""), "Batches: `documents` must hold a token, got none"),
    (lambda: training.Batches(b"text", 1, 2), "Batches: `documents` must be a list of documents"),
    (lambda: batches("text").next(), f"{NOT_IDS} text; encode it"),
    (lambda: batches([1.5, 2]).next(), f"{NOT_IDS} float64"),
    (lambda: batches(torch.ones(3)).next(), f"{NOT_IDS} float32"),
    (lambda: batches(np.array([3, -1])).next(), f"{NOT_IDS} -1"),
    (lambda: batches(b"a").seek(None), "Expected `object`, got `null`"),
    (lambda: seek(), "Object missing"),
    (lambda: seek(**batches(b"a", rows=2).position()), NOT_INSIDE),
    (lambda: seek(taken=1, readers=[[0, -1]]), NOT_INSIDE),
    (lambda: seek(taken=1, readers=[[0, 5]]), NOT_INSIDE),
    (lambda: training.Muon(OTHER, lr=-1.0), "Invalid learning rate: -1"),
    (lambda: training.Muon(MODEL, lr=1.0, weight_decay=-1), NO_DECAY),
    (lambda: training.adamw(MODEL, lr=1.0, weight_decay=-1), NO_DECAY),
    (lambda: training.Schedule(lr=1.0, warmup=1, steps=0), "Schedule: `steps` or `minutes` must be given"),
    (lambda: training.Schedule(lr=1.0, warmup=1), "Schedule: `steps` or `minutes` must be given, and not both"),
    (lambda: training.Schedule(lr=1.0, warmup=1, steps=1, minutes=1), "Schedule: `steps` or `minutes` must be given"),
    (lambda: training.hold_out([b"a"]), "hold_out: `documents` must have at least 2 bytes"),
    (lambda: training.hold_out(["text"]), "hold_out: `documents` must be of bytes, got 'text'; encode text."),
    (lambda: training.hold_out(b"text"), "hold_out: `documents` must be of bytes, got 116"),
    (lambda: training.Reader(OTHER), "Reader: `model` must be a Megalodon, got"),
    (
        lambda: training.Reader(MODEL, rank=2, ranks=2),
        "Reader: `rank` must be an integer in [0, 2), below `ranks`, got",
    ),
    (lambda: training.Reader(MODEL, ranks=0), "Reader: `ranks` must be a positive integer"),
    (lambda: save(OTHER), "save_checkpoint: `model` must be a Mega"),
    (lambda: save(MODEL, 3), "save_checkpoint: `state` must be a MegalodonState or None, got 3"),
    (lambda: save(MODEL, state_of(num_layers=3)), f"{NOT_ITS} 'layers.2."),
    (lambda: save(MODEL, state_of(chunk_size=9)), f"{NOT_ITS} 'layers.0.attention.k'"),
    (
        lambda: save(mo.MegalodonEncoder(mo.MegalodonEncoderConfig(vocab_size=9, **SIZE)), state_of()),
        "save_checkpoint: `state` must be None for an encoder, got megalodon_ops.public_models.MegalodonState.",
    ),
    (lambda: training.Saver("run", "data=2"), "Saver: `mesh` must be a torch.distributed DeviceMesh, got 'data=2'."),
    (lambda: training.optimizer_threads(None), "optimizer_threads: `model` must be a module, got None"),
    (lambda: training.threads(0).__enter__(), "threads: `count` must be a positive integer below 2^31, got 0."),
    (lambda: training.read_metrics(None), "read_metrics: `path` must be a path, got None."),
    (lambda: training.Metrics(None), "Metrics: `path` must be a path, got None."),
    (lambda: training.draw_metrics("curve.png", None), f"{ROWS} None."),
    (lambda: training.draw_metrics("curve.png", "rows"), f"{ROWS} 'rows'."),
    (lambda: training.draw_metrics(None, []), "draw_metrics: `path` must be a path, got None."),
]


@pytest.mark.parametrize(("call", "message"), WRONG)
def test_wrong_calls(call, message):
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    assert str(caught.value).startswith(message)
