"""What a value from a caller or a file is, and how an error names it."""

from __future__ import annotations

import reprlib


def is_number(value: object) -> bool:
    """Whether the value is a number as JSON has them; True and False are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_whole(value: object, least: int, most: int = 2**63 - 1) -> bool:
    """Whether the value is an integer from `least` to `most`; True, False and 4.0 are none."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def shown(value: object) -> str:
    """The value on one line, and short whatever it is."""
    if isinstance(value, (dict, list, tuple, set)):
        return f"a {type(value).__name__} of {len(value)}"
    if is_number(value) and isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    text = reprlib.repr(value)
    return text if text.isprintable() else ascii(text)
