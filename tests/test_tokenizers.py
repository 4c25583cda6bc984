"""Tokenizers: bytes, the `tokenizers` package's files and sentencepiece models give ids, and exact text back."""

from __future__ import annotations

import argparse
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalodon_ops.errors import FileError
from megalodon_ops.tokenizers import START_TOKEN, WINDOW, ByteTokenizer, Tokenizer, load_tokenizer, text

SOURCE = Path(argparse.__file__).read_bytes()
NOT_UTF8 = b"caf\xc3\xa9 \xff\xfe then \xe2\x98 more \xc3"
TEXTS = [
    b"",
    b"to be or not",
    b" two  spaces\n\n\tand tabs",
    "na\u00efve \u2603 \U0001f600".encode(),
    b"a\0b",
    SOURCE[:3000],
]


def package(name):
    return pytest.importorskip(name)


def from_json(model, folder, **options):
    path = folder / "tokenizer.json"
    model.save(str(path))
    return Tokenizer.from_file(path, **options)


def byte_level_bpe(folder):
    package("tokenizers")
    return Tokenizer.train([SOURCE], vocab_size=600)


def with_its_own_start(folder):
    """A byte-level BPE with the regular expression of newer vocabularies, and <|endoftext|> as its first id."""
    package("tokenizers")
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Model

    model = Model(models.BPE())
    words = r"'s|'t|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(words), "isolated"), byte_level])
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator([SOURCE.decode()], trainer)
    model.enable_truncation(5)
    model.enable_padding(length=7, pad_id=0, pad_token="<|endoftext|>")
    return from_json(model, folder)


def spaced_bpe(folder):
    """A BPE over U+2581 with tokens of single bytes, as vocabularies made from sentencepiece models are."""
    package("tokenizers")
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Model

    model = Model(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    model.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    model.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    model.train_from_iterator(
        SOURCE.decode().split("\n")[:300],
        trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False, limit_alphabet=80),
    )
    content = json.loads(model.to_str())
    content["added_tokens"] = content["added_tokens"][:3]
    content["pre_tokenizer"] = None  # as in such vocabularies, whose merges stay inside words all the same
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return Tokenizer.from_file(folder / "tokenizer.json")


def sentencepiece(folder, **options):
    sp = package("sentencepiece")
    (folder / "text").write_bytes(SOURCE)
    options = dict(byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False) | options
    sp.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "tokenizer"), vocab_size=500, minloglevel=2, **options
    )
    return Tokenizer.from_file(folder / "tokenizer.model")


KINDS = {
    "bytes": lambda folder: ByteTokenizer(),
    "byte-level BPE": byte_level_bpe,
    "its own start": with_its_own_start,
    "spaced BPE": spaced_bpe,
    "sentencepiece": lambda folder: sentencepiece(folder, model_type="bpe"),
    "no start": lambda folder: sentencepiece(folder, model_type="bpe", bos_id=-1),
}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request, tmp_path_factory):
    return KINDS[request.param](tmp_path_factory.mktemp("tokenizer"))


def library_ids(tokenizer, text):
    """What the package itself makes of a text."""
    model = tokenizer._model
    return model.encode(text, add_special_tokens=False).ids if hasattr(model, "to_str") else model.Encode(text)


@pytest.mark.parametrize(
    "document", [*TEXTS, NOT_UTF8, random.Random(0).randbytes(500)], ids=lambda text: repr(text[:12])
)
def test_text_comes_back(tokenizer, document):
    ids = tokenizer.encode(document)
    assert ids.dtype == np.int32 and all(0 <= i < tokenizer.output_size for i in ids)
    assert tokenizer.start not in ids
    assert tokenizer.decode(ids) == tokenizer.decode([tokenizer.start, *ids]) == document
    assert tokenizer.encode(bytearray(document)).tolist() == ids.tolist()
    if document.isascii():
        assert tokenizer.encode(document.decode()).tolist() == ids.tolist()


@given(st.binary(max_size=60), st.text(max_size=40))
def test_any_text_comes_back(tokenizer, some_bytes, text):
    for content in (some_bytes, text.encode(), some_bytes + text.encode() + some_bytes):
        assert tokenizer.decode(tokenizer.encode(content)) == content


SMALL = 4096


@pytest.fixture
def small_windows(monkeypatch):
    """Long texts are cut often."""
    assert WINDOW == text.WINDOW > SMALL
    monkeypatch.setattr(text, "WINDOW", SMALL)


@pytest.mark.usefixtures("small_windows")
def test_the_ids_are_the_package_s(tokenizer):
    if tokenizer.byte_level:
        assert tokenizer.encode(SOURCE).tolist() == list(SOURCE)
        return
    long = SOURCE[500:60_000] + "\n\n  \u2603 end  \n".encode()
    assert len(list(tokenizer.encode_pieces([long]))) > 14
    assert tokenizer.encode(long).tolist() == library_ids(tokenizer, long.decode())


@pytest.mark.usefixtures("small_windows")
def test_pieces_of_any_sizes_give_equal_ids(tokenizer):
    long = SOURCE[:9000] + "\u4e2d\u6587".encode() * SMALL + SOURCE[:9000] + b"\xff"  # where no word ends, letters do
    whole = tokenizer.encode(long)
    for sizes in ([100], [SMALL, 1, 17], [3 * SMALL]):
        parts, at, turn = [], 0, 0
        while at < len(long):
            parts.append(long[at : at + sizes[turn % len(sizes)]])
            at, turn = at + len(parts[-1]), turn + 1
        found = list(tokenizer.encode_pieces(iter(parts)))
        assert np.array_equal(np.concatenate(found), whole)
    assert tokenizer.encode_batch([long, b"", b"x"])[0].tolist() == whole.tolist()
    assert tokenizer.decode(tokenizer.encode(long[:9000])) == long[:9000]


@pytest.mark.usefixtures("small_windows")
def test_long_text_takes_memory_for_a_piece(tokenizer):
    """No array is longer than a window, and an array comes before the next pieces are asked for."""
    asked = 0

    def pieces():
        nonlocal asked
        for _ in range(40):
            asked += 1
            yield SOURCE[: SMALL // 2]

    for number, ids in enumerate(tokenizer.encode_pieces(pieces()), 1):
        assert len(ids) <= SMALL
        if number == 3:
            assert asked <= 8


def test_token_by_token_the_text_is_equal(tokenizer):
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
        facts = ["vocab_size", "output_size", "start", "fingerprint"]
        assert [getattr(loaded, fact) for fact in facts] == [getattr(tokenizer, fact) for fact in facts]
        assert loaded.encode(SOURCE).tolist() == tokenizer.encode(SOURCE).tolist()


def test_fingerprints_differ(tmp_path):
    package("tokenizers")
    one, other = (Tokenizer.train([SOURCE], vocab_size=size) for size in (300, 301))
    assert len({one.fingerprint, other.fingerprint, ByteTokenizer().fingerprint}) == 3
    one.save(tmp_path)
    again = Tokenizer.from_file(tmp_path / "tokenizer.json", start="a")
    assert again.start == one.encode("a")[0] and again.fingerprint != one.fingerprint
    again.save(tmp_path)
    assert load_tokenizer(tmp_path).start == again.start


def test_starts(tmp_path):
    assert ByteTokenizer().start == 256
    for make, start, last in (
        (byte_level_bpe, 599, True), (with_its_own_start, 0, False), (spaced_bpe, 1, False), (sentencepiece, 1, False),
        (KINDS["no start"], 500, True),
    ):  # fmt: skip
        tokenizer = make(tmp_path)
        assert tokenizer.start == start
        assert (tokenizer.start == tokenizer.vocab_size - 1) == last
        assert tokenizer.output_size == tokenizer.vocab_size - last


@pytest.mark.parametrize("words", [START_TOKEN, "<|endoftext|>", "<s> x </s>"])
def test_text_that_looks_like_a_special_token_is_text(tokenizer, words):
    ids = tokenizer.encode(words)
    assert tokenizer.start not in ids and tokenizer.decode(ids) == words.encode()


def test_bits_per_byte_of_a_uniform_model(tokenizer):
    """log2(ids) * tokens / bytes, whatever the tokenizer, so that figures compare."""
    ids = tokenizer.encode(SOURCE)
    nats = len(ids) * math.log(tokenizer.output_size)
    assert nats / math.log(2) / len(SOURCE) == pytest.approx(math.log2(tokenizer.output_size) * len(ids) / len(SOURCE))


def word_piece(folder):
    """Lower case, spaces and all: what it drops does not come back, and its words are the package's."""
    package("tokenizers")
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Model

    model = Model(models.WordPiece(unk_token="[UNK]"))
    model.normalizer, model.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    model.decoder = decoders.WordPiece()
    special = ["[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    model.train_from_iterator([SOURCE.decode()], trainer)
    return from_json(model, folder)


def test_a_tokenizer_that_drops_text(tmp_path):
    tokenizer = word_piece(tmp_path)
    ids = tokenizer.encode("Return   the Argument\xff")
    assert tokenizer.decode(ids[:-1]).startswith(b"return the argument")
    after = [tokenizer.start, *ids[:1].tolist()]
    assert b"".join(tokenizer.text_of(ids[1:].tolist(), after=after)).startswith(b" the argument")
    assert tokenizer.start == tokenizer.vocab_size - 1
    sp = sentencepiece(tmp_path, normalization_rule_name="nmt_nfkc", byte_fallback=False, remove_extra_whitespaces=True)
    assert sp.decode(sp.encode("two  words\n")) == b"two words"


def test_transformers_reads_what_is_saved(tokenizer, tmp_path):
    transformers = package("transformers")
    tokenizer.save(tmp_path)
    if tokenizer.file_name == "tokenizer.model":
        package("google.protobuf")
    read = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ["to be or not", "na\u00efve \u2603\n\n  x"]:
        assert read(text, add_special_tokens=False).input_ids == tokenizer.encode(text).tolist()
        assert read.decode(tokenizer.encode(text)) == text
    assert read.bos_token_id == tokenizer.start and len(read) == tokenizer.vocab_size
    if tokenizer.start == tokenizer.vocab_size - 1 and tokenizer.file_name == "tokenizer.json":
        assert read("to be").input_ids == [tokenizer.start, *tokenizer.encode("to be")]
    read.save_pretrained(tmp_path / "again")
    again = load_tokenizer(tmp_path / "again")
    assert again.encode(SOURCE).tolist() == tokenizer.encode(SOURCE).tolist() and again.start == tokenizer.start


def test_the_byte_tokenizer_needs_no_package(tmp_path, monkeypatch):
    import sys

    for name in ("tokenizers", "sentencepiece", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    ByteTokenizer().save(tmp_path)
    assert isinstance(load_tokenizer(tmp_path), ByteTokenizer)
    for call in (lambda: Tokenizer.train([SOURCE], vocab_size=300), lambda: load_tokenizer(_other(tmp_path))):
        with pytest.raises(ImportError, match=r'needs tokenizers, .*: pip install ".*\[train\]"'):
            call()


def _other(folder):
    path = folder / "other.json"
    path.write_text((folder / "tokenizer.json").read_text().replace("<|startoftext|>", "<|begin|>"))
    return path


WRONG = {
    "missing": (None, "no such file"),
    "empty": (b"", "neither a JSON file of the `tokenizers` package nor a sentencepiece model"),
    "noise": (b"\xff\x00noise" * 9, ""),
    "no JSON": (b'{"model": ', "is no JSON"),
    "deep": (b'{"a":' * 100_000, "is no JSON"),
    "another JSON": (b'{"num_layers": 3}', ""),
    "no list": (b'{"added_tokens": [1]}', "is no tokenizer"),
    "model": (b'{"version": "1.0", "model": {"type": "None"}}', ""),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_files_are_refused_in_one_line(name, tmp_path):
    package("tokenizers"), package("sentencepiece")
    content, message = WRONG[name]
    for path in (tmp_path / "tokenizer.json", tmp_path / "tokenizer.model"):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises((FileError, FileNotFoundError)) as caught:
            load_tokenizer(path)
        assert message in str(caught.value) and str(caught.value).isprintable() and str(path) in str(caught.value)
        assert len(str(caught.value)) < 600


def test_wrong_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer.json and no tokenizer.model in this folder"):
        load_tokenizer(tmp_path)
    ByteTokenizer().save(tmp_path)
    for content, message in (
        ('{"bos_token": 3}', "`bos_token` must be a token's text"),
        ("[", "Expecting value"),
        ("x", "Expecting value"),
    ):
        (tmp_path / "tokenizer_config.json").write_text(content)
        with pytest.raises(FileError, match=message):
            load_tokenizer(tmp_path)
    package("tokenizers")
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "nowhere"}')
    with pytest.raises(FileError, match="the start of a document, 'nowhere', must be a token of its vocabulary"):
        load_tokenizer(tmp_path)


def test_ids_with_gaps_need_a_start_of_their_own(tmp_path):
    package("tokenizers")
    from tokenizers import Tokenizer as Model
    from tokenizers import models

    words = {"a": 0, "b": 1, "<begin>": 5}
    with pytest.raises(FileError, match="its ids have gaps, so none can be added; name one as `bos_token`"):
        from_json(Model(models.WordLevel(words, unk_token="b")), tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": {"content": "<begin>"}}')
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.start, tokenizer.vocab_size, tokenizer.output_size) == (5, 6, 5)
    assert tokenizer.encode("a").tolist() == [0]


def test_wrong_calls(tokenizer):
    for wrong in (None, 3, [1, 2], object()):
        with pytest.raises(TypeError, match="`text` must be bytes or str, got"):
            tokenizer.encode(wrong)
        with pytest.raises(TypeError, match="encode_pieces: `(pieces|text)` must be"):
            list(tokenizer.encode_pieces(wrong))
    with pytest.raises(TypeError, match="encode_pieces: `pieces` must be an iterable of bytes, got b'text'"):
        tokenizer.encode_pieces(b"text")
    for wrong in (-1, tokenizer.vocab_size, 2**70):
        with pytest.raises(ValueError, match=r"decode: `ids` must be in \[0, "):
            tokenizer.decode([wrong])
    for call, name in ((load_tokenizer, "load_tokenizer: `path`"), (tokenizer.save, "Tokenizer.save: `folder`")):
        with pytest.raises(TypeError, match=f"{name} must be a path, got 3"):
            call(3)
    with pytest.raises(TypeError, match="Tokenizer.from_file: `path` must be a path, got None"):
        Tokenizer.from_file(None)
    with pytest.raises(TypeError, match="decode: `ids` must be integers, got 2.5"):
        tokenizer.decode([2.5])
    for wrong in (0, 257, -5):
        with pytest.raises(ValueError, match="Tokenizer.train: `vocab_size` must be"):
            Tokenizer.train([SOURCE], vocab_size=wrong)
    with pytest.raises(TypeError, match="Tokenizer.train: `vocab_size` must be"):
        Tokenizer.train([SOURCE], vocab_size="many")


def mutated(content, rng):
    """The file with an edit somewhere: a value of its JSON, or some bytes."""
    if content.lstrip().startswith(b"{") and rng.random() < 0.6:
        fields = json.loads(content)
        places = [(fields, key) for key in fields]
        for node, key in places:
            child = node[key]
            if isinstance(child, (dict, list)) and len(places) < 400:
                keys = list(child) if isinstance(child, dict) else list(range(len(child)))
                places += [(child, k) for k in keys[:30]]
        node, key = rng.choice(places)
        node[key] = rng.choice(
            [None, True, -1, 2**31, 2**64, 1e308, "x", "", [], {}, [[]], "\ud800", "(a+)+$", [0, 10**9]]
        )
        return json.dumps(fields).encode()
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 3, 50])):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data[: rng.choice([len(data), rng.randrange(len(data))])])


@pytest.mark.parametrize("count", [60, pytest.param(1500, marks=pytest.mark.slow)])
def test_mutated_files_are_refused_or_encode(tmp_path, capfd, count):
    rng = random.Random(7)
    for name in ("spaced BPE", "its own start", "sentencepiece"):
        (tmp_path / name).mkdir()
        tokenizer = KINDS[name](tmp_path / name)
        path = next((tmp_path / name).glob("tokenizer.[jm]*"))
        content = path.read_bytes()
        for _ in range(count):
            path.write_bytes(mutated(content, rng))
            try:
                tokenizer = load_tokenizer(path)
                ids = tokenizer.encode(SOURCE[:200])
                tokenizer.decode(ids)
                assert (ids < tokenizer.vocab_size).all() and 0 <= tokenizer.start < tokenizer.vocab_size
            except FileError as error:
                assert str(error).startswith(str(path)) and str(error).isprintable() and len(str(error)) < 700
