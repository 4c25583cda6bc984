"""Tokenizers: bytes, files of the `tokenizers` package, and sentencepiece models, all with one face.

A document is a sequence of ids; the id `start` opens it, so that its first token is predicted too. Bits per byte, nats /
ln 2 / bytes of text, compare models whatever their tokenizers are.

Text is cut into pieces of at most `WINDOW` bytes, each of which is encoded alone: a document of any size takes memory for
one piece, and its ids depend on its bytes alone. Cuts are made before a space between two ASCII words, where tokenizers
begin a new word too, so that the ids are those of the whole text; a text without such places is cut where a line or a
letter ends, and its ids may then differ around the cut.
"""

from __future__ import annotations

from pathlib import Path

from .base import ByteTokenizer, Tokenizer
from .files import START_TOKEN, START_TOKENS, configured_start
from .text import WINDOW
from .vocabularies import read_file
from ..errors import FileError
from ..model.checkpoint import as_path

__all__ = ["START_TOKEN", "START_TOKENS", "WINDOW", "ByteTokenizer", "FileError", "Tokenizer", "load_tokenizer"]


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint's folder, its `tokenizer.json` or `tokenizer.model`, or of one such file.

    A `tokenizer_config.json` beside it, if there is one, names the token that opens a document.

    Raises FileError where a file is damaged, FileNotFoundError where there is none.
    """
    path = as_path("load_tokenizer", "path", path)
    if not path.is_dir():
        return read_file(path, None)
    for name in ("tokenizer.json", "tokenizer.model"):
        if (path / name).exists():
            return read_file(path / name, configured_start(path / "tokenizer_config.json"))
    fix = "; that of a run is in each folder of its checkpoints" if (path / "checkpoints").is_dir() else ""
    raise FileNotFoundError(f"{path}: no tokenizer.json and no tokenizer.model in this folder{fix}")
