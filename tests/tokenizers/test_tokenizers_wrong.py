"""Files that are no tokenizer, damaged and mutated files, and wrong calls."""

import json

import pytest
from mutations import mutants
from tokenizer_kinds import tokenizer  # noqa: F401, a fixture
from tokenizer_kinds import KINDS, SOURCE, word_level_model, package

from megalodon_ops.storage.files import FileError
from megalodon_ops.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer


WRONG = {
    "missing": (None, "no such file"),
    "empty": (b"", "neither a JSON file of the `tokenizers` package nor a sentencepiece model"),
    "noise": (b"\xff\x00noise" * 9, ""),
    "no JSON": (b'{"model": ', "EOF while parsing"),
    "deep": (b'{"a":' * 100_000, "expected `,` or `}`"),
    "another JSON": (b'{"num_layers": 3}', ""),
    "no list": (b'{"added_tokens": [1]}', ""),
    "model": (b'{"version": "1.0", "model": {"type": "None"}}', ""),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_files_are_refused_in_one_line(name, tmp_path):
    package("tokenizers")
    package("sentencepiece")
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
        ('{"eos_token": [3]}', "`eos_token` must be a token's text"),
        ("[", "Expecting value"),
        ("x", "Expecting value"),
    ):
        (tmp_path / "tokenizer_config.json").write_text(content)
        with pytest.raises(FileError, match=message):
            load_tokenizer(tmp_path)
    package("tokenizers")
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "nowhere"}')
    with pytest.raises(FileError, match="the start token 'nowhere' must be in the vocabulary"):
        load_tokenizer(tmp_path)


def test_wrong_calls(tokenizer):
    for wrong in (None, 3, [1, 2], object()):
        with pytest.raises(TypeError, match="encode: `text` must hold bytes or str, got"):
            tokenizer.encode(wrong)
        with pytest.raises(TypeError, match="encode_pieces: `pieces` must"):
            list(tokenizer.encode_pieces(wrong))
    for wrong in ("abc", b"abc", bytearray(b"abc")):
        for name, call in (
            ("encode_batch: `documents`", tokenizer.encode_batch),
            ("encode_pieces: `pieces`", lambda texts: list(tokenizer.encode_pieces(texts))),
            ("Tokenizer.train: `documents`", lambda texts: Tokenizer.train(texts, vocab_size=300)),
        ):
            with pytest.raises(TypeError, match=f"{name} must be a list of texts, got .*; put it in a list"):
                call(wrong)
    for wrong in ([b"text"], ["text"], [[3]], [3], b"text"):
        with pytest.raises(TypeError, match="encode_stream: `documents` must"):
            list(tokenizer.encode_stream(wrong))
    for wrong in (-1, tokenizer.vocab_size, 2**70):
        with pytest.raises(ValueError, match=r"decode: `ids` must be in \[0, "):
            tokenizer.decode([wrong])
    for call, name in ((load_tokenizer, "load_tokenizer: `path`"), (tokenizer.save, "Tokenizer.save: `folder`")):
        with pytest.raises(TypeError, match=f"{name} must be a path, got 3"):
            call(3)
    with pytest.raises(TypeError, match="Tokenizer.from_file: `path` must be a path, got None"):
        Tokenizer.from_file(None)
    with pytest.raises(TypeError, match="decode: `ids` must be a row of integers, got 2.5"):
        tokenizer.decode([2.5])
    for wrong in (0, 257, -5):
        with pytest.raises(ValueError, match="Tokenizer.train: `vocab_size` must be"):
            Tokenizer.train([SOURCE], vocab_size=wrong)
    with pytest.raises(TypeError, match="Tokenizer.train: `vocab_size` must be"):
        Tokenizer.train([SOURCE], vocab_size="many")


WRONG_IDS = {
    "of the model": lambda fields: fields["model"]["vocab"].update(b=0),
    "added": lambda fields: fields["added_tokens"].append({**fields["added_tokens"][0], "content": "<t>"}),
    "added over the model's": lambda fields: fields["added_tokens"][0].update(id=1),
    "large": lambda fields: fields["model"]["vocab"].update(b=2**31),
}


@pytest.mark.parametrize("case", WRONG_IDS)
def test_duplicate_and_large_ids_are_refused(tmp_path, case):
    """The package accepts a file with the same id twice and loses one token."""
    package("tokenizers")
    model = word_level_model({"a": 0, "b": 1})
    model.add_special_tokens(["<s>"])
    fields = json.loads(model.to_str())
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(fields))
    assert load_tokenizer(path).vocab_size == 3
    WRONG_IDS[case](fields)
    path.write_text(json.dumps(fields))
    twice, large = r"two tokens have the id \d, '.*' and '.*'", r"ids must be below 2\^31, got 2147483648"
    with pytest.raises(FileError, match=f"^{path}: {large if case == 'large' else twice}$"):
        load_tokenizer(path)


def test_unknown_decoders_are_refused(tmp_path):
    """WordPiece's decoder, for one, puts spaces between tokens."""
    package("tokenizers")
    from tokenizers import decoders

    for decoder, name in ((decoders.WordPiece(), "'WordPiece'"), (None, "'none'")):
        path = tmp_path / "tokenizer.json"
        model = word_level_model({"a": 0, "b": 1})
        model.decoder = decoder
        model.save(str(path))
        with pytest.raises(FileError, match=f"^{path}: its decoder must be ByteLevel, or .*got {name}$"):
            load_tokenizer(tmp_path)


@pytest.mark.parametrize("count", [60, pytest.param(1500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["spaced BPE", "its own start", "sentencepiece"])
def test_mutated_files_are_refused_or_encode(tmp_path, capfd, kind, count):
    KINDS[kind](tmp_path).save(tmp_path / "saved")
    for folder, mutation in mutants(tmp_path / "saved", tmp_path, count, seed=7):
        try:
            tokenizer = load_tokenizer(folder)
            ids = tokenizer.encode(SOURCE[:200])
            tokenizer.decode(ids)
            assert (ids < tokenizer.vocab_size).all() and 0 <= tokenizer.start < tokenizer.vocab_size, mutation
        except (FileError, FileNotFoundError) as error:
            message = str(error)
            assert message.startswith(str(folder)) and message.isprintable() and len(message) < 700, mutation
