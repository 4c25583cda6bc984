"""A tokenizer's files: the JSON of the `tokenizers` package, read, completed and written without that package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .text import BYTE_CHARACTERS
from ..errors import FileError
from ..model.files import read_json
from ..ops.values import shown

START_TOKEN = "<|startoftext|>"
"""The token that opens a document, in the byte tokenizer and where a tokenizer has none of its own"""
START_TOKENS = ("<s>", "<bos>", "[BOS]", "<|begin_of_text|>", START_TOKEN, "<|endoftext|>")
"""Common names of the token that opens a document; the first that a vocabulary has is taken"""


def json_object(content: bytes, name: str) -> dict[str, Any]:
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{name}: is no JSON: {shown(str(error))}") from error
    added = fields.get("added_tokens") if isinstance(fields, dict) else None
    rows = added if isinstance(added, list) else []
    if not isinstance(fields, dict) or not all(isinstance(row, dict) and "id" in row for row in rows):
        raise FileError(f"{name}: is no tokenizer of the `tokenizers` package")
    return fields


def decoder_kinds(fields: dict[str, Any]) -> set[str]:
    decoder = fields.get("decoder") or {}
    decoders = decoder.get("decoders", [decoder]) if isinstance(decoder, dict) else []
    return {str(part["type"]) for part in decoders if isinstance(part, dict) and "type" in part}


def with_start(fields: dict[str, Any], number: int) -> bytes:
    """A tokenizer's JSON with a token that opens a document, and that stands before every text if nothing else does."""
    fields = {**fields, "added_tokens": [*(fields.get("added_tokens") or []), _added_token(number)]}
    if fields.get("post_processor") is None:
        fields["post_processor"] = _opening(number)
    return json.dumps(fields, ensure_ascii=False).encode(errors="surrogatepass")


def _added_token(number: int) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": number, "content": START_TOKEN, **flags}


def _opening(number: int) -> dict[str, Any]:
    start = {"SpecialToken": {"id": START_TOKEN, "type_id": 0}}
    first, second = ({"Sequence": {"id": letter, "type_id": 0}} for letter in "AB")
    special = {START_TOKEN: {"id": START_TOKEN, "ids": [number], "tokens": [START_TOKEN]}}
    return {
        "type": "TemplateProcessing",
        "single": [start, first],
        "pair": [start, first, second],
        "special_tokens": special,
    }


def byte_json() -> bytes:
    """The byte tokenizer as a JSON file of the `tokenizers` package: byte-level BPE without merges."""
    bytewise = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
        "vocab": {character: byte for byte, character in enumerate(BYTE_CHARACTERS)}, "merges": [],
    }  # fmt: skip
    fields = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [_added_token(256)], "normalizer": None,
        "pre_tokenizer": bytewise, "post_processor": _opening(256), "decoder": bytewise, "model": model,
    }  # fmt: skip
    return (json.dumps(fields, ensure_ascii=False, indent=1) + "\n").encode()


def is_byte_json(fields: dict[str, Any]) -> bool:
    model, added = fields.get("model"), fields.get("added_tokens")
    return (
        isinstance(model, dict)
        and model.get("type") == "BPE"
        and model.get("merges") == []
        and model.get("vocab") == {character: byte for byte, character in enumerate(BYTE_CHARACTERS)}
        and fields.get("normalizer") is None
        and isinstance(added, list)
        and [(token["id"], token.get("content")) for token in added] == [(256, START_TOKEN)]
    )


def write_files(folder: Path, name: str, content: bytes, start: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    config: dict[str, Any] = {"bos_token": start, "clean_up_tokenization_spaces": False}
    if name == "tokenizer.json":  # transformers pads with it, and takes no token that also ends a text for padding
        config |= {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": start, "pad_token": start}
        config |= {"padding_side": "left"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")


def configured_start(path: Path) -> str | None:
    try:
        token = read_json(path).get("bos_token")
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise FileError(str(error)) from error
    if isinstance(token, dict):
        token = token.get("content")
    if not (token is None or isinstance(token, str)):
        raise FileError(f"{path}: `bos_token` must be a token's text or null, got {shown(token)}")
    return token
