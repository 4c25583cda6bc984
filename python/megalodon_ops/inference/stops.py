"""Ends of texts: sequences of tokens that stop a row, and strings that stop its text."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from ..ops.common.checks import describe, is_integer_between

_NO_TOKEN = -2  # stands before a row's first token
_WILDCARD = -3  # matches every token
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}".encode()
_CONTEXT = 16  # earlier tokens decoded with a new one, as its text may depend on them


class StopDetector:
    """Detector of rows whose new tokens end with one of the stop sequences."""

    def __init__(self, sequences: list[list[int]], like: Tensor) -> None:
        longest = max(map(len, sequences))
        padded = [[_WILDCARD] * (longest - len(sequence)) + sequence for sequence in sequences]
        self._sequences = torch.tensor(padded, device=like.device)
        self._wildcards = self._sequences == _WILDCARD
        self._recent = torch.full((len(like), longest), _NO_TOKEN, device=like.device)

    def update(self, token: Tensor) -> Tensor:
        """Add the next token of each row; return (rows,) bools, True for rows that end."""
        self._recent = torch.cat([self._recent[:, 1:], token[:, None]], 1)
        return ((self._recent[:, None] == self._sequences) | self._wildcards).all(-1).any(-1)


def check_stops(tokens: object, sequences: object, vocab_size: int) -> list[list[int]]:
    """Return the sequences that stop a row; a stop token is a sequence of length 1."""

    def as_list(value: object) -> Sequence[object]:
        return value if isinstance(value, Sequence) and not isinstance(value, str) else [value]

    arguments = {
        "stop_tokens": [] if tokens is None else [[token] for token in as_list(tokens)],
        "stop_sequences": [] if sequences is None else as_list(sequences),
    }
    for argument, stops in arguments.items():
        for stop in stops:
            is_list = isinstance(stop, Sequence) and len(stop) > 0
            if not is_list or not all(is_integer_between(token, 0, vocab_size - 1) for token in stop):
                raise ValueError(f"generate: `{argument}` must hold tokens in [0, {vocab_size}), got {str(stop):.80}.")
    return [[int(token) for token in stop] for stops in arguments.values() for stop in stops]


class StopStrings:
    """Text of tokens that arrive one by one, up to the first stop string.

    Bytes that may begin a stop string are held back until later tokens decide. So are the bytes of an unfinished
    character, which `decode` shows as U+FFFD.

    Args:
        decode: function from a list of token ids to bytes. More ids may only append bytes.
        strings: stop strings, as text or bytes, none of them empty. The list may be empty.

    Attributes:
        stopped: True if a stop string was found.

    Example:
        >>> import megalodon_ops as mo
        >>> stop = mo.StopStrings(bytes, ["END"])  # each token of this decoder is a byte
        >>> b"".join(stop.add(token) for token in b"The E in EN. END of it"), stop.stopped
        (b'The E in EN. ', True)
    """

    def __init__(self, decode: Callable[[list[int]], bytes], strings: Iterable[str | bytes] = ()) -> None:
        strings = [strings] if isinstance(strings, (str, bytes)) else list(strings)
        for string in strings:
            if not isinstance(string, (str, bytes)) or not string:
                raise ValueError(f"StopStrings: `strings` must be text or bytes, not empty, got {describe(string)}.")
        if not callable(decode):
            raise TypeError(
                f"StopStrings: `decode` must be a function of a list of tokens, got {describe(decode)}; pass a "
                "tokenizer's method `decode`."
            )
        self._strings = [string.encode() if isinstance(string, str) else string for string in strings]
        self._decode = decode
        self._tokens = []  # the last tokens
        self._decoded = b""  # their certain text
        self._held = b""  # bytes held back
        self.stopped = False

    def add(self, token: int) -> bytes:
        """Add a token and return the new bytes that are certain to precede the first stop string."""
        if self.stopped:
            return b""
        self._held += self._new_bytes(int(token))
        positions = [at for string in self._strings if (at := self._held.find(string)) >= 0]
        if positions:
            self.stopped = True
            return self._take(min(positions))
        return self._take(len(self._held) - self._num_uncertain())

    def rest(self) -> bytes:
        """Return the bytes still held back, when no more tokens come."""
        if self.stopped:
            return b""
        decoded = self._decode(self._tokens)
        text = self._held + decoded[len(self._decoded) :]
        self._held, self._decoded = b"", decoded
        return text

    def _new_bytes(self, token: int) -> bytes:
        """Add a token and return the bytes that it adds to the text; only the last tokens are decoded again."""
        self._tokens.append(token)
        text = self._certain_text()
        if not text.startswith(self._decoded):
            return b""
        new, self._decoded = text[len(self._decoded) :], text
        if new and len(self._tokens) >= 2 * _CONTEXT:
            self._tokens = self._tokens[-_CONTEXT:]
            self._decoded = self._certain_text()
        return new

    def _certain_text(self) -> bytes:
        """Return the text of the kept tokens, without a character at its end that may be unfinished."""
        text = self._decode(self._tokens)
        if not isinstance(text, bytes):
            raise TypeError(f"StopStrings: `decode` must return bytes, got {describe(text)}; encode its text.")
        while text.endswith(_REPLACEMENT):
            text = text.removesuffix(_REPLACEMENT)
        return text

    def _num_uncertain(self) -> int:
        """Number of held bytes at the end that may begin a stop string."""
        longest = min(max(map(len, self._strings), default=1) - 1, len(self._held))
        for length in range(longest, 0, -1):
            if any(string.startswith(self._held[-length:]) for string in self._strings):
                return length
        return 0

    def _take(self, count: int) -> bytes:
        text, self._held = self._held[:count], self._held[count:]
        return text
