"""Documents, the held-out split and batches of the command line's training."""

import sysconfig
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megalodon_ops.cli.data import find_files, load_corpus, standard_library
from megalodon_ops.cli.errors import CommandError
from megalodon_ops.cli.options import TextOptions
from megalodon_ops.training import START, Batches, hold_out

documents = st.lists(st.binary(max_size=200), max_size=30)


@given(documents, st.randoms())
def test_the_split_partitions_distinct_documents(documents, random):
    distinct = {document for document in documents if document}
    if sum(map(len, distinct)) < 2:
        with pytest.raises(ValueError, match="hold_out: `documents` must have at least 2 bytes"):
            hold_out(documents)
        return
    corpus = hold_out(documents)
    shuffled = random.sample(documents, len(documents)) + documents[:3]
    assert hold_out(shuffled) == corpus, "neither order nor repetition matters"

    whole = [document for document in corpus.train + corpus.held_out if document in distinct]
    assert sum(map(len, corpus.train)) + sum(map(len, corpus.held_out)) == sum(map(len, distinct))
    assert corpus.train and corpus.held_out and all(corpus.train) and all(corpus.held_out)
    assert len(corpus.train) + len(corpus.held_out) - len(distinct) in (0, 1), "at most one document is cut"
    if len(whole) == len(distinct):
        assert set(whole) == distinct, "every document is in one part"


@pytest.mark.parametrize(
    "sizes", [[10_000], [10_000, 9_000], [100] * 300, [50_000] + [10] * 5], ids=["one", "two", "many", "one long"]
)
def test_about_a_twentieth_is_held_out(sizes):
    random = numpy.random.default_rng(0)
    corpus = hold_out([random.bytes(size) for size in sizes])
    assert 0.025 * sum(sizes) <= sum(map(len, corpus.held_out)) <= 0.05 * sum(sizes)


def test_the_end_of_one_document_is_held_out():
    text = bytes(range(200))
    corpus = hold_out([text])
    assert corpus.train == [text[:190]]
    assert corpus.held_out == [text[190:]]


def test_documents_of_validation_are_held_out_and_not_trained_on():
    documents, validation = [b"one", b"two", b"three", b"two"], [b"held", b"two", b"", b"held"]
    corpus = hold_out(documents, validation)
    assert sorted(corpus.train) == [b"one", b"three"] and sorted(corpus.held_out) == [b"held", b"two"]
    assert corpus.num_bytes == 8
    assert hold_out(documents[::-1], validation[::-1]) == corpus
    fingerprints = {hold_out(documents, other).fingerprint for other in (None, validation, [b"held"], [b"two"])}
    assert len(fingerprints) == 4, "the held-out text counts, too"
    words = "hold_out: there must be a document in `validation`, and one in `documents` that is not in it"
    for nothing_to_train_on, nothing_held_out in (([b"two"], validation), (documents, [b""])):
        with pytest.raises(ValueError, match=words):
            hold_out(nothing_to_train_on, nothing_held_out)


def test_fingerprints_distinguish_texts():
    assert hold_out([b"one", b"two"]).fingerprint != hold_out([b"one", b"too"]).fingerprint


def test_files_of_folders(tmp_path):
    for name in ("b.txt", "a/c.bin", "a/.hidden", ".git/config", "d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "empty").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    found = find_files([tmp_path / "d.txt", tmp_path])
    assert [str(path.relative_to(tmp_path)) for path in found] == ["d.txt", "b.txt", "d.txt", "a/c.bin"]
    assert load_corpus([tmp_path]) == hold_out([b"d.txt", b"b.txt", b"a/c.bin"])


@pytest.mark.parametrize(
    "name, message",
    [
        ("missing", "missing: no such file or folder"),
        ("empty", "empty: the file is empty"),
        ("folder", "folder: no file with content in this folder"),
    ],
)
def test_missing_text(tmp_path, name, message):
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(CommandError, match=message):
        find_files([tmp_path / name])


def write_files(tmp_path, files):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    return tmp_path


def names(found):
    return [path.name for path in found]


PNG = b"\x89PNG\r\n\x1a\n"
LONG = "\N{SNOWMAN}".encode() * (1 << 19)  # 1.5 MiB; pieces of 1 MiB end inside a letter
MIXED = {
    "a.txt": b"plain",
    "b.png": PNG,
    "c.txt": "d\u00e9f".encode(),
    "d.txt": "d\u00e9f".encode("latin-1"),
    "e.txt": b"nul\0nul",
    "f.txt": LONG,
    "g.txt": LONG[:-1],
    "sub/h.md": b"deep",
}


def test_text_files_of_a_folder_are_taken_and_the_rest_is_reported(tmp_path, capsys):
    folder = write_files(tmp_path, MIXED)
    assert names(find_files([folder])) == ["a.txt", "c.txt", "f.txt", "h.md"]
    skipped = "skipping 4 of the files, which are not text in UTF-8 or --encoding: "
    skipped += ", ".join(f"{folder}/{name}" for name in ("b.png", "d.txt", "e.txt", "g.txt"))
    skipped += "; --encoding names another encoding, --glob PATTERN takes every match"
    taken = f"taking 3 .txt ({5 + 4 + len(LONG):,} bytes), 1 .md (4 bytes); --glob '*.txt' takes files of one kind"
    assert capsys.readouterr().err == f"megalodon_ops: {taken}\nmegalodon_ops: {skipped}\n"
    assert names(find_files([folder / "d.txt", folder / "sub"])) == ["d.txt", "h.md"], "named text is taken"
    assert capsys.readouterr().err == "megalodon_ops: taking 1 .md (4 bytes)\n"


def test_kinds_of_files_beyond_eight_are_counted(tmp_path, capsys):
    find_files([write_files(tmp_path, {f"f.{kind}": b"x" * (9 - kind) for kind in range(9)} | {"f": b"x" * 20})])
    said = capsys.readouterr().err
    assert "taking 1 without suffix (20 bytes), 1 .0 (9 bytes), " in said
    assert said.endswith(", 1 .6 (3 bytes), 2 other kinds; --glob '*.txt' takes files of one kind\n")


def test_globs_choose_among_a_folders_files(tmp_path, capsys):
    folder = write_files(tmp_path, MIXED)
    for globs, found in {
        ("*",): sorted(path.rpartition("/")[2] for path in MIXED),
        ("*.md", "[bd].*"): ["b.png", "d.txt", "h.md"],
        ("sub/*",): ["h.md"],
    }.items():
        assert names(find_files([folder], TextOptions(glob=globs))) == found
    assert names(find_files([folder / "a.txt", folder], TextOptions(glob=("*.md",)))) == ["a.txt", "h.md"]
    with pytest.raises(CommandError, match="no file in this folder matches b.txt or c.md"):
        find_files([folder], TextOptions(glob=("b.txt", "c.md")))
    assert capsys.readouterr().err == ""


def test_a_folder_without_text(tmp_path):
    folder = write_files(tmp_path, {"b.png": PNG})
    words = "no text in this folder: skipping 1 of the files, which are not text in UTF-8 or --encoding: .*b.png; --enc"
    with pytest.raises(CommandError, match=words):
        load_corpus([folder])
    (tmp_path / "a.png").write_bytes(PNG + b"other")
    assert load_corpus([folder], TextOptions(glob=("*.png",))) == hold_out([PNG, PNG + b"other"])


def test_standard_library():
    files = standard_library()
    root = Path(sysconfig.get_path("stdlib"))
    assert root / "argparse.py" in files
    parts = {part for path in files for part in path.relative_to(root).parts}
    assert not parts & {"site-packages", "dist-packages", "test", "tests", "__pycache__"}
    assert sum(path.stat().st_size for path in files) > 5_000_000


class Follower:
    """Reassembles documents by `cu_seqlens`, `carry` and `last`, and checks inputs against targets."""

    def __init__(self):
        self.open = {}  # row -> ids so far
        self.closed = []

    def follow(self, batch):
        bounds = batch.cu_seqlens.tolist()
        tokens, targets = batch.tokens[0].tolist(), batch.targets[0].tolist()
        assert bounds[0] == 0 and bounds[-1] == len(tokens) == len(targets)
        before, self.open = self.open, {}
        pieces = []
        for start, stop, row in zip(bounds[:-1], bounds[1:], batch.carry.tolist(), strict=True):
            assert start < stop
            past = [] if row < 0 else before.pop(row)
            assert tokens[start] == (past[-1] if past else START)
            assert tokens[start + 1 : stop] == targets[start : stop - 1]
            pieces.append(past + targets[start:stop])
        ends = {sequence: row for row, sequence in enumerate(batch.last.tolist()) if sequence >= 0}
        for sequence, piece in enumerate(pieces):
            if sequence in ends:
                self.open[ends[sequence]] = piece
            else:
                self.closed.append(piece)
        self.closed += before.values()  # rows whose documents have ended


nonempty_documents = st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=12)
shape = st.tuples(st.integers(1, 4), st.integers(1, 16))
ends = st.sampled_from(["start", 7, None])


def targets_of(documents, end):
    """Targets of each document: its bytes, and its end if there is one."""
    added = {None: [], "start": [START]}.get(end, [end])
    return [[*document, *added] for document in documents]


@given(nonempty_documents, shape, ends)
def test_one_streamed_pass_reads_every_byte_and_every_end_once(documents, shape, end):
    batches = Batches(documents, *shape, context="streamed", seed=None, end=end)
    follower = Follower()
    while (batch := batches.next()) is not None:
        follower.follow(batch)
    assert sorted(follower.closed + list(follower.open.values())) == sorted(targets_of(documents, end))


@given(nonempty_documents, shape, st.integers(0, 5), ends)
def test_streamed_batches_are_full_and_shuffled_documents(documents, shape, seed, end):
    rows, length = shape
    batches = Batches(documents, rows, length, context="streamed", seed=seed, end=end)
    follower = Follower()
    wanted = targets_of(documents, end)
    for _ in range(2 * sum(map(len, wanted)) // (rows * length) + 2):  # two epochs, and more
        batch = batches.next()
        assert batch.tokens.numel() == rows * length
        follower.follow(batch)
    assert all(document in wanted for document in follower.closed)
    assert max(follower.closed.count(document) / wanted.count(document) for document in wanted) >= 1


@given(nonempty_documents, shape, st.integers(0, 5), ends)
def test_packed_rows_lay_documents_end_to_end(documents, shape, seed, end):
    rows, length = shape
    batches = Batches(documents, rows, length, context="packed", seed=seed, end=end)
    wanted = targets_of(documents, end)
    total = sum(map(len, wanted))
    text = []
    while len(text) < total:
        batch = batches.next()
        bounds = batch.cu_seqlens.tolist()
        assert set(range(0, rows * length + 1, length)) <= set(bounds), "no sequence crosses a row's end"
        assert (batch.carry == -1).all()
        text += batch.targets[0].tolist()
    order = batches._shuffled(0).tolist()
    assert text[:total] == [token for i in order for token in wanted[i]]
    assert sorted(order) == list(range(len(documents)))


def test_documents_are_cut_into_parts_of_the_context_length():
    """Parts have equal lengths, cover the text, and are shuffled as documents."""
    book, note = bytes(range(200)), b"ab"
    batches = Batches([book, note], rows=1, length=10, context_length=30)
    assert batches.lengths.tolist() == [28, 29, 29, 28, 29, 29, 29, 3]
    seen = [batches.next() for _ in range(21)]
    epoch = torch.cat([batch.targets[0] for batch in seen])[:204].tolist()
    assert sorted(epoch) == sorted([*book, *note, START, START]), "the last part alone has the book's end"
    assert epoch[epoch.index(199) + 1] == START
    first_ids = [int(batch.targets[0, begin]) for batch in seen for begin in batch.cu_seqlens[:-1][batch.carry < 0]][:8]
    assert sorted(first_ids) == [0, 28, 57, 86, ord("a"), 114, 143, 172] and first_ids != sorted(first_ids)
    again = Batches([book, note], rows=1, length=10, context_length=30)
    again.seek(batches.position())
    assert torch.equal(again.next().tokens, batches.next().tokens)


@pytest.mark.parametrize("context_length", [51, 10**12])
def test_long_documents_are_cut_where_rows_would_read_the_same(context_length):
    """Each row reads its own part of a book in an epoch; the parts together are the book."""
    book, note = bytes(range(200)), b"ab"
    batches = Batches([book, note], rows=4, length=10, context_length=context_length)
    assert batches.lengths.tolist() == [50, 50, 50, 51, 3]
    seen = [batches.next() for _ in range(6)]
    assert len({int(seen[0].targets[0, row * 10]) for row in range(4)}) == 4, "rows begin in different parts"
    tokens = [int(token) for batch in seen for token in batch.targets[0]]
    assert set(tokens) >= set(book)


def test_no_part_is_only_an_end():
    batches = Batches([b"abc"], rows=9, length=1, context_length=1)
    assert batches.lengths.tolist() == [2, 2]
    for batch, _ in zip(batches, range(20), strict=False):
        assert not ((batch.tokens == START) & (batch.targets == START)).any()


def test_documents_that_fit_a_row_are_not_cut():
    documents = [bytes(range(size)) for size in (30, 40, 50)]
    assert Batches(documents, rows=2, length=8, context_length=51).documents == documents
    assert Batches(documents, rows=64, length=51, context_length=51).documents == documents, "there is too little text"
    assert Batches(documents, rows=64, length=50).documents == documents
    assert Batches(documents, rows=2, length=8, context_length=50, end=None).documents == documents
