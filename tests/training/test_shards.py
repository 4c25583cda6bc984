"""Folders of tokens: round trips, the held-out split, and damage reported in one line."""

import os
import shutil
from collections import Counter
from pathlib import Path

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutations import edit, make_folder, make_pipe

from megalodon_ops.storage.files import FileError
from megalodon_ops.tokenizers import ByteTokenizer, Tokenizer
from megalodon_ops.training import Batches, Shards, hold_out
from megalodon_ops.training.corpus import split
from megalodon_ops.training.shards import MAX_HELD_OUT_BYTES, Index, dtype_of, write_shard

BYTES = ByteTokenizer()
texts = st.lists(st.binary(min_size=1, max_size=60), min_size=1, max_size=25)


def shards_of(folder, documents, tokenizer=BYTES, count=3):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    bounds = [len(documents) * i // count for i in range(count + 1)]
    shards = []
    for number in range(count):
        texts = ([text] for text in documents[bounds[number] : bounds[number + 1]])
        shards.append(write_shard(folder, number, tokenizer, texts, Counter()))
    finish(folder, tokenizer, shards)
    return folder


def finish(folder, tokenizer, shards):
    tokenizer.save(folder)
    Index(3, tokenizer.fingerprint, "0" * 64, shards).write(folder)


@pytest.fixture(scope="module")
def bpe():
    pytest.importorskip("tokenizers")
    return Tokenizer.train([b"to be or not to be, that is the question. " * 20], vocab_size=300)


@given(documents=texts, count=st.integers(1, 5))
def test_documents_are_read_as_they_were_written(tmp_path, bpe, documents, count):
    for tokenizer in (BYTES, bpe):
        shards = Shards(shards_of(tmp_path / "tokens", documents, tokenizer, count))
        wanted = tokenizer.encode_batch(documents)
        assert [shards.document(i).tolist() for i in range(len(documents))] == [ids.tolist() for ids in wanted]
        assert shards.num_tokens == sum(map(len, wanted))
        assert shards.num_documents == len(documents) and shards.num_bytes == sum(map(len, documents))


@given(documents=texts, count=st.integers(1, 3))
def test_the_split_of_bytes_is_that_of_text(tmp_path, documents, count):
    """With the byte tokenizer: documents, their order, and the cut of a long one."""
    if len({*documents}) == 1 and len(documents[0]) == 1:
        return
    corpus = Shards(shards_of(tmp_path / "tokens", documents, BYTES, count)).hold_out()
    assert corpus.fingerprint == Shards(shards_of(tmp_path / "one", documents, BYTES, 1)).hold_out().fingerprint
    wanted = hold_out(documents)
    assert [bytes(ids.tolist()) for ids in corpus.train] == wanted.train
    assert corpus.held_out == wanted.held_out
    assert corpus.num_bytes == wanted.num_bytes
    assert corpus.train.lengths.tolist() == [*map(len, wanted.train)]


def test_validation_of_tokens_is_that_of_text(tmp_path):
    documents, validation = [b"one", b"two", b"three", b"two"], [b"held", b"two"]
    corpus = Shards(shards_of(tmp_path / "tokens", documents, BYTES, 2)).hold_out(validation)
    wanted = hold_out(documents, validation)
    assert [bytes(ids.tolist()) for ids in corpus.train] == wanted.train
    assert (corpus.held_out, corpus.num_bytes) == (wanted.held_out, wanted.num_bytes)


def test_a_long_document_is_cut_between_tokens(tmp_path, bpe):
    for copies in (40, 20_000):
        text = b"to be or not to be, that is the question. " * copies
        corpus = Shards(shards_of(tmp_path / "tokens", [text], bpe, 1)).hold_out()
        (rest,), (end,) = corpus.train, corpus.held_out
        assert bpe.decode(rest.tolist()) + end == text
        assert abs(len(end) - len(text) // 20) <= 43, "up to the text's period"
        assert corpus.num_bytes == len(text) - len(end) and corpus.train.lengths.tolist() == [len(rest)]


def test_at_most_8_mib_are_held_out(tmp_path, monkeypatch):
    monkeypatch.setattr("megalodon_ops.training.shards.MAX_HELD_OUT_BYTES", 100)
    documents = [bytes([i, j]) * 20 for i in range(20) for j in range(20)]
    held_out = Shards(shards_of(tmp_path / "tokens", documents)).hold_out().held_out
    assert [len(text) for text in held_out] == [40, 40] and MAX_HELD_OUT_BYTES == 8 << 20


@given(st.lists(st.integers(1, 50), min_size=2, max_size=200), st.integers(1, 300))
def test_documents_are_held_out_while_they_fit(sizes, max_held_out):
    held_out = []
    goal = min(max(1, sum(sizes) // 20), max_held_out)
    left = goal
    for size in sizes:
        if size <= left:
            held_out.append(bytes(size))
            left -= size
    if left > goal / 2:  # then a part of a document is held out
        held_out.append(bytes(left))
    lengths = numpy.array(sizes)
    corpus = split(lambda number: bytes(sizes[number]), numpy.arange(len(sizes)), lengths, lengths, bytes, max_held_out)
    assert corpus.held_out == held_out
    assert corpus.num_bytes == sum(map(len, corpus.train)) == sum(sizes) - sum(map(len, held_out))


def test_shards_are_mapped_lazily(tmp_path, monkeypatch):
    """At most two shards are mapped at once; batches equal those of lists."""
    monkeypatch.setattr("megalodon_ops.training.shards.MAX_OPEN_SHARDS", 2)
    documents = [bytes([i]) * (3 + i) for i in range(20)]
    corpus = Shards(shards_of(tmp_path / "tokens", documents, BYTES, 7)).hold_out()
    shards = corpus.train.document.__self__
    lists = Batches([ids.tolist() for ids in corpus.train], 3, 8)
    assert isinstance(corpus.train[0], numpy.memmap)
    mapped = Batches(corpus.train, 3, 8)
    for _ in range(50):
        assert (mapped.next().targets == lists.next().targets).all()
        assert shards._open_cached.cache_info().currsize <= 2
    assert mapped.position() == lists.position()


def test_numpy_reads_the_files(tmp_path, bpe):
    documents = [b"to be", b"or not " * 20_000, b"that is"]
    folder = shards_of(tmp_path / "tokens", documents, bpe, 1)
    tokens, index = (numpy.load(folder / f"shard-000000.{name}.npy") for name in ("tokens", "documents"))
    assert tokens.dtype == numpy.uint16 and index.dtype == numpy.uint64
    assert bpe.decode(tokens[: int(index[0, 0])].tolist()) == b"to be"
    assert bpe.decode(tokens[int(index[1, 0]) :].tolist()) == b"that is"
    assert index[:, 1].tolist() == [5, 140_005, 140_012]


@pytest.mark.parametrize(
    ("size", "dtype"), [(256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "uint32"), (1 << 24, "uint32")]
)
def test_ids_take_few_bytes(size, dtype):
    """A start token with the last id does not count."""

    class StartLast(ByteTokenizer):
        vocab_size = size + 1
        start = size

    class StartInside(StartLast):
        vocab_size, start = size, 3

    assert dtype_of(StartLast()) == dtype_of(StartInside()) == dtype


def test_a_document_without_tokens_is_counted(tmp_path):
    class Dropping(ByteTokenizer):
        def _encode_windows(self, windows):
            return [ids[ids != 32] for ids in super()._encode_windows(windows)]

    skipped = Counter({"empty documents": 2})
    folder = tmp_path / "tokens"
    folder.mkdir()
    documents = [[b"a b"], [b" " * 200_000], [b"c" * 70_000, b" " * 70_000], [b"  "]]
    finish(folder, Dropping(), [write_shard(folder, 0, Dropping(), documents, skipped)])
    assert Index.read(folder).shards[0].skipped == {"documents without tokens": 2, "empty documents": 2}
    shards = Shards(folder)
    assert (shards.num_documents, shards.num_bytes, shards.num_tokens) == (2, 140_003, 70_002)


def overwritten(content):
    return lambda path: path.write_bytes(content)


def edited(old, new):
    return lambda path: edit(path, old, new)


def unfinished(path):
    Index(3, BYTES.fingerprint, "0" * 64, [None]).write(path.parent)


def with_another_tokenizer(path):
    Tokenizer.train([b"others " * 90], vocab_size=280).save(path.parent)


def with_the_ends_of_shard_0(path):
    shutil.copy(path.with_name("shard-000000.documents.npy"), path)


INDEX, TOKENS, ENDS = "dataset.json", "shard-000001.tokens.npy", "shard-000001.documents.npy"
DAMAGE = [
    (INDEX, lambda path: shutil.rmtree(path.parent), "dataset.json: no such file"),
    (INDEX, unfinished, "tokens: is incomplete; run the command `tokenize` again"),
    (INDEX, overwritten(b"{"), "dataset.json: Input data was truncated"),
    (INDEX, overwritten(b"\xff" * 9), "dataset.json: "),
    (INDEX, overwritten(b'{"format": ' + b"[" * 10**6), "dataset.json: "),
    (INDEX, make_folder, "dataset.json: must be a file, got a folder"),
    (INDEX, make_pipe, "dataset.json: must be a file, got a pipe"),
    (INDEX, edited('"format": 3', '"format": 1'), "dataset.json: Invalid enum value 1 - at `$.format`"),
    (INDEX, edited('"format": 3', '"format": 3, "more": 1'), "contains unknown field `more`"),
    (INDEX, with_another_tokenizer, "its tokenizer is not the one that made the tokens"),
    ("tokenizer.json", Path.unlink, "no tokenizer.json and no tokenizer.model"),
    (TOKENS, make_pipe, "tokens.npy: must be a file, got a pipe"),
    (TOKENS, Path.unlink, "tokens.npy: no such file"),
    (TOKENS, edited("<u2", "<i2"), " numbers of uint16, got (4,) of int16"),
    (TOKENS, overwritten(b"x" * 130), f"{TOKENS}: "),
    (TOKENS, lambda path: os.truncate(path, 130), f"{TOKENS}: "),
    (TOKENS, lambda path: numpy.save(path, numpy.array([{}] * 6)), f"{TOKENS}: Array can't be memory-mapped"),
    (ENDS, make_pipe, "documents.npy: must be a file, got a pipe"),
    (ENDS, edited("(1, 3)", "(3, 1)"), "documents.npy: must hold (1, 3) numbers of uint64, got (3, 1)"),
    (ENDS, with_the_ends_of_shard_0, "documents.npy: must end where the shard does"),
]


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGE)
def test_damage_is_reported_in_one_line(tmp_path, bpe, name, damage, message):
    folder = shards_of(tmp_path / "tokens", [b"to be", b"or not to be", b"that is"], bpe)
    damage(folder / name)
    with pytest.raises((FileError, FileNotFoundError)) as caught:
        Shards(folder).hold_out()
    assert message in str(caught.value) and str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_documents_that_end_before_they_begin(tmp_path):
    folder = shards_of(tmp_path / "tokens", [b"to be", b"or not to be", b"that is"], count=1)
    path = folder / "shard-000000.documents.npy"
    content = bytearray(path.read_bytes())
    content[128 + 7] ^= 1  # the highest byte of the first document's end
    path.write_bytes(content)
    with pytest.raises(FileError, match="shard-000000.documents.npy: the ends of documents must increase"):
        Shards(folder).hold_out()


@pytest.mark.parametrize("documents", [[], [b"x"], [b"x", b"x"]], ids=["none", "one byte", "copies"])
def test_too_little_to_hold_out(tmp_path, documents):
    with pytest.raises(FileError, match="tokens: hold_out: `documents` must have at least 2 bytes"):
        Shards(shards_of(tmp_path / "tokens", documents)).hold_out()


@pytest.mark.parametrize("folder", [None, 3, ["tokens"]])
def test_a_folder_is_a_path(folder):
    with pytest.raises(TypeError, match="Shards: `folder` must be"):
        Shards(folder)
