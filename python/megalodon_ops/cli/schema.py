"""What a checkpoint must hold: the fields of `checkpoint.json`, and the tensors that follow from them.

Every fault is a ValueError of one line.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megalodon_ops import MegalodonConfig
from megalodon_ops.cli import carry
from megalodon_ops.cli.arguments import SMALL, is_glob
from megalodon_ops.ops.memory import check_fits, is_finite
from megalodon_ops.ops.values import is_number, is_whole, shown

PARTS = ("model", "optimizer", "state", "random")
"""Files of tensors in a checkpoint"""


class Rule(NamedTuple):
    holds: Callable[[Any], bool]
    expected: str


Layout = Iterator[tuple[str, torch.dtype, tuple[int, ...]]]
"""Name, dtype and shape of each tensor of a file"""


def check_record(record: dict[str, Any]) -> MegalodonConfig:
    """The configuration in `checkpoint.json`, once all of the file is as a run writes it and the model fits in memory."""
    _check(record, RECORD, "")
    config = MegalodonConfig.from_dict(record["config"])
    check_fits(config.num_parameters() * torch.float32.itemsize, "the model of `config`")
    options, readers = record["options"], record["data"]["position"]["readers"]
    if len(readers) != (rows := options["batch"] if options["context"] == "streamed" else 1):
        raise ValueError(f"`data.position.readers` must be as many as the rows, {rows}, got {len(readers)}")
    return config


def complete(record: dict[str, Any]) -> dict[str, Any]:
    """The record of a checkpoint, with the options that the version which wrote it lacked, as that version behaved."""
    return {**record, "options": {**_OPTIONS_BEFORE, **record["options"]}}


def layout(part: str, config: MegalodonConfig, record: dict[str, Any]) -> Layout:
    """The tensors of a file. They are listed one by one, as a configuration may name 10^9 layers."""
    options, begun = record["options"], record["step"] > 0
    if part == "model":
        for name, shape in config.parameter_shapes():
            yield name, torch.float32, shape
    elif part == "optimizer" and begun:
        for name, shape in config.parameter_shapes():
            yield f"{name}/step", torch.float32, ()
            yield f"{name}/exp_avg", torch.float32, shape
            yield f"{name}/exp_avg_sq", torch.float32, shape
    elif part == "state" and begun and options["context"] == "streamed":
        yield from carry.layout(config, options["batch"], getattr(torch, options["dtype"]))
    elif part == "random":
        yield "cpu", torch.uint8, tuple(torch.get_rng_state().shape)
        if torch.device(options["device"]).type == "cuda":
            yield "cuda", torch.uint8, (16,)


def check_layout(found: dict[str, tuple[torch.dtype | None, tuple[int, ...]]], wanted: Layout) -> None:
    """Raises unless a file has the tensors wanted and no other; the check stops at the first missing tensor."""
    known = set()
    for name, dtype, shape in wanted:
        known.add(name)
        if name not in found:
            raise ValueError(f"its tensors are not those of its config: `{name}` is missing")
        if found[name] != (dtype, shape):
            raise ValueError(
                f"its tensors are not those of its config: `{name}` must be {dtype} {shape}, "
                f"got {' '.join(map(str, found[name]))}"
            )
    if unknown := [name for name in found if name not in known]:
        raise ValueError(f"its tensors are not those of its config: {shown(unknown[0])} is unknown")


def check_values(part: str, tensors: dict[str, Tensor], config: MegalodonConfig) -> None:
    """Raises where a value is one that no training gives."""
    if part == "random":
        try:
            torch.Generator().set_state(tensors["cpu"])
        except RuntimeError as error:
            raise ValueError("`cpu` must be a state of torch's generator") from error
        return
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not is_finite(tensor):
            raise ValueError(f"`{name}` must be finite, got NaN or infinity")
        below = config.chunk_size if name.endswith("attention.position") else None
        of_squares = name.endswith((".var", "/exp_avg_sq", "/step"))
        if (below or of_squares or name.endswith(".count")) and tensor.numel():
            least, most = (bound.item() for bound in torch.aminmax(tensor))
            if least < 0 or (below is not None and most >= below):
                expected = "at least 0" if below is None else f"in [0, {below})"
                raise ValueError(f"`{name}` must be {expected}, got values from {least} to {most}")


def _check(value: Any, wanted: dict[str, Any] | Rule, name: str) -> None:
    if isinstance(wanted, Rule):
        if not wanted.holds(value):
            raise ValueError(f"`{name}` must be {wanted.expected}, got {shown(value)}")
        return
    if not isinstance(value, dict):
        raise ValueError(f"`{name}` must be an object, got {shown(value)}")
    prefix = f"{name}." if name else ""
    for field in wanted:
        if field not in value and prefix + field not in ADDED_LATER:
            raise ValueError(f"`{prefix}{field}` is missing")
    for field, content in value.items():
        if field not in wanted:
            raise ValueError(f"{shown(prefix + field)} is unknown")
        _check(content, wanted[field], f"{prefix}{field}")


def _whole(least: int) -> Rule:
    return Rule(lambda value: is_whole(value, least), f"an integer, at least {least} and below 2^63")


def _one_of(*choices: str) -> Rule:
    return Rule(lambda value: value in choices, f"one of {', '.join(choices)}")


def _or_null(rule: Rule) -> Rule:
    return Rule(lambda value: value is None or rule.holds(value), f"{rule.expected}, or null")


def _matching(pattern: str, expected: str) -> Rule:
    return Rule(lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None, expected)


def _is_reader(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and is_whole(value[0], -1) and is_whole(value[1], 0)


def _is_anchor(value: Any) -> bool:
    progress = isinstance(value, list) and len(value) == 2 and is_number(value[1]) and 0 <= value[1] <= 1
    return progress and is_whole(value[0], 0)


def _list_of(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(holds, value))


_LARGEST = 1e30
_TEXT = Rule(lambda value: isinstance(value, str), "a string")
_ANYTHING = Rule(lambda value: True, "anything")
_POSITIVE = Rule(lambda value: is_number(value) and 0 < value <= _LARGEST, f"a number above 0, at most {_LARGEST:g}")
_NOT_NEGATIVE = Rule(lambda value: is_number(value) and 0 <= value <= _LARGEST, f"a number from 0 to {_LARGEST:g}")
_SHA256 = _matching("[0-9a-f]{64}", "a sha256 in hexadecimal digits")
_PATHS = Rule(lambda value: _list_of(_TEXT.holds)(value) and len(value) > 0, "a list of paths")
_GLOBS = Rule(lambda value: _PATHS.holds(value) and all(map(is_glob, value)), "a list of patterns of file names")

RECORD: dict[str, Any] = {
    "format": _whole(1),
    "step": _whole(0),
    "megalodon_ops": _TEXT,
    "torch": _TEXT,
    "threads": _whole(1),
    "options": {
        "data": _or_null(_PATHS),
        "glob": _or_null(_GLOBS),
        "steps": _or_null(_whole(1)),
        "minutes": _or_null(_POSITIVE),
        "preset": _one_of(SMALL, *MegalodonConfig.presets()),
        "context": _one_of("streamed", "packed"),
        "batch": _whole(1),
        "length": _whole(1),
        "lr": _POSITIVE,
        "warmup": _whole(1),
        "weight_decay": _NOT_NEGATIVE,
        "clip": _POSITIVE,
        "seed": _whole(0),
        "device": _matching(r"(cpu|cuda)(:\d{1,3})?", "cpu or cuda, or one of several by its number"),
        "dtype": _one_of("float32", "bfloat16"),
        "eval_every": _whole(1),
        "checkpoint_every": _whole(1),
    },
    "config": {field: _ANYTHING for field in MegalodonConfig().to_dict()},
    "data": {
        "fingerprint": _SHA256,
        "position": {"taken": _whole(0), "readers": Rule(_list_of(_is_reader), "a list of pairs (document, offset)")},
    },
    "schedule": {
        "steps": _or_null(_whole(1)),
        "budget": _or_null(_POSITIVE),
        "anchor": Rule(_is_anchor, "a step and a number from 0 to 1"),
        "end": _or_null(_whole(0)),
    },
    "seconds": _NOT_NEGATIVE,
    "files": {part: {"bytes": _whole(1), "sha256": _SHA256} for part in PARTS},
    "checksum": _SHA256,
}
"""Every field of `checkpoint.json`; `config` is checked by the configuration itself"""

_OPTIONS_BEFORE = {"glob": ["*"]}
ADDED_LATER = {f"options.{name}" for name in _OPTIONS_BEFORE}
"""Fields that checkpoints of older versions of this format lack"""
