"""Windows of text, and checks of arguments that are text."""

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ..ops.common.checks import describe

WINDOW = 1 << 16
"""Maximum number of bytes that are encoded at a time"""
_TEXT = (str, bytes, bytearray, memoryview)
_WORDS = re.compile(rb".*[!-~](?= [A-Za-z])", re.DOTALL)  # up to the last space between ASCII words
_LINES = re.compile(rb".*[!-~]\n(?=[!-~])", re.DOTALL)  # up to the last line's begin


class Window(NamedTuple):
    """A part of a document's text, encoded on its own."""

    text: bytes
    is_first: bool
    is_last: bool


def windows_of(pieces: Iterable[bytes]) -> Iterator[Window]:
    """Cut a document, given in pieces, into one or more windows; the cuts depend only on its bytes."""
    rest = bytearray()
    is_first = True
    for piece in pieces:
        rest += piece
        at = 0
        while len(rest) - at > WINDOW:
            text = bytes(rest[at : at + WINDOW + 1])
            cut = _cut(text)
            yield Window(text[:cut], is_first, False)
            at, is_first = at + cut, False
        del rest[:at]
    yield Window(bytes(rest), is_first, True)


def _cut(text: bytes) -> int:
    """Return the cut in a text longer than a window: after the last word, else line, else character."""
    if found := _WORDS.match(text) or _LINES.match(text):
        return found.end()
    cut = len(text) - 1
    while cut > len(text) - 5 and text[cut] & 0xC0 == 0x80:  # inside a UTF-8 character
        cut -= 1
    return cut


def as_texts(function: str, argument: str, texts: Iterable[bytes | str]) -> Iterator[bytes]:
    """Yield the texts as bytes; refuse a single text, as iterating over it would yield its characters."""
    if isinstance(texts, _TEXT) or not isinstance(texts, Iterable):
        raise TypeError(f"{function}: `{argument}` must be a list of texts, got {describe(texts)}; put it in a list.")
    for text in texts:
        if not isinstance(text, _TEXT):
            raise TypeError(f"{function}: `{argument}` must hold bytes or str, got {describe(text)}.")
        yield text.encode() if isinstance(text, str) else bytes(text)
