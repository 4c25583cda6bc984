"""Folders of tokens: what is written is read, what is held out is what is held out of text, and damage is one clear line."""

import json
import shutil
from collections import Counter

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st


from megalodon_ops.errors import FileError
from megalodon_ops.tokenizers import ByteTokenizer, Tokenizer
from megalodon_ops.training import Batches, Shards, hold_out
from megalodon_ops.training.corpus import taken_while_they_fit
from megalodon_ops.training.shard_files import dtype_of, finish, shard_name, write_shard
from megalodon_ops.training.shards import MOST_HELD_OUT

BYTES = ByteTokenizer()
texts = st.lists(st.binary(min_size=1, max_size=60), min_size=1, max_size=25)


def shards_of(folder, documents, tokenizer=BYTES, count=3):
    """The folder of `count` shards of these documents."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    bounds = [len(documents) * i // count for i in range(count + 1)]
    names = [shard_name(i) for i in range(count)]
    for name, first, last in zip(names, bounds[:-1], bounds[1:], strict=True):
        write_shard(folder / name, tokenizer, ([text] for text in documents[first:last]), Counter())
    finish(folder, tokenizer, names)
    return folder


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
        assert shards.lengths().tolist() == [len(ids) for ids in wanted]
        assert shards.lengths(column=1).tolist() == [len(text) for text in documents]
        assert shards.num_documents == len(documents) and shards.num_bytes == sum(map(len, documents))
        assert shards.fingerprint == Shards(shards_of(tmp_path / "one", documents, tokenizer, 1)).fingerprint
        shards.verify()


@given(documents=texts, count=st.integers(1, 3))
def test_what_is_held_out_is_what_is_held_out_of_text(tmp_path, documents, count):
    """With the byte tokenizer all is equal: documents, their order, the place where a long one is cut."""
    if len({*documents}) == 1 and len(documents[0]) == 1:
        return
    corpus = Shards(shards_of(tmp_path / "tokens", documents, BYTES, count)).hold_out()
    wanted = hold_out(documents)
    assert [bytes(ids.tolist()) for ids in corpus.train] == wanted.train
    assert corpus.held_out == wanted.held_out
    assert corpus.num_bytes == wanted.num_bytes
    assert corpus.train.lengths.tolist() == [*map(len, wanted.train)]


def test_a_long_document_is_cut_between_tokens(tmp_path, bpe):
    """Within a window, and beyond many; what is held out and what is not are the text."""
    for copies in (40, 20_000):
        text = b"to be or not to be, that is the question. " * copies
        corpus = Shards(shards_of(tmp_path / "tokens", [text], bpe, 1)).hold_out()
        (rest,), (end,) = corpus.train, corpus.held_out
        assert bpe.decode(rest.tolist()) + end == text
        assert len(text) // 20 <= len(end) < len(text) // 20 + 20
        assert corpus.num_bytes == len(text) - len(end) and corpus.train.lengths.tolist() == [len(rest)]


def test_at_most_8_mib_are_held_out(tmp_path, monkeypatch):
    monkeypatch.setattr("megalodon_ops.training.shards.MOST_HELD_OUT", 100)
    documents = [bytes([i, j]) * 20 for i in range(20) for j in range(20)]
    held_out = Shards(shards_of(tmp_path / "tokens", documents)).hold_out().held_out
    assert [len(text) for text in held_out] == [40, 40] and MOST_HELD_OUT == 8 << 20


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(0, 300))
def test_sizes_are_taken_while_they_fit(sizes, room):
    wanted, left = [], room
    for size in sizes:
        wanted.append(size <= left)
        left -= size if size <= left else 0
    assert taken_while_they_fit(numpy.array(sizes, numpy.int64), room).tolist() == wanted


def test_shards_are_mapped_when_they_are_read(tmp_path, monkeypatch):
    """Few are mapped at once; batches of their documents are those of lists."""
    monkeypatch.setattr("megalodon_ops.training.shards._OPEN", 2)
    documents = [bytes([i]) * (3 + i) for i in range(20)]
    corpus = Shards(shards_of(tmp_path / "tokens", documents, BYTES, 7)).hold_out()
    shards = corpus.train._shards
    assert len(shards._maps) <= 2
    lists = Batches([ids.tolist() for ids in corpus.train], 3, 8)
    assert isinstance(corpus.train[0], numpy.memmap)
    mapped = Batches(corpus.train, 3, 8)
    for _ in range(50):
        assert (mapped.next().targets == lists.next().targets).all()
        assert len(shards._maps) <= 2
    assert mapped.position() == lists.position()


def test_any_program_reads_the_files(tmp_path, bpe):
    documents = [b"to be", b"or not " * 20_000, b"that is"]
    folder = shards_of(tmp_path / "tokens", documents, bpe, 1) / "shard-000000"
    tokens, index, cuts = (numpy.load(folder / f"{name}.npy") for name in ("tokens", "documents", "cuts"))
    assert tokens.dtype == numpy.uint16 and index.dtype == cuts.dtype == numpy.uint64
    assert bpe.decode(tokens[: int(index[0, 0])].tolist()) == b"to be"
    assert bpe.decode(tokens[int(index[1, 0]) :].tolist()) == b"that is"
    assert index[:, 1].tolist() == [5, 140_005, 140_012]
    assert len(cuts) == 2 and all(5 < size < 140_005 for size in cuts[:, 1])
    for end, size in cuts.tolist():
        assert bpe.decode(tokens[int(index[0, 0]) : end].tolist()) == documents[1][: size - 5]


@pytest.mark.parametrize(
    ("size", "dtype"), [(256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "uint32"), (1 << 24, "uint32")]
)
def test_ids_take_few_bytes(size, dtype):

    class Sized(ByteTokenizer):
        output_size = size

    assert dtype_of(Sized()) == dtype


def test_a_document_without_tokens_is_counted(tmp_path):
    class Dropping(ByteTokenizer):
        def _encode_windows(self, windows):
            return [ids[ids != 32] for ids in super()._encode_windows(windows)]

    skipped = Counter({"empty documents": 2})
    folder = tmp_path / "tokens"
    folder.mkdir()
    documents = [[b"a b"], [b" " * 200_000], [b"c" * 70_000, b" " * 70_000], [b"  "]]
    write_shard(folder / "shard-000000", Dropping(), documents, skipped)
    finish(folder, Dropping(), ["shard-000000"])
    shards = Shards(folder)
    assert shards.skipped == {"documents without tokens": 2, "empty documents": 2}
    assert (shards.num_documents, shards.num_bytes, shards.num_tokens) == (2, 140_003, 70_002)
    cuts = numpy.load(folder / "shard-000000" / "cuts.npy")
    assert len(cuts) == 2 and (cuts[:, 1] > 3).all(), "those of the documents that are there"


def edit(path, change):
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "no folder": (lambda f: shutil.rmtree(f), "dataset.json: no such file; the command `tokenize` makes"),
    "unfinished": (lambda f: (f / "dataset.json").rename(f / "tokenize.json"), "tokens: is not finished; run the command `tokenize` again"),
    "no JSON": (lambda f: (f / "dataset.json").write_text("{"), "dataset.json: "),
    "format": (lambda f: edit(f / "dataset.json", lambda r: r | {"format": 2}), "its format is 2, and this version reads 1"),
    "changed": (lambda f: edit(f / "dataset.json", lambda r: r | {"tokens": 1}), "dataset.json: was changed after it"),
    "a name": (
        lambda f: edit(f / "dataset.json", lambda r: r | {"shards": [{"name": "../x", "sha256": "0" * 64}]}),
        "dataset.json: `shards` must be a list of names and sha256 sums",
    ),
    "a field": (lambda f: edit(f / "dataset.json", lambda r: r | {"more": 1}), "dataset.json: 'more' is unknown"),
    "tokenizer": (lambda f: Tokenizer.train([b"others " * 90], vocab_size=280).save(f), "its tokenizer is not the one that made the tokens"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer.json and no tokenizer.model"),
    "shard": (lambda f: shutil.rmtree(f / "shard-000001"), "shard-000001/shard.json: no such file"),
    "record": (lambda f: edit(f / "shard-000001/shard.json", lambda r: r), "shard.json: was changed after it was written"),
    "index": (lambda f: flip(f / "shard-000001/documents.npy", 130), "documents.npy: was changed after it was written"),
    "cuts": (lambda f: flip(f / "shard-000001/cuts.npy", 20), "cuts.npy: was changed after it was written"),
    "short": (lambda f: (f / "shard-000001/tokens.npy").write_bytes(b"x" * 130), "tokens.npy: has 130 bytes instead of"),
    "a link": (
        lambda f: ((f / "shard-000001/tokens.npy").unlink(), (f / "shard-000001/tokens.npy").symlink_to("/dev/zero")),
        "tokens.npy: must be a file, got a device",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_line(tmp_path, bpe, name):
    folder = shards_of(tmp_path / "tokens", [b"to be", b"or not to be", b"that is"], bpe)
    damage, message = DAMAGE[name]
    damage(folder)
    with pytest.raises((FileError, FileNotFoundError)) as caught:
        Shards(folder)
    assert message in str(caught.value) and str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_tokens_are_compared_when_that_is_asked_for(tmp_path):
    folder = shards_of(tmp_path / "tokens", [b"to be", b"or not to be", b"that is"])
    flip(folder / "shard-000001" / "tokens.npy", 130)
    shards = Shards(folder)
    with pytest.raises(FileError, match="shard-000001/tokens.npy: was changed after it was written"):
        shards.verify()
    flip(folder / "shard-000001" / "tokens.npy", 130)
    flip(folder / "shard-000001" / "tokens.npy", 30)
    with pytest.raises(FileError, match="tokens.npy: must be an array"):
        shards.document(1)


@pytest.mark.parametrize("documents", [[], [b"x"], [b"x", b"x"]], ids=["none", "one byte", "copies"])
def test_too_little_to_hold_out(tmp_path, documents):
    with pytest.raises(FileError, match="must hold 2 bytes of text"):
        Shards(shards_of(tmp_path / "tokens", documents)).hold_out()


@pytest.mark.parametrize("folder", [None, 3, ["tokens"]])
def test_a_folder_is_a_path(folder):
    with pytest.raises(TypeError, match="Shards: `folder` must be"):
        Shards(folder)
