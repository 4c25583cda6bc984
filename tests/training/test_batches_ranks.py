"""Batches shared by rows: the union over any number of processes is the batch of one process."""

import json

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megalodon_ops.training import Batch, Batches, hold_out

corpora = st.lists(st.binary(max_size=40), min_size=1, max_size=12).filter(any)
contexts = st.sampled_from(["streamed", "packed"])


@st.composite
def splits(draw, rows):
    """Ranges of consecutive rows that partition `rows` rows."""
    cuts = draw(st.sets(st.integers(1, rows - 1))) if rows > 1 else set()
    bounds = [0, *sorted(cuts), rows]
    return [range(a, b) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]


def union(parts, ranges):
    """One batch of the parts of all ranks, whose rows are `ranges`."""
    sequences = numpy.cumsum([0, *(len(part.carry) for part in parts)])
    tokens = numpy.cumsum([0, *(part.tokens.shape[1] for part in parts)])

    def shift(values, offset):
        return torch.where(values < 0, values, values + offset)

    return Batch(
        torch.cat([part.tokens for part in parts], 1),
        torch.cat([part.targets for part in parts], 1),
        torch.cat([torch.tensor([0]), *(p.cu_seqlens[1:] + int(t) for p, t in zip(parts, tokens[:-1], strict=True))]),
        torch.cat([shift(part.carry, rows.start) for part, rows in zip(parts, ranges, strict=True)]),
        torch.cat([shift(part.last, int(first)) for part, first in zip(parts, sequences[:-1], strict=True)]),
    )


def assert_equal(one, other):
    for name, a, b in zip(Batch._fields, one, other, strict=True):
        assert a.dtype == b.dtype == torch.int64 and torch.equal(a, b), name


@given(st.data(), corpora, st.integers(1, 6), st.integers(1, 16), contexts, st.integers(0, 9) | st.none())
def test_ranks_make_the_batch_of_one_process_before_and_after_a_resume(data, documents, rows, length, context, seed):
    """The number of ranks changes at the resume; positions are equal on all ranks, and JSON."""
    whole = Batches(documents, rows, length, context=context, seed=seed)
    position = None
    for _ in range(2):
        ranges = data.draw(splits(rows))
        ranks = [Batches(documents, part, length, batch=rows, context=context, seed=seed) for part in ranges]
        if position is not None:
            for rank in ranks:
                rank.seek(position)
        for _ in range(data.draw(st.integers(0, 12))):
            wanted = whole.next()
            found = [rank.next() for rank in ranks]
            if wanted is None:
                assert found == [None] * len(ranks)
                break
            assert_equal(union(found, ranges), wanted)
        for rank in ranks:
            assert rank.position() == whole.position()
        position = json.loads(json.dumps(ranks[-1].position()))


class RecordedDocument:
    """A document that records reads."""

    def __init__(self, text, read):
        self.text = text
        self.read = read

    def __len__(self):
        return len(self.text)

    def __getitem__(self, part):
        self.read.append(len(self.text[part]))
        return self.text[part]


@pytest.mark.parametrize("context", ["streamed", "packed"])
def test_a_rank_reads_only_its_own_rows(context):
    read: list[int] = []
    documents = [RecordedDocument(bytes(range(n, n + 50)), read) for n in range(20)]
    rank = Batches(documents, range(2, 3), 16, batch=8, context=context)
    for _ in range(50):
        rank.next()
    assert 50 * 16 <= sum(read) <= 50 * (16 + 3), "and the token before each piece"


def test_documents_with_lengths_are_read_lazily():
    class Lazy(list):
        lengths = numpy.array([3, 4], numpy.uint32)
        num_reads = 0

        def __getitem__(self, index):
            self.num_reads += 1
            return super().__getitem__(index)

        def __iter__(self):
            raise AssertionError("read from end to end")

    lazy = Lazy([b"abc", b"defg"])
    batches = Batches(lazy, 1, 3, seed=None, end=None)
    assert lazy.num_reads == 0
    assert [bytes(batch.targets[0].tolist()) for batch in batches] == [b"def", b"gab", b"c"]


def test_a_rank_out_of_text_gets_no_tokens_until_all_ranks_are():
    batches = Batches([b"abcdef", b"x"], range(1, 2), 2, batch=2, seed=None, end=None)
    sizes = [batch.tokens.shape for batch in batches]
    assert sizes == [(1, 1), (1, 0), (1, 0)]


def test_the_order_is_that_of_whole_digests():
    """Runs of earlier versions, which sorted whole digests, resume in the same order."""
    import hashlib

    for seed, epoch in ((0, 0), (5, 3)):
        digests = [hashlib.sha256(f"{seed} {epoch} {i}".encode()).digest() for i in range(5000)]
        order = Batches([b"x"] * 5000, 1, 1, seed=seed)._shuffled(epoch)
        assert order.tolist() == sorted(range(5000), key=digests.__getitem__)


@pytest.mark.parametrize("rows", [range(1, 1), range(2, 4), range(-1, 2), range(0, 3, 2)], ids=str)
def test_wrong_rows(rows):
    with pytest.raises(ValueError, match="Batches: `rows` must be consecutive rows of the 3 in a batch"):
        Batches([b"text"], rows, 3, batch=3)
    with pytest.raises(
        (TypeError, ValueError), match=r"Batches: `batch` must be a positive integer below 2\^31, got None"
    ):
        Batches([b"text"], rows, 3)


def test_carry_and_last_number_the_ranks_own_rows():
    corpus = hold_out([bytes(range(n, n + 60)) for n in range(0, 120, 7)])
    rank = Batches(corpus.train, range(3, 5), 16, batch=6)
    batch = rank.next()
    assert batch.last.shape == (2,)
    for _ in range(10):
        before, batch = batch, rank.next()
        for sequence, row in enumerate(batch.carry.tolist()):
            if row >= 0:
                assert 0 <= row < 2
                end = before.cu_seqlens[before.last[row] + 1] - 1
                assert batch.tokens[0, batch.cu_seqlens[sequence]] == before.targets[0, end]
