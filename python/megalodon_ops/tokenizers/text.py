"""Text and bytes: where a text is cut, and the characters that stand for bytes in byte-level vocabularies."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from ..ops.values import described

WINDOW = 1 << 16
"""Most bytes that are encoded at once"""

_WORDS = re.compile(rb"[!-~](?= [A-Za-z])")
_LINES = re.compile(rb"[!-~]\n(?=[!-~])")


def windows_of(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """A text that comes in pieces, cut into windows; where it is cut depends on its bytes alone."""
    rest = bytearray()
    for piece in pieces:
        rest += piece
        at = 0
        while len(rest) - at > WINDOW:
            text = bytes(rest[at : at + WINDOW + 1])
            cut = _cut(text)
            yield text[:cut]
            at += cut
        del rest[:at]
    if rest:
        yield bytes(rest)


def _cut(text: bytes) -> int:
    """Where to cut a text of more than a window: at a word's end, else at a line's, else at a letter's."""
    for pattern, area in ((_WORDS, len(text) // 16), (_WORDS, len(text)), (_LINES, len(text))):
        ends = [found.end() for found in pattern.finditer(text, len(text) - area)]
        if ends:
            return ends[-1]
    cut = len(text) - 1
    while cut > len(text) - 5 and text[cut] & 0xC0 == 0x80:  # inside a letter of UTF-8
        cut -= 1
    return cut


def as_pieces(pieces: Iterable[bytes], function: str = "encode_pieces", argument: str = "pieces") -> Iterator[bytes]:
    """The pieces of a text, once each is known to be one."""
    if isinstance(pieces, (str, bytes, bytearray, memoryview)) or not isinstance(pieces, Iterable):
        raise TypeError(f"{function}: `{argument}` must be an iterable of bytes, got {described(pieces)}.")
    return (as_bytes(function, piece) for piece in pieces)


def as_bytes(function: str, text: bytes | str) -> bytes:
    if isinstance(text, str):
        return text.encode()
    if not isinstance(text, (bytes, bytearray, memoryview)):
        raise TypeError(f"{function}: `text` must be bytes or str, got {described(text)}.")
    return bytes(text)


def _byte_characters() -> list[str]:
    """The character that stands for each byte in byte-level vocabularies: itself, or one from 256 on if it is no mark."""
    marks = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in marks else next(others)) for byte in range(256)]


BYTE_CHARACTERS = _byte_characters()
_CHARACTER_BYTES = {character: bytes([byte]) for byte, character in enumerate(BYTE_CHARACTERS)}


def bytes_of_characters(token: str) -> bytes:
    return b"".join(_CHARACTER_BYTES.get(character) or character.encode(errors="replace") for character in token)


def bytes_of_words(token: str) -> bytes:
    return token.replace("\u2581", " ").encode(errors="replace")


def bytes_of_spaced(token: str) -> bytes:
    found = re.fullmatch("<0x([0-9A-Fa-f]{2})>", token)
    return bytes([int(found[1], 16)]) if found else bytes_of_words(token)
