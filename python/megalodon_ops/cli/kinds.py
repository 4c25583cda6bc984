"""What values flags take: functions that make a value of a flag's text, or say what it must be."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path


def _number(kind: Callable, accepts: Callable[[float], bool], wanted: str) -> Callable[[str], float]:
    def parse_number(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:  # int refuses thousands of digits, too
            value = math.nan
        if not (abs(value) < 2**63 and accepts(value)):
            raise argparse.ArgumentTypeError(f"must be {wanted}, got {text[:40]}{'...' * (len(text) > 40)}")
        return value

    return parse_number


def is_glob(pattern: str) -> bool:
    """Whether `Path.match` takes the pattern."""
    try:
        Path("name").match(pattern)
    except ValueError:
        return False
    return True


def mesh_sizes(text: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if name not in ("data", "chunk", "tensor") or name in sizes or not size.isascii() or not size.isdigit():
            raise argparse.ArgumentTypeError(
                f"must be sizes of data, chunk and tensor such as data=2,chunk=2, got {text[:40]!r}"
            )
        sizes[name] = int(size[:10])
    if 0 in sizes.values():
        raise argparse.ArgumentTypeError(f"must have sizes of at least 1, got {text[:40]!r}")
    return sizes


def glob_pattern(text: str) -> str:
    if not is_glob(text):
        raise argparse.ArgumentTypeError(f"must be a pattern of file names such as '*.py', got {text!r}")
    return text


def some_text(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("must be text, got none")
    return text


def context_length(text: str) -> int | str:
    return text if text == "all" else token_count(text)


token_count = _number(int, lambda x: 0 < x < 2**62, "'all' or a whole number above 0 and below 2^62")
natural = _number(int, lambda x: x > 0, "a whole number above 0 and below 2^63")
small_natural = _number(int, lambda x: 0 < x < 2**31, "a whole number above 0 and below 2^31")
vocabulary = _number(int, lambda x: 257 < x < 2**24, "a whole number above 257 and below 2^24")
shard_size = _number(int, lambda x: 0 < x < 2**20, "a whole number of MiB above 0 and below 2^20")
seed = _number(int, lambda x: 0 <= x < 2**63, "a whole number from 0 to 2^63 - 1")
positive = _number(float, lambda x: x > 0, "a number above 0")
not_negative = _number(float, lambda x: x >= 0, "a number, 0 or above")
probability = _number(float, lambda x: 0 <= x < 1, "a probability, from 0 to below 1")
fraction = _number(float, lambda x: 0 < x <= 1, "above 0 and at most 1")
