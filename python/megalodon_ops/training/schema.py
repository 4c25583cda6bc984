"""What `training.json` of a checkpoint holds, and a small language to say what a JSON file must hold.

Every fault is a ValueError of one line.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ..ops.values import is_number, is_whole, shown


class Rule(NamedTuple):
    """What a value of a JSON file must be: a test, and the test in words."""

    holds: Callable[[Any], bool]
    expected: str


def check_fields(
    value: Any, wanted: Mapping[str, Any] | Rule, name: str = "", optional: frozenset[str] = frozenset()
) -> None:
    """Raises unless the value fits: a Rule, or an object of exactly these fields, each of which fits.

    `optional` are fields that may be missing, under their whole names such as `options.glob`.

    Example:
        >>> from megalodon_ops.training.schema import check_fields, whole
        >>> check_fields({"step": -1}, {"step": whole(0)})
        Traceback (most recent call last):
        ValueError: `step` must be an integer, at least 0 and below 2^63, got -1
    """
    if isinstance(wanted, Rule):
        if not wanted.holds(value):
            raise ValueError(f"`{name}` must be {wanted.expected}, got {shown(value)}")
        return
    if not isinstance(value, dict):
        raise ValueError(f"`{name}` must be an object, got {shown(value)}")
    prefix = f"{name}." if name else ""
    for field in wanted:
        if field not in value and prefix + field not in optional:
            raise ValueError(f"`{prefix}{field}` is missing")
    for field, content in value.items():
        if field not in wanted:
            raise ValueError(f"{shown(prefix + field)} is unknown")
        check_fields(content, wanted[field], f"{prefix}{field}", optional)


def whole(least: int) -> Rule:
    return Rule(lambda value: is_whole(value, least), f"an integer, at least {least} and below 2^63")


def one_of(*choices: str) -> Rule:
    return Rule(lambda value: value in choices, f"one of {', '.join(choices)}")


def or_null(rule: Rule) -> Rule:
    return Rule(lambda value: value is None or rule.holds(value), f"{rule.expected}, or null")


def matching(pattern: str, expected: str) -> Rule:
    return Rule(lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None, expected)


def list_of(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(holds, value))


_LARGEST = 1e30
TEXT = Rule(lambda value: isinstance(value, str), "a string")
POSITIVE = Rule(lambda value: is_number(value) and 0 < value <= _LARGEST, f"a number above 0, at most {_LARGEST:g}")
NOT_NEGATIVE = Rule(lambda value: is_number(value) and 0 <= value <= _LARGEST, f"a number from 0 to {_LARGEST:g}")
SHA256 = matching("[0-9a-f]{64}", "a sha256 in hexadecimal digits")

_FILE = {"bytes": whole(0), "sha256": SHA256}
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*|distributed/(__\d+_\d+\.distcp|\.metadata)")


def _is_list_of_files(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    for name, facts in value.items():
        if _NAME.fullmatch(name) is None:
            return False
        check_fields(facts, _FILE, f"files.{name}")
    return True


def _is_mesh(value: Any) -> bool:
    return isinstance(value, dict) and len(value) > 0 and all(is_whole(size, 1) for size in value.values())


OWN: dict[str, Any] = {
    "format": whole(1),
    "step": whole(0),
    "megalodon_ops": TEXT,
    "torch": TEXT,
    "threads": whole(1),
    "optimizer": or_null(TEXT),
    "files": Rule(_is_list_of_files, "an object of facts by file name"),
    "checksum": SHA256,
    "mesh": Rule(_is_mesh, "an object of sizes by dimension"),
}
"""The fields that every `training.json` has; the others are the training program's"""
OPTIONAL = frozenset({"mesh"})
"""Those of them that are there only where several processes have written the folder"""


def check_own(record: dict[str, Any]) -> None:
    """Raises unless the fields that every `training.json` has are there and fit."""
    check_fields({name: value for name, value in record.items() if name in OWN}, OWN, optional=OPTIONAL)
