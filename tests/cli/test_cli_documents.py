"""Documents that `tokenize` and `train` read from text files, JSON lines and tables, and the division of files."""

import csv
import gzip
import json
import random
from collections import Counter

import pytest
from command_line import TINY, error_of, output
from hypothesis import given
from hypothesis import strategies as st

from megalodon_ops.cli import documents as reading
from megalodon_ops.cli import main
from megalodon_ops.cli.data import load_corpus, load_documents
from megalodon_ops.cli.documents import documents_of, kind_of, split_files
from megalodon_ops.cli.errors import CommandError
from megalodon_ops.cli.options import TextOptions
from megalodon_ops.storage.files import FileError

TEXT = st.text(max_size=30)
# Lines without a text 'text'; then LINES: a line with its document, the reason why it is skipped, or None for a blank.
FAULTY = (
    b'{ [1] 3 null "text" {"text":"a"}{"text":"b"} {} {"body":"a"} {"text":null} {"text":["a"]} {"TEXT":"a"}'.split()
)
FAULTY += [b'{"text": 5}', b'{"text": 1%s}' % (b"9" * 5000), b'{"text": "\xff"}', b"\xff\xfe", b"\0\0\0"]
FAULTY += [b"[" * 20_000, b'{"a": ' * 5000]
LINES = st.one_of(
    TEXT.map(lambda text: (json.dumps({"text": text}).encode(), text.encode() if text else "empty documents")),
    TEXT.map(
        lambda text: (json.dumps({"id": [1], "text": f"{text}x"}, ensure_ascii=False).encode(), f"{text}x".encode())
    ),
    st.sampled_from(["", " ", "\t \r"]).map(lambda blank: (blank.encode(), None)),
    st.sampled_from(FAULTY).map(lambda line: (line, "lines without a text 'text'")),
    st.just((rb'{"text": "a \ud800 b"}', "a \ufffd b".encode())),
    st.just((rb'{"text": "\ud83d\ude00"}', "\U0001f600".encode())),
)


@given(lines=st.lists(LINES, max_size=12), size=st.integers(1, 300), ends=st.booleans())
def test_documents_do_not_depend_on_the_division_of_files(tmp_path, lines, size, ends):
    """Each line is a document, or is counted by its fault."""
    path = tmp_path / "some.jsonl"
    other = tmp_path / "other.txt"
    path.write_bytes(b"\n".join(line for line, _ in lines) + b"\n" * ends)
    other.write_bytes(b"text")
    skipped = Counter()
    found = []
    files = [path, other] if path.stat().st_size else [other]
    units = split_files(files, size)
    for unit in units:
        for pieces in documents_of(unit, TextOptions(), skipped):
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
    assert [b"".join(p) for p in documents_of(unit, TextOptions(), skipped)] == [b"a", b"b"] and not skipped


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    for name in ("gone.txt", "gone.jsonl"):
        (tmp_path / name).write_bytes(b"text")
        units = split_files([tmp_path / name], 1000)
        (tmp_path / name).unlink()
        (tmp_path / name).mkdir()
        with pytest.raises(FileError, match=f"{name}: must be a file, got a folder"):
            [list(pieces) for pieces in documents_of(units[0], TextOptions(), Counter())]


BODY = TextOptions(field="body")
TEXTS = ["one", "", "d\u00e9f " * 50, None, "\U0001f600", "two\nlines", "last"]
WANTED = [text.encode() for text in TEXTS if text]
SKIPPED = {"empty documents": 1, "{} without a text 'body'": 1}


def write_parquet(path, texts=TEXTS, **options):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"id": [*range(len(texts))], "body": texts}), path, **options)


def zstd():
    return pytest.importorskip("compression.zstd" if reading.sys.version_info >= (3, 14) else "backports.zstd")


def write_csv(path, texts=TEXTS, encoding="utf-8"):
    with open(path, "w", encoding=encoding, newline="") as file:
        rows = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        rows.writerows([("id", "body"), *((number, text) for number, text in enumerate(texts))])


def write_lines(path, texts=TEXTS):
    lines = "".join(json.dumps({"body": text}) + "\n" for text in texts).encode()
    if kind_of(path) == ".json":
        lines = json.dumps([{"body": text} for text in texts]).encode()
    compress = {".gz": gzip.compress, ".zst": lambda data: zstd().compress(data)}.get(path.suffix, bytes)
    half = len(lines) // 2
    path.write_bytes(
        compress(lines[:half]) + compress(lines[half:])
    )  # compressed files: two members (.gz), frames (.zst)


@pytest.mark.parametrize("name", "a.parquet a.jsonl.gz a.ndjson.zst a.jsonl a.json a.json.gz a.csv a.tsv".split())
def test_every_kind_of_file_gives_the_same_documents(tmp_path, name):
    path = tmp_path / name
    kind = kind_of(path)
    if kind == ".parquet":
        write_parquet(path, row_group_size=2)
    else:
        (write_csv if kind in (".csv", ".tsv") else write_lines)(path)
    for size in (1, 1 << 30):
        skipped, units = Counter(), split_files([path], size)
        found = [b"".join(pieces) for unit in units for pieces in documents_of(unit, BODY, skipped)]
        assert found == WANTED
        if kind in (".csv", ".tsv"):  # an empty text and no text are the same there
            assert skipped == {"empty documents": 2}
        else:
            name = {".parquet": "rows", ".json": "entries"}.get(kind, "lines")
            assert skipped == {reason.format(name): count for reason, count in SKIPPED.items()}
        assert path.suffix != ".parquet" or len(units) == (4 if size == 1 else 1), "a row group is never divided"
    assert load_documents([path], BODY) == load_documents([tmp_path], BODY) == WANTED


def test_texts_of_other_encodings_and_compressed_texts(tmp_path):
    """`--encoding` holds for text and .csv; a compressed text is a document; a .json list may hold texts."""
    (tmp_path / "a.txt").write_bytes("d\u00e9f".encode("cp1252"))
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress("d\u00e9g".encode("cp1252")))
    write_csv(tmp_path / "c.csv", ["d\u00e9h", "i" * 200_000], encoding="cp1252")
    (tmp_path / "d.json").write_text(json.dumps(["j", 5, {"body": "k"}]))
    wanted = ["d\u00e9f", "d\u00e9g", "d\u00e9h", "i" * 200_000, "j", "k"]
    how = TextOptions(field="body", encoding="cp1252")
    assert load_documents([tmp_path], how) == [text.encode() for text in wanted]
    with pytest.raises(FileError, match=r"c.csv: 'utf-8.*' codec can't decode .*; name its encoding with --encoding"):
        load_documents([tmp_path / "c.csv"], BODY)


def test_files_are_listed_with_how_they_are_read(tmp_path, capsys):
    """Foreign tables, lists and lines in a folder are counted; a .json file without a list is a text, and is named."""
    write_parquet(tmp_path / "a.parquet")
    write_csv(tmp_path / "b.csv")
    (tmp_path / "c.json").write_text('{"scripts": {}}')
    (tmp_path / "d.txt").write_text("text")
    for number in range(12):
        (tmp_path / f"e{number:02}.png").write_bytes(BINARY["a.png"])
    assert load_documents([tmp_path]) == [b'{"scripts": {}}', b"text"]
    said = capsys.readouterr().err
    assert f"taking 1 .json file without a list as text: {tmp_path}/c.json" in said
    assert "skipping 12 of the files" in said and "e09.png and 2 more (--dry-run lists all); --encoding" in said
    assert "skipped: rows of id, body without a text 'text' (14)" in said
    listed = output(capsys, "tokenizer", "--train", "--dry-run", tmp_path, tmp_path / "d.txt")
    how = dict.fromkeys("ab", "documents") | dict.fromkeys("cd", "text")
    lines = [
        f"{tmp_path}/{path.name}: {how.get(path.name[0], 'skipped, not UTF-8 text')}"
        for path in sorted(tmp_path.iterdir())
    ]
    assert listed.splitlines() == [*lines, f"{tmp_path}/d.txt: text"]
    words = ["train", "--dry-run", "--data", tmp_path, "--glob", "e*", "--validation", tmp_path / "d.txt"]
    lines = output(capsys, *words).splitlines()
    assert lines[0].endswith("a.parquet: skipped, no --glob matches") and lines[4:6] == [
        f"{tmp_path}/e00.png: bytes",
        f"{tmp_path}/e01.png: bytes",
    ]
    assert lines[-1] == f"{tmp_path}/d.txt: text"
    assert "--dry-run: lists the files of --data" in error_of(capsys, "eval", "--checkpoint", "run", "--dry-run")
    assert "--encoding: must be an encoding of Python's" in error_of(capsys, "train", "--encoding", "latin-99")


def test_columns_of_other_types(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path, texts = tmp_path / "a.parquet", pyarrow.array(["a", "b", "a"], pyarrow.string())
    for kind in (pyarrow.large_string(), pyarrow.binary(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())):
        parquet.write_table(pyarrow.table({"text": texts.cast(kind)}), path)
        assert load_documents([path]) == [b"a", b"b", b"a"], kind


def test_damaged_and_wrong_files_are_named(tmp_path):
    write_parquet(tmp_path / "a.parquet")
    column = r"a.parquet: no document, but rows of id, body without a text 'text' \(7\); name a field with"
    for load in (load_documents, load_corpus):
        with pytest.raises(CommandError, match=column):
            load([tmp_path / "a.parquet"])
    write_lines(tmp_path / "a.jsonl.gz")
    write_lines(tmp_path / "a.jsonl.zst")
    for path in tmp_path.iterdir():
        whole = path.read_bytes()
        for damaged in (whole[:-9], b"x" * 50, whole[: len(whole) // 3]):
            path.write_bytes(damaged)
            for load in (load_documents, load_corpus):  # as `eval` and `train` read
                with pytest.raises(FileError, match=path.name):
                    load([path], BODY)


BINARY = {
    "a.png": b"\x89PNG\r\n\x1a\n" + bytes(10),
    "a.gz": gzip.compress(bytes(10)),
    "a.bin": random.Random(0).randbytes(500),
    "a.txt": "to be".encode("utf-16"),
}


@pytest.mark.parametrize("name", BINARY)
def test_binary_files_are_not_read_as_text(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(BINARY[name])
    with pytest.raises(CommandError, match=f"{name}: is neither text nor one of .jsonl, .ndjson, .json, .*parquet"):
        load_corpus([path])


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "cp1252", "shift-jis"])
def test_text_in_any_encoding_is_read(tmp_path, encoding):
    content = ("\x1b[1mto be\x0c " + ("\u3042\u3044" if encoding == "shift-jis" else "d\u00e9f") * 20).encode(encoding)
    (tmp_path / "a.txt").write_bytes(content)
    assert load_documents([tmp_path / "a.txt"]) == [content]


def test_commands_read_documents_from_fields(tmp_path, finished, quick, capsys):
    """`train`, `eval`, `tokenizer` and `tokenize` read the same documents."""
    texts = [f"line {number} of a book " * 9 for number in range(40)]
    write_lines(tmp_path / "a.jsonl", [*texts, None])
    data = [str(tmp_path / "a.jsonl"), "--field", "body"]
    assert load_corpus([tmp_path / "a.jsonl"], BODY).num_bytes < sum(map(len, texts))
    assert main(["train", "--data", *data, "--out", str(tmp_path / "run"), *TINY, "--steps", "2"]) == 0
    out, err = capsys.readouterr()
    assert " in 38 documents to learn from" in out and "skipped: lines without a text 'body' (1)" in err
    output(capsys, "eval", "--checkpoint", tmp_path / "run")
    assert ": 40 documents, " in output(capsys, "eval", "--checkpoint", finished, "--data", *data)
    tokenizer = ["--tokenizer", tmp_path / "run" / "best"]
    assert "the text: 40 documents" in output(capsys, "tokenizer", *tokenizer, *data)
    words = "no document, but lines without a text 'text' (41); name a field with --field"
    assert words in error_of(capsys, "train", "--data", tmp_path / "a.jsonl", "--out", tmp_path / "other")
