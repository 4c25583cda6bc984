"""What all tokenizers do alike, and the tokenizer of bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from operator import index
from pathlib import Path
from typing import ClassVar

import numpy

from .files import START_TOKEN, byte_json, write_files
from .text import BYTE_CHARACTERS, as_bytes, as_pieces, windows_of
from ..extras import load
from ..model.checkpoint import as_path
from ..ops.values import check_size, described, shown

_BATCH, _BATCH_BYTES = 64, 1 << 20
"""Windows, and bytes of them, that are encoded side by side; the packages take a hundred bytes for a token meanwhile"""


class Tokenizer:
    """Text to ids and back; made by :meth:`from_file`, :meth:`train` or :func:`load_tokenizer`.

    Text that looks like a special token is text. Bytes that are no UTF-8 become the vocabulary's tokens of single bytes
    where it has all 256, else U+FFFD.

    Example:
        >>> from megalodon_ops.tokenizers import Tokenizer
        >>> tokenizer = Tokenizer.train([b"to be or not to be, that is the question " * 9], vocab_size=270)
        >>> ids = tokenizer.encode("to be")
        >>> len(ids) < 5, tokenizer.decode(ids), tokenizer.vocab_size, tokenizer.start, tokenizer.output_size
        (True, b'to be', 270, 269, 269)
    """

    vocab_size: int
    """Ids are from 0 to below it; `start` is one of them"""
    start: int
    """The id that opens a document; `encode` leaves it out"""
    fingerprint: str
    """sha256 of all that decides the ids"""
    byte_level: ClassVar[bool] = False
    """Whether each id is one byte"""
    content: bytes
    """The content of its file"""
    file_name: ClassVar[str] = "tokenizer.json"
    """What its file is called in a checkpoint's folder"""
    start_token: str
    """The text of `start`"""

    @property
    def output_size(self) -> int:
        """How many ids a model predicts: all but `start` where that is the last, as nothing is ever followed by it."""
        return self.vocab_size - (self.start == self.vocab_size - 1)

    @staticmethod
    def from_file(path: str | Path, *, start: str | None = None) -> Tokenizer:
        """The tokenizer in a JSON file of the `tokenizers` package or in a sentencepiece model.

        start: the text of the token that opens a document. None: the first of `START_TOKENS` that the vocabulary has
        (for a sentencepiece model, its own), else `START_TOKEN`, added as the last id.

        Raises FileError where the file holds no tokenizer, FileNotFoundError, and ImportError where the package that
        reads it is missing.
        """
        from .vocabularies import read_file

        return read_file(as_path("Tokenizer.from_file", "path", path), start)

    @staticmethod
    def train(documents: Iterable[bytes | str], *, vocab_size: int) -> Tokenizer:
        """A byte-level BPE learned from documents, of at most `vocab_size` ids: 256 bytes, merges, `START_TOKEN`."""
        vocab_size = check_size("Tokenizer.train", "vocab_size", vocab_size)
        if vocab_size <= 257:
            raise ValueError(
                "Tokenizer.train: `vocab_size` must be above 257, which 256 bytes and the start of a document take, "
                f"got {vocab_size}."
            )
        if isinstance(documents, (bytes, str)):
            raise TypeError(
                f"Tokenizer.train: `documents` must be a list of texts, got {described(documents)}; put it in a list."
            )
        load("tokenizers", "train")
        from tokenizers import Tokenizer as Model
        from tokenizers import decoders, models, pre_tokenizers, trainers

        from .vocabularies import JSONTokenizer

        model = Model(models.BPE())
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = decoders.ByteLevel()
        alphabet = [BYTE_CHARACTERS[byte] for byte in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
        windows = (window for document in documents for window in windows_of([as_bytes("Tokenizer.train", document)]))
        model.train_from_iterator((window.decode(errors="replace") for window in windows), trainer)
        return JSONTokenizer(model.to_str().encode(), "Tokenizer.train", None)

    def encode(self, text: bytes | str) -> numpy.ndarray:
        """The ids of a text, int32, without `start`."""
        return self.encode_batch([text])[0]

    def encode_batch(self, documents: Iterable[bytes | str]) -> list[numpy.ndarray]:
        """The ids of each document, int32; documents are encoded side by side on all cores."""
        found: list[numpy.ndarray] = []
        parts: list[numpy.ndarray] = []
        for ids, _, is_last in self.encode_stream([as_bytes("encode_batch", document)] for document in documents):
            parts.append(ids)
            if is_last:
                found.append(ids if len(parts) == 1 else numpy.concatenate(parts))
                parts = []
        return found

    def encode_stream(self, documents: Iterable[Iterable[bytes]]) -> Iterator[tuple[numpy.ndarray, int, bool]]:
        """The ids of documents that each come in pieces, window by window, in memory that none of them makes larger.

        For each window of text: its ids, int32, how many bytes it has, and whether it is the last of its document. Windows
        are encoded side by side on all cores.

        Example:
            >>> from megalodon_ops.tokenizers import ByteTokenizer
            >>> documents = [[b"to ", b"be"], [b"or not"]]
            >>> [(bytes(ids.tolist()), size, is_last) for ids, size, is_last in ByteTokenizer().encode_stream(documents)]
            [(b'to be', 5, True), (b'or not', 6, True)]
        """
        if not isinstance(documents, Iterable):
            raise TypeError(
                f"encode_stream: `documents` must be an iterable of texts in pieces, got {described(documents)}."
            )
        windows: list[tuple[bytes, bool, bool]] = []  # text, whether it goes on with a document, whether it ends one

        def encoded() -> Iterator[tuple[numpy.ndarray, int, bool]]:
            ids = self._encode_windows([(text, later) for text, later, _ in windows])
            for found, (text, _, is_last) in zip(ids, windows, strict=True):
                yield found, len(text), is_last
            windows.clear()

        def is_full() -> bool:
            return len(windows) >= _BATCH or sum(len(text) for text, _, _ in windows) >= _BATCH_BYTES

        for pieces in documents:
            before, later = b"", False
            for window in windows_of(as_pieces(pieces, "encode_stream", "documents")):
                if before:
                    windows.append((before, later, False))
                    later = True
                    if is_full():
                        yield from encoded()
                before = window
            windows.append((before, later, True))
            if is_full():
                yield from encoded()
        yield from encoded()

    def encode_pieces(self, pieces: Iterable[bytes]) -> Iterator[numpy.ndarray]:
        """The ids of one document that comes in pieces of any sizes, in arrays; laid end to end, they are :meth:`encode`'s.

        Memory is taken for one piece and one window, however long the document is.
        """
        windows = enumerate(windows_of(as_pieces(pieces)))
        return (self._encode_windows([(window, number > 0)])[0] for number, window in windows)

    def decode(self, ids: Iterable[int]) -> bytes:
        """The text of a document's ids; `start` has none."""
        return b"".join(self.text_of(ids))

    def text_of(self, ids: Iterable[int], *, after: Sequence[int] = ()) -> Iterator[bytes]:
        """The bytes that each id adds to a text, one by one; `after`: the ids before the first, in the document.

        A token may hold a part of a letter: UTF-8 is complete at the end of the text, not of every token.
        """
        raise NotImplementedError

    def save(self, folder: str | Path) -> None:
        """Writes the tokenizer into a folder, which is made if there is none, where :func:`load_tokenizer` finds it."""
        write_files(as_path("Tokenizer.save", "folder", folder), self.file_name, self.content, self.start_token)

    def _encode_windows(self, windows: list[tuple[bytes, bool]]) -> list[numpy.ndarray]:
        """The ids of each window, int32; the flag says that the window goes on with a text."""
        raise NotImplementedError

    def _check_id(self, value: int) -> int:
        try:
            number = index(value)
        except TypeError as error:
            raise TypeError(f"decode: `ids` must be integers, got {described(value)}.") from error
        if not 0 <= number < self.vocab_size:
            raise ValueError(f"decode: `ids` must be in [0, {self.vocab_size}), got {shown(number)}.")
        return number


class ByteTokenizer(Tokenizer):
    """Ids 0 to 255 are bytes, 256 opens a document.

    Example:
        >>> from megalodon_ops.tokenizers import ByteTokenizer
        >>> tokenizer = ByteTokenizer()
        >>> tokenizer.encode("caf\\u00e9").tolist(), tokenizer.start, tokenizer.vocab_size, tokenizer.output_size
        ([99, 97, 102, 195, 169], 256, 257, 256)
        >>> tokenizer.decode([256, 99, 97, 102, 195, 169])
        b'caf\\xc3\\xa9'
    """

    vocab_size = 257
    start = 256
    fingerprint = hashlib.sha256(b"bytes, and 256 opens a document").hexdigest()
    byte_level = True
    content = byte_json()
    start_token = START_TOKEN

    def encode_pieces(self, pieces: Iterable[bytes]) -> Iterator[numpy.ndarray]:
        return (numpy.frombuffer(piece, numpy.uint8).astype(numpy.int32) for piece in as_pieces(pieces) if piece)

    def _encode_windows(self, windows: list[tuple[bytes, bool]]) -> list[numpy.ndarray]:
        return [numpy.frombuffer(text, numpy.uint8).astype(numpy.int32) for text, _ in windows]

    def text_of(self, ids: Iterable[int], *, after: Sequence[int] = ()) -> Iterator[bytes]:
        for value in ids:
            number = self._check_id(value)
            yield b"" if number == self.start else bytes([number])
