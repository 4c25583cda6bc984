"""`megalodon_ops.evaluation`: losses equal those of one call on each window, whatever the pieces."""

import json
import math
import weakref
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from models import TINY, tiny_model, tokens_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import megalodon_ops as mo
from megalodon_ops.evaluation import Document, Evaluation, evaluate

C = TINY["chunk_size"]
MODEL = tiny_model().eval()
LENGTHS = (1, 2, 3, C, C + 1, 4 * C + 3, 9, 8 * C + 1, 5)


def documents(*lengths: int) -> list[Tensor]:
    return list(tokens_of(sum(lengths)).split(lengths))


def naive_losses(model: mo.Megalodon, document: Tensor, context: int) -> list[Tensor]:
    """Compute the losses of each window by one call of the model."""
    inputs, targets = document[:-1].split(context), document[1:].split(context)
    return [F.cross_entropy(model(i[None])[0], t, reduction="none") for i, t in zip(inputs, targets)]


@pytest.mark.parametrize("context", [1, 3, C, C + 5, 3 * C, 1000, "all"])
def test_every_token_is_predicted_once_from_its_window(context):
    texts = documents(*LENGTHS)
    losses = []
    for text in texts:
        if len(text) > 1:
            losses += naive_losses(MODEL, text, len(text) if context == "all" else context)
    (found,) = evaluate(MODEL, [Document(text, 3 * len(text)) for text in texts], contexts=[context], rows=3, piece=11)
    assert found.tokens == sum(LENGTHS) - len(LENGTHS) == sum(map(len, losses))
    assert found.nats == pytest.approx(sum(loss.sum().item() for loss in losses), rel=1e-11)
    assert found.num_bytes == 3 * sum(LENGTHS)
    assert found.perplexity == pytest.approx(math.exp(found.nats / found.tokens))
    assert found.bits_per_byte == pytest.approx(found.nats / math.log(2) / found.num_bytes)
    assert found.perplexity_per_byte == pytest.approx(2**found.bits_per_byte)
    by_position = [0.0] * max(map(len, losses))
    for loss in losses:
        for position, nats in enumerate(loss.tolist()):
            by_position[position] += nats
    for bin in found.by_position:
        assert bin.nats == pytest.approx(sum(by_position[bin.first - 1 : bin.last]), rel=1e-10)
        assert bin.tokens == sum(max(0, min(len(loss), bin.last) - bin.first + 1) for loss in losses)
    firsts = [bin.first for bin in found.by_position]
    lasts = [bin.last for bin in found.by_position]
    assert firsts == [1, *(last + 1 for last in lasts[:-1])] and lasts[-1] == len(by_position)
    assert {2**i for i in range(len(by_position).bit_length())} <= set(lasts), "powers of 2 end bins"
    assert all(last - first < max(1, first / 4) for first, last in zip(firsts, lasts))


CASES = dict(
    lengths=st.lists(st.integers(1, 12 * C), min_size=1, max_size=3),
    context=st.sampled_from([1, 2, C - 1, C, 3 * C, 9 * C + 1, 11 * C, "all"]),
    rows=st.integers(1, 4),
    piece=st.integers(1, 5 * C),
    cuts=st.integers(1, 3 * C),
)


@given(**CASES)
def test_rows_and_pieces_change_nothing(lengths, context, rows, piece, cuts):
    """Documents come in pieces of `cuts` tokens, and the model reads pieces of `piece` in `rows` rows."""
    if sum(lengths) == len(lengths):
        lengths = [*lengths, 2]
    texts = documents(*lengths)
    (whole,) = evaluate(MODEL, texts, contexts=[context], rows=1, piece=10**6)
    (found,) = evaluate(MODEL, [text.split(cuts) for text in texts], contexts=[context], rows=rows, piece=piece)
    assert found.tokens == whole.tokens
    assert [bin[:3] for bin in found.by_position] == [bin[:3] for bin in whole.by_position]
    assert found.nats == pytest.approx(whole.nats, rel=1e-10)
    assert [b.nats for b in found.by_position] == pytest.approx([b.nats for b in whole.by_position], rel=1e-9)


class LiveBytes(TorchDispatchMode):
    """Record the peak bytes of the tensors created inside."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: list[weakref.ref[Tensor]] = []
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.alive += [weakref.ref(t) for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, Tensor)]
        living = [tensor for ref in self.alive if (tensor := ref()) is not None]
        self.alive = [weakref.ref(tensor) for tensor in living]
        sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in living}
        self.peak = max(self.peak, sum(sizes.values()))
        return result


@pytest.mark.parametrize("context", [2 * C, "all"])
def test_memory_does_not_grow_with_the_text(context):
    def peak(pieces: int) -> int:
        text = (tokens_of(4 * C) for _ in range(pieces))  # generated lazily
        with LiveBytes() as live:
            evaluate(MODEL, [Document(text)], contexts=[context], piece=4 * C)
        return live.peak

    assert peak(4) == peak(12)
    assert peak(1) > 4 * C * TINY["model_dim"] * 8, "the layers' tensors are counted"


def test_windows_that_fit_a_call_return_no_state(monkeypatch):
    """Each state would take memory for a chunk of keys and values, even for short windows."""
    loss = mock.Mock(side_effect=mo.Megalodon.loss)
    monkeypatch.setattr(mo.Megalodon, "loss", lambda *args, **options: loss(*args, **options))
    evaluate(MODEL, documents(100, 30, 7), contexts=[3, 10], rows=2, piece=11)
    assert loss.called and not any(call.kwargs.get("return_state") for call in loss.call_args_list)
    evaluate(MODEL, documents(100), contexts=[12], piece=11)
    assert any(call.kwargs.get("return_state") for call in loss.call_args_list)


def test_documents_in_many_forms_give_the_same_result():
    numpy = pytest.importorskip("numpy")
    ids = tokens_of(50)
    array = numpy.frombuffer(ids.numpy().astype(numpy.uint16).tobytes(), numpy.uint16)  # cannot be written to
    pieces = (part.tolist() for part in ids.split(7))
    forms = [ids, ids.int(), ids.tolist(), array, ids.split(7), pieces, [array[:20], array[20:]]]
    results = [evaluate(MODEL, [form])[0] for form in forms]
    assert all(result == results[0] for result in results) and results[0].num_bytes is None
    assert results[0].bits_per_byte is results[0].perplexity_per_byte is None


def test_a_context_that_cuts_no_document_is_read_once():
    class CountedDocuments(list):
        num_reads = 0

        def __iter__(self):
            CountedDocuments.num_reads += 1
            return super().__iter__()

    contexts = ["all", 100, 2, 69]
    found = evaluate(MODEL, CountedDocuments(documents(40, 70)), contexts=contexts)
    assert [result.context for result in found] == contexts
    assert CountedDocuments.num_reads == 3, "one check, and one pass each for contexts 2 and 69"
    assert found[0].nats == found[1].nats == found[3].nats != found[2].nats
    assert len({result.tokens for result in found}) == 1


def test_figures_as_json():
    (found,) = evaluate(MODEL, [Document(tokens_of(30), 60)], contexts=[8])
    back = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert back["context"] == 8 and back["tokens"] == 29 and back["num_bytes"] == 60
    assert back["by_position"][0] == found.by_position[0]._asdict()
    assert back["bits_per_byte"] == found.bits_per_byte and back["perplexity"] == found.perplexity
    endless = Evaluation("all", 1e6, 10, 10, ())
    assert math.isinf(endless.perplexity) and endless.to_dict()["perplexity"] is None


def test_evaluation_does_not_change_the_model():
    model = tiny_model(torch.float32, dropout=0.5, hidden_dropout=0.5).train()
    model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    first, second = (evaluate(model, documents(20))[0] for _ in range(2))
    assert first == second, "without dropout"
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("where", ["weights", "nan"])
def test_non_finite_losses_are_an_error(where):
    model = tiny_model(torch.float32)
    with torch.no_grad():
        model.output.output.weight.mul_(1e38 if where == "weights" else math.nan)
    with pytest.raises(FloatingPointError, match="weights are too large, or damaged"):
        evaluate(model, documents(20))
    assert model.training


@pytest.mark.parametrize(
    ("texts", "options", "error", "message"),
    [
        ([], {}, ValueError, "`documents` must have a token to predict"),
        ([[3]], {}, ValueError, "`documents` must have a token to predict"),
        (["text"], {}, TypeError, "`tokens` must be integers, got 'text'; encode text with a tokenizer"),
        ([b"text"], {}, TypeError, "encode text with a tokenizer"),
        ([[0.5, 1.0]], {}, ValueError, "`tokens` must be integers"),
        ([["a"]], {}, TypeError, "`tokens` must be integers"),
        ([[[1, 2], [[3]]]], {}, ValueError, r"`tokens` must be integers \(n,\) or pieces of them, got .* \(1, 1\)"),
        ([[1, 2, -100]], {}, IndexError, "`tokens` must be at least 0, got -100"),
        ([[1, 99, 1]], {}, IndexError, r"`tokens` must be in \[0, 31\), got 99"),
        ([[1, 2, 99]], {}, IndexError, r"`targets` must be in \[0, 31\)"),
        ([Document([1, 2], -1)], {}, ValueError, "`num_bytes` must be an integer of at least 0, got -1"),
        (iter([[1, 2]]), {"contexts": [2, "all"]}, ValueError, "`documents` must be iterable again"),
        ([iter([[1, 2], [3]])], {"contexts": [1, "all"]}, ValueError, "the same tokens for every context, got 2"),
    ],
)
def test_wrong_documents(texts, options, error, message):
    with pytest.raises(error, match=message):
        evaluate(MODEL, texts, **options)


def test_in_bfloat16():
    """A cast model, and an autocast around the call."""
    texts = documents(11 * C, 20)
    model = tiny_model(torch.float32)
    (exact,) = evaluate(tiny_model(torch.float32).double(), texts)
    (wide,) = evaluate(model, texts)
    with torch.autocast("cpu", torch.bfloat16):
        (short,) = evaluate(model, texts, piece=7)
    (cast,) = evaluate(model.to(torch.bfloat16), texts, piece=7)
    assert wide.nats == pytest.approx(exact.nats, rel=1e-5)
    for found in (short, cast):
        assert found.nats == pytest.approx(exact.nats, rel=0.01) and found.nats != wide.nats


def test_contexts_of_numpy():
    numpy = pytest.importorskip("numpy")
    (found,) = evaluate(MODEL, documents(20), contexts=[numpy.int64(5)])
    assert type(found.context) is int and json.dumps(found.to_dict())
