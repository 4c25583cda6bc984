"""Tokenizers of every kind, small ones, that tests share."""

import argparse
import json
from pathlib import Path

import pytest

from megalodon_ops.tokenizers import ByteTokenizer, Tokenizer

SOURCE = Path(argparse.__file__).read_bytes()


def package(name):
    return pytest.importorskip(name)


def from_json(model, folder, **options):
    path = folder / "tokenizer.json"
    model.save(str(path))
    return Tokenizer.from_file(path, **options)


def word_level_model(ids):
    """A model whose only tokens are these words; it has no rule that splits a text into words."""
    from tokenizers import Tokenizer as Model
    from tokenizers import decoders, models

    model = Model(models.WordLevel(ids, unk_token=next(iter(ids))))
    model.decoder = decoders.ByteLevel()
    return model


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
    content["pre_tokenizer"] = None  # as in such vocabularies: their merges, learned inside words, cross no space
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


def other(folder):
    path = folder / "other.json"
    path.write_text((folder / "tokenizer.json").read_text().replace("<|startoftext|>", "<|begin|>"))
    return path
