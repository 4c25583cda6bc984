"""Tokenizers of files: a JSON file of the `tokenizers` package, and a sentencepiece model."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy

from .base import ByteTokenizer, Tokenizer
from .files import START_TOKEN, START_TOKENS, decoder_kinds, is_byte_json, json_object, with_start
from .text import BYTE_CHARACTERS, WINDOW, bytes_of_characters, bytes_of_spaced, bytes_of_words
from ..errors import FileError
from ..extras import load
from ..model.files import file_size
from ..ops.values import shown

LARGEST_FILE = 256 << 20
"""Most bytes of a tokenizer's file"""
LARGEST_VOCABULARY = 1 << 24


def read_file(path: Path, start: str | None) -> Tokenizer:
    """The tokenizer in a file of either kind; `start` as in :meth:`Tokenizer.from_file`."""
    try:
        size = file_size(path)
    except ValueError as error:
        raise FileError(str(error)) from error
    if size > LARGEST_FILE:
        raise FileError(f"{path}: must have at most {LARGEST_FILE} bytes, got {size}")
    content = path.read_bytes()
    if content.lstrip()[:1] != b"{":
        return SentencePieceTokenizer(content, str(path), start)
    if is_byte_json(json_object(content, str(path))) and start in (None, START_TOKEN):
        return ByteTokenizer()
    return JSONTokenizer(content, str(path), start)


class VocabularyTokenizer(Tokenizer):
    """What tokenizers with a vocabulary of pieces of text do alike.

    A constructor reads the file and then calls :meth:`_learn_habits`.
    """

    _name: str
    """The file, for errors"""
    _table: list[bytes] | None
    """The bytes of every id; None where the package alone can tell them"""
    _bytes: list[int] | None
    """The id of every single byte, where the vocabulary has all 256"""
    _keeps_space: bool
    """Whether a text that goes on keeps the space it begins with: else the tokenizer puts one there"""
    _adds_space: bool
    """Whether the first id of a text begins with a space that the text does not have"""

    def _encode_texts(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text."""
        raise NotImplementedError

    def _learn_habits(self) -> None:
        whole, one, spaced, bare = self._encode_texts(["a b", "a", " b", "b"])
        self._keeps_space = whole == one + spaced or whole != one + bare
        table = self._table
        self._adds_space = table is not None and b"".join(table[number] for number in one).startswith(b" ")

    def _encode_windows(self, windows: list[tuple[bytes, bool]]) -> list[numpy.ndarray]:
        parts: list[list[str | list[int]]] = []
        for window, later in windows:
            text = window.decode(errors="surrogateescape" if self._bytes else "replace")
            if later and not self._keeps_space:
                text = text.removeprefix(" ")
            parts.append(self._valid_parts(text))
        texts = [part for part in chain.from_iterable(parts) if isinstance(part, str)]
        encoded = iter(self._encode_texts(texts) if texts else [])
        return [
            numpy.fromiter(chain.from_iterable(next(encoded) if isinstance(p, str) else p for p in part), numpy.int32)
            for part in parts
        ]

    def _valid_parts(self, text: str) -> list[str | list[int]]:
        """A text as parts that are UTF-8, and ids of the single bytes that are not and stand as surrogates."""
        if self._bytes is None or _ESCAPED.search(text) is None:
            return [text] if text else []
        first, *others = _ESCAPED.split(text)
        parts: list[str | list[int]] = [first]
        for escaped, valid in zip(others[::2], others[1::2], strict=True):
            single = escaped.encode(errors="surrogateescape")
            if not self._keeps_space:  # what follows gets a space, so it must be text that begins with one
                word, space, valid = valid.partition(" ")
                single += word.encode() if valid else (word + space).encode()
            parts += [[self._bytes[byte] for byte in single], valid]
        return [part for part in parts if part]

    def _texts_from_table(self, ids: Iterable[int], after: Sequence[int]) -> Iterator[bytes]:
        assert self._table is not None
        first = self._adds_space and all(number == self.start for number in after)
        for value in ids:
            text = self._table[self._check_id(value)]
            yield text.removeprefix(b" ") if first else text
            first = first and not text


_ESCAPED = re.compile("([\udc80-\udcff]+)")


class JSONTokenizer(VocabularyTokenizer):
    """A JSON file of the `tokenizers` package.

    An id's bytes come from a table where the decoder maps each token to its bytes: of byte-level vocabularies, and of
    those with U+2581 for a space and, maybe, tokens of single bytes. Others go through the package.
    """

    def __init__(self, content: bytes, name: str, start: str | None):
        load("tokenizers", "train")
        self._name = name
        fields = json_object(content, name)
        self._model = self._read(content)
        vocabulary = self._vocabulary()
        if start is not None and start not in vocabulary:
            raise FileError(f"{name}: the start of a document, {shown(start)}, must be a token of its vocabulary")
        start = start or next((token for token in START_TOKENS if token in vocabulary), None)
        if start is None:
            last = max(vocabulary.values(), default=-1) + 1
            start, content = START_TOKEN, with_start(fields, last)
            fields, self._model = json_object(content, name), self._read(content)
            vocabulary = self._vocabulary()
            if vocabulary.get(start) != last:
                raise FileError(
                    f"{name}: has no token that opens a document, and its ids have gaps, so none can be added; name one as "
                    "`bos_token` in a tokenizer_config.json beside it"
                )
        self.content, self.start_token = content, start
        self.start = vocabulary[start]
        self.vocab_size = max(vocabulary.values()) + 1
        self.fingerprint = hashlib.sha256(content + b"\n%d" % self.start).hexdigest()
        self._kinds = decoder_kinds(fields)
        self._table = self._bytes_of_tokens(vocabulary, {token["id"] for token in fields.get("added_tokens") or ()})
        self._bytes = self._single_bytes(vocabulary)
        self._learn_habits()

    def _read(self, content: bytes) -> Any:
        from tokenizers import Tokenizer as Model

        with faults(self._name):
            model = Model.from_str(content.decode())
            model.no_truncation()
            model.no_padding()
            model.encode_special_tokens = True
        return model

    def _vocabulary(self) -> dict[str, int]:
        with faults(self._name):
            vocabulary = self._model.get_vocab(with_added_tokens=True)
        if (largest := max(vocabulary.values(), default=-1)) >= LARGEST_VOCABULARY:
            raise FileError(f"{self._name}: ids must be below {LARGEST_VOCABULARY}, got {largest}")
        return vocabulary

    def _bytes_of_tokens(self, vocabulary: dict[str, int], added: set[int]) -> list[bytes] | None:
        if "ByteLevel" in self._kinds:
            to_bytes = bytes_of_characters
        elif self._kinds and self._kinds <= {"Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}:
            to_bytes = bytes_of_spaced if "ByteFallback" in self._kinds else bytes_of_words
        else:
            return None
        table = [b""] * self.vocab_size
        for token, number in vocabulary.items():
            table[number] = token.encode(errors="replace") if number in added else to_bytes(token)
        table[self.start] = b""
        return table

    def _single_bytes(self, vocabulary: dict[str, int]) -> list[int] | None:
        if "ByteLevel" in self._kinds:
            tokens = BYTE_CHARACTERS
        elif "ByteFallback" in self._kinds:
            tokens = [f"<0x{byte:02X}>" for byte in range(256)]
        else:
            return None
        return [vocabulary[token] for token in tokens] if all(token in vocabulary for token in tokens) else None

    def _encode_texts(self, texts: list[str]) -> list[list[int]]:
        with faults(self._name):
            encode = getattr(self._model, "encode_batch_fast", self._model.encode_batch)
            return [encoding.ids for encoding in encode(texts, add_special_tokens=False)]

    def text_of(self, ids: Iterable[int], *, after: Sequence[int] = ()) -> Iterator[bytes]:
        return self._texts_by_package(ids, after) if self._table is None else self._texts_from_table(ids, after)

    def _texts_by_package(self, ids: Iterable[int], after: Sequence[int]) -> Iterator[bytes]:
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=False)
        for place, value in enumerate(chain(after[-WINDOW:], ids), -len(after[-WINDOW:])):
            number, text = self._check_id(value), ""
            with faults(self._name):
                if number != self.start:
                    text = stream.step(self._model, number) or ""
            if place >= 0:
                yield text.encode(errors="replace")


class SentencePieceTokenizer(VocabularyTokenizer):
    """A sentencepiece model."""

    file_name = "tokenizer.model"

    def __init__(self, content: bytes, name: str, start: str | None):
        self._name, self.content = name, content
        self._model = load("sentencepiece", "train").SentencePieceProcessor()
        try:
            is_model = bool(content) and self._model.LoadFromSerializedProto(content)
        except (RuntimeError, ValueError):
            is_model = False
        if not is_model:
            raise FileError(f"{name}: neither a JSON file of the `tokenizers` package nor a sentencepiece model")
        with faults(name):
            size, own = self._model.GetPieceSize(), self._model.bos_id()
        if not 0 < size < LARGEST_VOCABULARY:
            raise FileError(f"{name}: must have from 1 to {LARGEST_VOCABULARY - 1} pieces, got {size}")
        with faults(name):
            if start is not None:
                own = self._model.PieceToId(start)
                if self._model.IdToPiece(own) != start:
                    own = -1
                if own < 0 and start != START_TOKEN:
                    raise ValueError(f"the start of a document, {shown(start)}, must be a piece of its vocabulary")
            pieces = [self._model.IdToPiece(number) for number in range(size)]
            self._table = [self._bytes_of(number, piece) for number, piece in enumerate(pieces)]
            of_byte = {piece: number for number, piece in enumerate(pieces) if self._model.IsByte(number)}
        self.start = own if 0 <= own < size else size
        self.vocab_size = max(size, self.start + 1)
        self.fingerprint = hashlib.sha256(content + b"\n%d" % self.start).hexdigest()
        self.start_token = pieces[self.start] if self.start < size else START_TOKEN
        self._table += [b""] * (self.vocab_size - size)
        names = [f"<0x{byte:02X}>" for byte in range(256)]
        self._bytes = [of_byte[token] for token in names] if all(token in of_byte for token in names) else None
        self._learn_habits()

    def _bytes_of(self, number: int, piece: str) -> bytes:
        if self._model.IsByte(number):
            return bytes_of_spaced(piece)
        if self._model.IsControl(number) or self._model.IsUnused(number):
            return b""
        return "\ufffd".encode() if self._model.IsUnknown(number) else bytes_of_words(piece)

    def _encode_texts(self, texts: list[str]) -> list[list[int]]:
        with faults(self._name):
            return self._model.Encode(texts)

    def text_of(self, ids: Iterable[int], *, after: Sequence[int] = ()) -> Iterator[bytes]:
        return self._texts_from_table(ids, after)


@contextmanager
def faults(name: str) -> Iterator[None]:
    """Inside the block, whatever a package finds wrong is a FileError of one line; so is a panic of Rust's."""
    try:
        yield
    except (FileError, MemoryError):
        raise
    except BaseException as error:
        if not (isinstance(error, Exception) or type(error).__name__ == "PanicException"):
            raise
        said = "".join(letter if letter.isprintable() else " " for letter in str(error)[:300])
        raise FileError(f"{name}: {' '.join(said.split())}") from error
