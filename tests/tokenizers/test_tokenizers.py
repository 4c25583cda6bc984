"""Tokenizers: bytes, the `tokenizers` package's files and sentencepiece models encode text and decode it exactly."""

import itertools
import random

import numpy as np
import pytest
from tokenizer_kinds import tokenizer  # noqa: F401, a fixture
from tokenizer_kinds import KINDS, SOURCE, from_json, other, package, sentencepiece, word_level_model
from hypothesis import given
from hypothesis import strategies as st

from megalodon_ops.storage.files import FileError
from megalodon_ops.tokenizers import START_TOKEN, WINDOW, ByteTokenizer, Tokenizer, load_tokenizer, text

NOT_UTF8 = b"caf\xc3\xa9 \xff\xfe then \xe2\x98 more \xc3"


def decodable(tokenizer, document):
    """Return the document as it is decoded: unchanged, or with U+FFFD for invalid UTF-8."""
    return document if tokenizer.byte_level else document.decode(errors="replace").encode()


TEXTS = [b"", b"to be or not", b" two  spaces\n\n\tand tabs", b"a\0b", SOURCE[:3000]]
TEXTS += ["\u00ef \u2603 \U0001f600".encode()]


def library_ids(tokenizer, text):
    """Return the ids of the package itself: `tokenizers`, or sentencepiece."""
    model = tokenizer._model
    return model.encode(text, add_special_tokens=False).ids if hasattr(model, "to_str") else model.Encode(text)


@pytest.mark.parametrize(
    "document", [*TEXTS, NOT_UTF8, random.Random(0).randbytes(500)], ids=lambda text: repr(text[:12])
)
def test_text_is_decoded_exactly(tokenizer, document):
    ids = tokenizer.encode(document)
    assert ids.dtype == np.int32 and all(0 <= i < tokenizer.vocab_size for i in ids)
    assert not {tokenizer.start, tokenizer.end} & {*ids.tolist()}
    assert tokenizer.start not in ids
    assert tokenizer.decode(ids) == tokenizer.decode([tokenizer.start, *ids]) == decodable(tokenizer, document)
    assert tokenizer.encode(bytearray(document)).tolist() == ids.tolist()
    if document.isascii():
        assert tokenizer.encode(document.decode()).tolist() == ids.tolist()


@given(st.binary(max_size=60), st.text(max_size=40))
def test_arbitrary_text_is_decoded_exactly(tokenizer, some_bytes, text):
    for content in (some_bytes, text.encode(), some_bytes + text.encode() + some_bytes):
        assert tokenizer.decode(tokenizer.encode(content)) == decodable(tokenizer, content)


SMALL = 4096


@pytest.fixture
def small_windows(monkeypatch):
    """Cut long texts often."""
    assert WINDOW == text.WINDOW > SMALL
    monkeypatch.setattr(text, "WINDOW", SMALL)


@pytest.mark.usefixtures("small_windows")
def test_the_ids_are_the_packages(tokenizer):
    if tokenizer.byte_level:
        assert tokenizer.encode(SOURCE).tolist() == list(SOURCE)
        return
    long = SOURCE[500:60_000] + "\n\n  \u2603 end  \n".encode()
    assert len(list(tokenizer.encode_pieces([long]))) > 14
    assert tokenizer.encode(long).tolist() == library_ids(tokenizer, long.decode())


@pytest.mark.usefixtures("small_windows")
def test_pieces_of_arbitrary_sizes_give_equal_ids(tokenizer):
    long = SOURCE[:9000] + "\u4e2d\u6587".encode() * SMALL + SOURCE[:9000] + b"\xff"  # where no word ends, letters do
    whole = tokenizer.encode(long)
    for sizes in ([100], [SMALL, 1, 17], [3 * SMALL]):
        parts = []
        rest = long
        for size in itertools.cycle(sizes):
            parts.append(rest[:size])
            rest = rest[size:]
            if not rest:
                break
        found = list(tokenizer.encode_pieces(iter(parts)))
        assert np.array_equal(np.concatenate(found), whole)
    assert tokenizer.encode_batch([long, b"", b"x"])[0].tolist() == whole.tolist()
    assert tokenizer.decode(tokenizer.encode(long[:9000])) == long[:9000]


@pytest.mark.usefixtures("small_windows")
def test_long_text_takes_memory_for_a_piece(tokenizer):
    """No array is longer than a window, and pieces are read lazily."""
    num_read = 0

    def pieces():
        nonlocal num_read
        for _ in range(40):
            num_read += 1
            yield SOURCE[: SMALL // 2]

    for number, ids in enumerate(tokenizer.encode_pieces(pieces()), 1):
        assert len(ids) <= SMALL
        if number == 3:
            assert num_read <= 8


def test_text_of_token_by_token_equals_the_text(tokenizer):
    text = "d\u00e9f \u2603 x".encode()
    ids = tokenizer.encode(text).tolist()
    assert b"".join(tokenizer.text_of(iter(ids))) == text
    for cut in range(len(ids) + 1):
        after = [tokenizer.start, *ids[:cut]]
        assert tokenizer.decode(after) + b"".join(tokenizer.text_of(ids[cut:], after=after)) == text


def test_saved_and_loaded(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "new" / "folder")
    for path in (tmp_path / "new" / "folder", next((tmp_path / "new" / "folder").glob("tokenizer.[jm]*"))):
        loaded = load_tokenizer(path)
        assert type(loaded) is type(tokenizer)
        facts = ["vocab_size", "start", "end", "end_token", "fingerprint"]
        assert [getattr(loaded, fact) for fact in facts] == [getattr(tokenizer, fact) for fact in facts]
        assert loaded.encode(SOURCE).tolist() == tokenizer.encode(SOURCE).tolist()


def test_on_a_full_disk_the_tokenizer_before_stays(tmp_path, file_size_limit):
    package("tokenizers")
    Tokenizer.train([SOURCE], vocab_size=300).save(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for limit in (0, 3000):
        with file_size_limit(limit), pytest.raises(OSError, match="/tokenizer.json: could not be written: File too"):
            Tokenizer.train([SOURCE], vocab_size=301).save(tmp_path)
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_fingerprints_differ(tmp_path):
    package("tokenizers")
    one, other = (Tokenizer.train([SOURCE], vocab_size=size) for size in (300, 301))
    assert len({one.fingerprint, other.fingerprint, ByteTokenizer().fingerprint}) == 3
    one.save(tmp_path)
    again = Tokenizer.from_file(tmp_path / "tokenizer.json", start="a")
    assert again.start == one.encode("a")[0] and again.fingerprint != one.fingerprint
    again.save(tmp_path)
    assert load_tokenizer(tmp_path).start == again.start


def test_start_and_end_of_a_document(tmp_path):
    assert (ByteTokenizer().start, ByteTokenizer().end) == (256, 256)
    ids = {"byte-level BPE": (599, 599), "its own start": (0, 0), "spaced BPE": (1, 2), "sentencepiece": (1, 2)}
    for kind, (start, end) in (ids | {"no start": (500, 2)}).items():
        tokenizer = KINDS[kind](tmp_path)
        assert (tokenizer.start, tokenizer.end) == (start, end), kind
        assert tokenizer.decode([start, *tokenizer.encode("a"), end]) == b"a"


def test_a_named_end(tmp_path):
    package("tokenizers")
    one = from_json(word_level_model({"a": 0, "<end>": 1}), tmp_path)
    assert one.end == one.start == 2
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<end>"}}')
    for named in (Tokenizer.from_file(tmp_path / "tokenizer.json", end="<end>"), load_tokenizer(tmp_path)):
        assert (named.start, named.end, named.end_token) == (2, 1, "<end>")
        assert named.fingerprint == one.fingerprint, "ids are the same"
    with pytest.raises(FileError, match="the end token '<stop>' must be in the vocabulary"):
        Tokenizer.from_file(tmp_path / "tokenizer.json", end="<stop>")


@pytest.mark.parametrize("words", [START_TOKEN, "<|endoftext|>", "<s> x </s>"])
def test_text_that_looks_like_a_special_token_is_encoded_as_text(tokenizer, words):
    ids = tokenizer.encode(words)
    assert tokenizer.start not in ids and tokenizer.decode(ids) == words.encode()


def test_a_tokenizer_that_drops_text(tmp_path):
    sp = sentencepiece(tmp_path, normalization_rule_name="nmt_nfkc", byte_fallback=False, remove_extra_whitespaces=True)
    assert sp.decode(sp.encode("two  words\n")) == b"two words"


def test_transformers_reads_a_saved_tokenizer(tokenizer, tmp_path):
    transformers = package("transformers")
    tokenizer.save(tmp_path)
    if tokenizer.file_name == "tokenizer.model":
        package("google.protobuf")
    read = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ["to be or not", "na\u00efve \u2603\n\n  x"]:
        assert read(text, add_special_tokens=False).input_ids == tokenizer.encode(text).tolist()
        assert read.decode(tokenizer.encode(text)) == text
    assert (read.bos_token_id, read.eos_token_id) == (tokenizer.start, tokenizer.end)
    assert len(read) == tokenizer.vocab_size
    if tokenizer.start == tokenizer.vocab_size - 1 and tokenizer.file_name == "tokenizer.json":
        assert read("to be").input_ids == [tokenizer.start, *tokenizer.encode("to be")]
    read.save_pretrained(tmp_path / "again")
    again = load_tokenizer(tmp_path / "again")
    assert again.encode(SOURCE).tolist() == tokenizer.encode(SOURCE).tolist() and again.start == tokenizer.start
    assert again.end == tokenizer.end


def test_the_byte_tokenizer_needs_no_package(tmp_path, monkeypatch):
    import sys

    for name in ("tokenizers", "sentencepiece", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    ByteTokenizer().save(tmp_path)
    assert isinstance(load_tokenizer(tmp_path), ByteTokenizer)
    for call in (lambda: Tokenizer.train([SOURCE], vocab_size=300), lambda: load_tokenizer(other(tmp_path))):
        with pytest.raises(ImportError, match=r'needs tokenizers, .*: pip install ".*\[train\]"'):
            call()


def test_ids_with_gaps(tmp_path):
    """The package uses the number of tokens as an added token's id, which may be taken."""
    package("tokenizers")
    with pytest.raises(FileError, match="two tokens have the id 3, "):
        from_json(word_level_model({"a": 0, "b": 1, "c": 3}), tmp_path)
    tokenizer = from_json(word_level_model({"a": 0, "b": 1, "<begin>": 5}), tmp_path)
    assert (tokenizer.start, tokenizer.vocab_size) == (3, 6)
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").fingerprint == tokenizer.fingerprint
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": {"content": "<begin>"}}')
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.start, tokenizer.vocab_size) == (5, 6)
    assert tokenizer.encode("a").tolist() == [0]
