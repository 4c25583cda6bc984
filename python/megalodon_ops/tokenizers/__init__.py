"""Tokenizers of bytes, of files of the `tokenizers` package and of sentencepiece models, with one interface.

A document is a sequence of ids. The id `start` precedes it, so that its first token is predicted, too; the id `end`,
which may be the same, is the target after its last token.

Text is cut into windows of at most `WINDOW` bytes, which are encoded one by one, so a document of any size takes memory
for one window. Cuts lie before a space between two ASCII words, where tokenizers begin a new word, too, so the ids are
those of the whole text. A text without such spaces is cut after a line or character; ids near this cut may differ.
"""

from .text import WINDOW
from .tokenizer import END_TOKENS, START_TOKEN, START_TOKENS, ByteTokenizer, Tokenizer, load_tokenizer
from ..storage.files import FileError

__all__ = [
    "END_TOKENS", "START_TOKEN", "START_TOKENS", "WINDOW", "ByteTokenizer", "FileError", "Tokenizer", "load_tokenizer",
]  # fmt: skip
