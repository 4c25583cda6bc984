"""Documents that `tokenize` reads from text files and JSON lines, and the division of files."""

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalodon_ops.cli import documents as reading
from megalodon_ops.cli.documents import split_files, documents_of
from megalodon_ops.files import FileError

TEXT = st.text(max_size=30)
LINES = st.one_of(
    TEXT.map(lambda text: (json.dumps({"text": text}).encode(), text.encode() if text else "empty documents")),
    TEXT.map(lambda text: (json.dumps({"id": [1], "text": text + "x"}, ensure_ascii=False).encode(), (text + "x").encode())),
    st.sampled_from(["", " ", "\t \r"]).map(lambda blank: (blank.encode(), None)),
    st.sampled_from(
        [b"{", b"[1]", b"3", b"null", b'"text"', b"\xff\xfe", b'{"text": "\xff"}', b'{"text": 1' + b"9" * 5000 + b"}",
         b"[" * 20_000, b'{"a": ' * 5000, b'{"text": "a"} {"text": "b"}', b"\0\0\0"]
    ).map(lambda line: (line, "lines without a text 'text'")),
    st.sampled_from([b"{}", b'{"body": "a"}', b'{"text": null}', b'{"text": ["a"]}', b'{"TEXT": "a"}', b'{"text": 5}']).map(
        lambda line: (line, "lines without a text 'text'")
    ),
    st.just((rb'{"text": "a \ud800 b"}', "a \ufffd b".encode())),
    st.just((rb'{"text": "\ud83d\ude00"}', "\U0001f600".encode())),
)  # fmt: skip


@given(lines=st.lists(LINES, max_size=12), size=st.integers(1, 300), ends=st.booleans())
def test_documents_do_not_depend_on_the_division_of_files(tmp_path, lines, size, ends):
    """Each line is a document, or is counted by its fault."""
    path, other = tmp_path / "some.jsonl", tmp_path / "other.txt"
    path.write_bytes(b"\n".join(line for line, _ in lines) + b"\n" * ends)
    other.write_bytes(b"text")
    skipped, found = Counter(), []
    files = [path, other] if path.stat().st_size else [other]
    units = split_files(files, size)
    for unit in units:
        for pieces in documents_of(unit, "text", skipped):
            found.append(b"".join(pieces))
    assert found == [wanted for _, wanted in lines if isinstance(wanted, bytes)] + [b"text"]
    assert skipped == Counter(wanted for _, wanted in lines if isinstance(wanted, str))
    assert reading.total_size(units) == path.stat().st_size + 4


@given(sizes=st.lists(st.tuples(st.integers(1, 100), st.booleans()), min_size=1, max_size=20), size=st.integers(1, 150))
def test_files_are_divided_into_units_of_about_a_size(tmp_path, sizes, size):
    files = []
    for number, (length, lines) in enumerate(sizes):
        files.append(tmp_path / f"{number}{'.jsonl' if lines else '.txt'}")
        files[-1].write_bytes(b" " * length)
    units = split_files(files, size)
    spans = [span for unit in units for span in unit]
    for file, (length, lines) in zip(files, sizes, strict=True):
        own_spans = [span for span in spans if span.path == file]
        assert [own_spans[0].begin, *(span.end for span in own_spans)] == [*(span.begin for span in own_spans), length]
        assert lines or len(own_spans) == 1
    for unit in units[:-1]:
        assert size <= reading.total_size([unit]) and reading.total_size([unit[:-1]]) < size


def test_a_byte_order_mark_is_ignored(tmp_path):
    path = tmp_path / "some.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n{"text": "b"}\n')
    (unit,) = split_files([path], 1000)
    skipped = Counter()
    assert [b"".join(p) for p in documents_of(unit, "text", skipped)] == [b"a", b"b"] and not skipped


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    for name in ("gone.txt", "gone.jsonl"):
        (tmp_path / name).write_bytes(b"text")
        units = split_files([tmp_path / name], 1000)
        (tmp_path / name).unlink()
        (tmp_path / name).mkdir()
        with pytest.raises(FileError, match=f"{name}: must be a file, got a folder"):
            [list(pieces) for pieces in documents_of(units[0], "text", Counter())]
