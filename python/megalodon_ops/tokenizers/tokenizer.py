"""Tokenizers: bytes, JSON files of the `tokenizers` package, sentencepiece models."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from operator import index
from pathlib import Path
from typing import Any

import numpy

from .text import Window, as_texts, windows_of
from ..storage.files import FileError, as_path, drafting, opened, read_json, reading, write_atomically
from ..extras import load
from ..ops.common.checks import check_integer, describe, short_text

START_TOKEN = "<|startoftext|>"
"""Start token of the byte tokenizer; added to other tokenizers that have no start token"""
START_TOKENS = ("<s>", "<bos>", "[BOS]", "<|begin_of_text|>", START_TOKEN, "<|endoftext|>")
"""Common names of the token before a document; the first one in the vocabulary is used"""
END_TOKENS = ("</s>", "<eos>", "[EOS]", "<|end_of_text|>", "<|endoftext|>")
"""Common names of the token after a document; if there is none, `start` serves as both"""

_BYTES_JSON = Path(__file__).with_name("bytes.json").read_bytes()  # the byte tokenizer in the package's format
_CHARACTERS = {letter: bytes([byte]) for letter, byte in json.loads(_BYTES_JSON)["model"]["vocab"].items()}
_BYTE_TOKENS = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}
_BYTE_LEVEL = {"ByteLevel"}  # kinds of decoders, as _SPACED
_SPACED = {"Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}
_BATCH = 8  # windows encoded in parallel; few, because the packages take a hundred bytes of memory per token


class Tokenizer:
    """Conversion of text to ids and back; created by :meth:`from_file`, :meth:`train` or :func:`load_tokenizer`.

    Text that looks like a special token is encoded as text. Invalid UTF-8 becomes U+FFFD, but not in ByteTokenizer.

    Example:
        >>> from megalodon_ops.tokenizers import Tokenizer
        >>> tokenizer = Tokenizer.train([b"to be or not to be, that is the question " * 9], vocab_size=270)
        >>> ids = tokenizer.encode("to be")
        >>> len(ids) < 5, tokenizer.decode(ids), tokenizer.vocab_size, tokenizer.start, tokenizer.end
        (True, b'to be', 270, 269, 269)
    """

    vocab_size: int
    """Ids are in [0, vocab_size), `start` and `end` included"""
    start: int
    """The id before a document; `encode` omits it"""
    end: int
    """The id after a document, possibly `start`; `encode` omits it"""
    start_token: str
    """The text of `start`"""
    end_token: str
    """The text of `end`"""
    fingerprint: str
    """sha256 of everything that determines the ids"""
    content: bytes
    """Content of the tokenizer's file"""
    file_name = "tokenizer.json"
    """Name of the file in a checkpoint's folder"""
    byte_level = False
    """True if each id is one byte"""

    @staticmethod
    def from_file(path: str | Path, *, start: str | None = None, end: str | None = None) -> Tokenizer:
        """Load a JSON file of the `tokenizers` package or a sentencepiece model.

        Args:
            start: text of the token before a document. None: a sentencepiece model's own, or the first of
                `START_TOKENS` in a JSON file's vocabulary. If there is none, `START_TOKEN` is added as the last id.
            end: text of the token after a document. None: a sentencepiece model's own, or the first of `END_TOKENS` in
                a JSON file's vocabulary. If there is none, `start`.

        Raises:
            FileError: the file holds no tokenizer. FileNotFoundError: no file. ImportError: its package is missing.
        """
        path = as_path("Tokenizer.from_file", "path", path)
        with opened(path) as file:
            content = file.read()
        if content.lstrip()[:1] != b"{":
            return SentencePieceTokenizer(content, str(path), start, end)
        if {start, end} <= {None, START_TOKEN} and _is_byte_tokenizer(content):
            return ByteTokenizer()
        return JSONTokenizer(content, str(path), start, end)

    @staticmethod
    def train(documents: Iterable[bytes | str], *, vocab_size: int) -> Tokenizer:
        """Train a byte-level BPE of at most `vocab_size` ids: 256 bytes, merges, `START_TOKEN`."""
        expected = "an integer above 257, for 256 bytes, the start token and at least one merge"
        vocab_size = check_integer("Tokenizer.train", "vocab_size", vocab_size, expected, 258)
        documents = as_texts("Tokenizer.train", "documents", documents)
        load("tokenizers", "train")
        from tokenizers import Tokenizer as Model
        from tokenizers import decoders, models, pre_tokenizers, trainers

        model = Model(models.BPE())
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=[*_CHARACTERS], show_progress=False)
        windows = (window.text for document in documents for window in windows_of([document]))
        model.train_from_iterator((text.decode(errors="replace") for text in windows), trainer)
        return JSONTokenizer(model.to_str().encode(), "Tokenizer.train")

    def encode(self, text: bytes | str) -> numpy.ndarray:
        """Return the ids of a text, int32, without `start` and `end`."""
        return self.encode_batch(as_texts("encode", "text", [text]))[0]

    def encode_batch(self, documents: Iterable[bytes | str]) -> list[numpy.ndarray]:
        """Return the ids of each document, int32; all cores encode in parallel."""
        documents = as_texts("encode_batch", "documents", documents)
        encoded: list[list[numpy.ndarray]] = [[]]
        for ids, _, is_last in self.encode_stream([document] for document in documents):
            encoded[-1].append(ids)
            if is_last:
                encoded.append([])
        return [numpy.concatenate(parts) for parts in encoded[:-1]]

    def encode_stream(self, documents: Iterable[Iterable[bytes]]) -> Iterator[tuple[numpy.ndarray, int, bool]]:
        """Encode documents, each given as pieces of text, in constant memory.

        Yields for each window of text: its ids, int32; its number of bytes; True if it is the last window of its
        document. All cores encode in parallel.
        """
        documents = (as_texts("encode_stream", "documents", pieces) for pieces in documents)
        windows = chain.from_iterable(map(windows_of, documents))
        while batch := list(islice(windows, _BATCH)):
            for window, ids in zip(batch, self._encode_windows(batch), strict=True):
                yield ids, len(window.text), window.is_last

    def encode_pieces(self, pieces: Iterable[bytes]) -> Iterator[numpy.ndarray]:
        """Yield the ids of one document, given in pieces of any sizes; together, they equal those of :meth:`encode`.

        The memory needed is that of one piece and one window.
        """
        windows = windows_of(as_texts("encode_pieces", "pieces", pieces))
        return (self._encode_windows([window])[0] for window in windows)

    def decode(self, ids: Iterable[int]) -> bytes:
        """Return the text of a document's ids; `start` and `end` have no text."""
        return b"".join(self.text_of(ids))

    def text_of(self, ids: Iterable[int], *, after: Sequence[int] = ()) -> Iterator[bytes]:
        """Yield the bytes of each id; `after` has earlier ids of the same document.

        A token may end inside a character, so UTF-8 is complete at the end of the text only.
        """
        is_first = self._adds_space and all(number == self.start for number in after)
        for value in ids:
            try:
                number = index(value)
            except TypeError:
                raise TypeError(f"decode: `ids` must be a row of integers, got {describe(value)} among them.") from None
            if not 0 <= number < self.vocab_size:
                raise ValueError(f"decode: `ids` must be in [0, {self.vocab_size}), got {short_text(number)}.")
            text = self._table.get(number, b"")  # unused ids have no text
            yield text.removeprefix(b" ") if is_first else text
            is_first = is_first and not text

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer into a folder, for :func:`load_tokenizer`; the folder is created if missing.

        Raises OSError if a file cannot be written; the folder is then unchanged.
        """
        folder = as_path("Tokenizer.save", "folder", folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = dict(bos_token=self.start_token, eos_token=self.end_token, clean_up_tokenization_spaces=False)
        # Pad with `start`: transformers leaves padding out of the loss. `start` is a target only if it is also `end`.
        if self.file_name == "tokenizer.json":
            fast = "PreTrainedTokenizerFast"
            config |= dict(tokenizer_class=fast, pad_token=self.start_token, padding_side="left")
        paths = (folder / self.file_name, folder / "tokenizer_config.json")
        with drafting(folder / "tokenizer", "both"):  # one process at a time
            with write_atomically(paths[0]) as own, write_atomically(paths[1]) as settings:
                own.write_bytes(self.content)
                settings.write_text(json.dumps(config, indent=1) + "\n")

    def _encode(self, texts: list[str]) -> list[list[int]]:
        """Encode texts with the package that has read the file."""
        raise NotImplementedError

    def _set_vocabulary(self, ids: dict[str, int], table: dict[int, bytes]) -> None:
        """Store the ids of all tokens and their bytes; find out if the package puts a space before a text."""
        self.start, self.end, self.vocab_size = ids[self.start_token], ids[self.end_token], max(ids.values()) + 1
        self.fingerprint = hashlib.sha256(self.content + b"\n%d" % self.start).hexdigest()
        self._table = {**table, self.start: b"", self.end: b""}
        self._adds_space = b"".join(self._table[number] for number in self._encode(["a"])[0]).startswith(b" ")

    def _encode_windows(self, windows: list[Window]) -> list[numpy.ndarray]:
        """Return the ids of each window, int32."""
        texts = [window.text.decode(errors="replace") for window in windows]
        if self._adds_space:  # the package adds the space at the start of a window
            texts = [text if own.is_first else text.removeprefix(" ") for text, own in zip(texts, windows, strict=True)]
        return [numpy.array(ids, numpy.int32) for ids in self._encode(texts)]


class ByteTokenizer(Tokenizer):
    """Ids 0 to 255 are bytes; 256 is both `start` and `end`.

    Example:
        >>> from megalodon_ops.tokenizers import ByteTokenizer
        >>> tokenizer = ByteTokenizer()
        >>> tokenizer.encode("caf\\u00e9").tolist(), tokenizer.start, tokenizer.end, tokenizer.vocab_size
        ([99, 97, 102, 195, 169], 256, 256, 257)
        >>> tokenizer.decode([256, 99, 97, 102, 195, 169])
        b'caf\\xc3\\xa9'
    """

    vocab_size, start, end = 257, 256, 256
    start_token = end_token = START_TOKEN
    fingerprint = hashlib.sha256(b"bytes, and 256 opens a document").hexdigest()
    content = _BYTES_JSON
    byte_level = True
    _adds_space = False
    _table = {byte: bytes([byte]) for byte in range(256)}

    def _encode_windows(self, windows: list[Window]) -> list[numpy.ndarray]:
        return [numpy.frombuffer(window.text, numpy.uint8).astype(numpy.int32) for window in windows]


class JSONTokenizer(Tokenizer):
    """A tokenizer from a JSON file of the `tokenizers` package; byte-level, or with U+2581 for a space."""

    def __init__(self, content: bytes, path: str, start: str | None = None, end: str | None = None):
        load("tokenizers", "train")
        from tokenizers import AddedToken, processors
        from tokenizers import Tokenizer as Model

        self._path, self.content = path, content
        with reading(path):
            self._model = model = Model.from_str(content.decode())
            model.no_truncation()
            model.no_padding()
            model.encode_special_tokens = True
            self.start_token = _edge_token("start", start, model.get_vocab(), START_TOKENS, START_TOKEN)
            if model.token_to_id(self.start_token) is None:
                model.add_special_tokens([AddedToken(START_TOKEN, normalized=False)])
                if model.post_processor is None:
                    special = [(START_TOKEN, model.token_to_id(START_TOKEN))]
                    opening = processors.TemplateProcessing(f"{START_TOKEN} $A", f"{START_TOKEN} $A $B", special)
                    model.post_processor = opening
                self.content = model.to_str().encode()
            ids, fields = model.get_vocab(), json.loads(self.content)
            self.end_token = _edge_token("end", end, ids, END_TOKENS, self.start_token)
            added = {token["content"]: token["id"] for token in fields.get("added_tokens") or ()}
            _check_ids({**ids, **added})
            decoder = fields.get("decoder") or {}
            kinds = {part["type"] for part in decoder.get("decoders", [decoder]) if part}
            if not (_BYTE_LEVEL <= kinds or (kinds and kinds <= _SPACED)):
                got = ", ".join(sorted(kinds)) or "none"
                raise ValueError(
                    f"its decoder must be ByteLevel, or consist of {', '.join(sorted(_SPACED))}, got {short_text(got)}"
                )
            bytes_of = _character_bytes if _BYTE_LEVEL <= kinds else _spaced_bytes
            table = {number: bytes_of(token) for token, number in ids.items()}
            table |= {number: token.encode(errors="replace") for token, number in added.items()}
            self._set_vocabulary(ids, table)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        with reading(self._path):
            return [found.ids for found in self._model.encode_batch_fast(texts, add_special_tokens=False)]


class SentencePieceTokenizer(Tokenizer):
    """A tokenizer from a sentencepiece model."""

    file_name = "tokenizer.model"

    def __init__(self, content: bytes, path: str, start: str | None = None, end: str | None = None):
        self._path, self.content = path, content
        self._model = model = load("sentencepiece", "train").SentencePieceProcessor()
        try:
            is_model = bool(content) and model.LoadFromSerializedProto(content)
        except (RuntimeError, ValueError):
            is_model = False
        if not is_model:
            raise FileError(f"{path}: neither a JSON file of the `tokenizers` package nor a sentencepiece model")
        with reading(path):
            pieces = [model.IdToPiece(number) for number in range(model.GetPieceSize())]
            ids = {piece: number for number, piece in enumerate(pieces)}
            opening = [pieces[model.bos_id()]] if model.bos_id() >= 0 else []
            closing = [pieces[model.eos_id()]] if model.eos_id() >= 0 else []
            self.start_token = _edge_token("start", start, ids, opening, START_TOKEN)
            ids.setdefault(self.start_token, len(ids))
            self.end_token = _edge_token("end", end, ids, closing, self.start_token)
            table = {ids[piece]: b"" if model.IsControl(ids[piece]) else _spaced_bytes(piece) for piece in pieces}
            self._set_vocabulary(ids, {**table, model.unk_id(): "\ufffd".encode()})

    def _encode(self, texts: list[str]) -> list[list[int]]:
        with reading(self._path):
            return self._model.Encode(texts)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer from its file, or from a folder that holds a `tokenizer.json` or `tokenizer.model`.

    In such a folder, as a checkpoint's, a `tokenizer_config.json` may name the tokens before and after a document.

    Raises FileError if a file is damaged, FileNotFoundError if there is none.
    """
    path = as_path("load_tokenizer", "path", path)
    if not path.is_dir():
        return Tokenizer.from_file(path)
    for name in ("tokenizer.json", "tokenizer.model"):
        if (path / name).exists():
            return Tokenizer.from_file(path / name, **_config_tokens(path / "tokenizer_config.json"))
    fix = "; a run's tokenizer is in each of its checkpoints' folders" if (path / "checkpoints").is_dir() else ""
    raise FileNotFoundError(f"{path}: no tokenizer.json and no tokenizer.model in this folder{fix}")


def _config_tokens(path: Path) -> dict[str, str | None]:
    """Return the tokens that a folder's configuration names, as arguments of `from_file`."""
    fields = read_json(path) if path.exists() else {}
    tokens = {}
    for argument, field in (("start", "bos_token"), ("end", "eos_token")):
        token = fields.get(field)
        token = token.get("content") if isinstance(token, dict) else token
        if not (token is None or isinstance(token, str)):
            raise FileError(f"{path}: `{field}` must be a token's text or null, got {short_text(token)}")
        tokens[argument] = token
    return tokens


def _edge_token(edge: str, wanted: str | None, ids: dict[str, int], usual: Iterable[str], default: str) -> str:
    """Return the `edge` token, "start" or "end": `wanted`, else the first of `usual` in `ids`, else `default`."""
    if wanted not in (None, default, *ids):
        raise ValueError(f"the {edge} token {short_text(wanted)} must be in the vocabulary")
    return wanted or next((token for token in usual if token in ids), default)


def _check_ids(ids: dict[str, int]) -> None:
    tokens = {number: token for token, number in ids.items()}
    for token, number in ids.items():
        if tokens[number] != token:
            raise ValueError(f"two tokens have the id {number}, {short_text(token)} and {short_text(tokens[number])}")
        if number >= 1 << 31:
            raise ValueError(f"ids must be below 2^31, got {number}")


def _is_byte_tokenizer(content: bytes) -> bool:
    """Return True if a JSON file is the byte tokenizer's, even if a package has rewritten it."""

    def facts(fields: dict[str, Any]) -> list[Any]:
        return [fields["normalizer"], fields["added_tokens"], *(fields["model"][part] for part in ("vocab", "merges"))]

    try:
        return facts(json.loads(content)) == facts(json.loads(_BYTES_JSON))
    except (ValueError, RecursionError, KeyError, TypeError):
        return False


def _character_bytes(token: str) -> bytes:
    """Return the bytes of a token in a byte-level vocabulary."""
    return b"".join(_CHARACTERS.get(letter) or letter.encode(errors="replace") for letter in token)


def _spaced_bytes(token: str) -> bytes:
    """Return the bytes of a token in a vocabulary that has U+2581 for a space."""
    return _BYTE_TOKENS.get(token) or token.replace("\u2581", " ").encode(errors="replace")
