"""Tokenizers: bytes, files of the `tokenizers` package, and sentencepiece models, all with one face.

A document is a sequence of ids; the id `start` opens it, so that its first token is predicted too, and the id `end`,
which may be the same, is what a model predicts after its last token. Bits per byte, nats / ln 2 / bytes of text, compare
models whatever their tokenizers are.

Text is cut into pieces of at most `WINDOW` bytes, each of which is encoded alone: a document of any size takes memory for
one piece, and its ids depend on its bytes alone. Cuts are made before a space between two ASCII words, where tokenizers
begin a new word too, so that the ids are those of the whole text; a text without such places is cut where a line or a
letter ends, and its ids may then differ around the cut.
"""

from .text import WINDOW
from .tokenizer import END_TOKENS, START_TOKEN, START_TOKENS, ByteTokenizer, Tokenizer, load_tokenizer
from ..files import FileError

__all__ = [
    "END_TOKENS", "START_TOKEN", "START_TOKENS", "WINDOW", "ByteTokenizer", "FileError", "Tokenizer", "load_tokenizer",
]  # fmt: skip
