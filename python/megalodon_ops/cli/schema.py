"""What `train` adds to a checkpoint's `training.json`. Every fault is a ValueError of one line."""

from __future__ import annotations

from typing import Any

from megalodon_ops.cli.arguments import SMALL
from megalodon_ops.cli.kinds import is_glob
from megalodon_ops.model.config import MegalodonConfig
from megalodon_ops.ops.values import is_number, is_whole
from megalodon_ops.training import schema
from megalodon_ops.training.checkpoint import Checkpoint
from megalodon_ops.training.schema import (
    NOT_NEGATIVE,
    POSITIVE,
    SHA256,
    Rule,
    list_of,
    matching,
    one_of,
    or_null,
    whole,
)


LONGEST = (1 << 63) - 1
"""A context length that no document has"""


def check(found: Checkpoint) -> None:
    """Raises unless the fields are as a run writes them, and the optimizer and the state are those of such a run."""
    record, step = found.record, found.step
    if isinstance(record.get("options"), dict):
        record["options"].setdefault("optimizer", "adamw")  # runs of before there was a choice
        record["options"].setdefault(
            "context_length", None if record["options"].get("context") == "packed" else LONGEST
        )
    schema.check_fields({name: value for name, value in record.items() if name not in schema.OWN}, RECORD)
    options, readers = record["options"], record["data"]["position"]["readers"]
    streamed = options["context"] == "streamed"
    if len(readers) != (rows := options["batch"] if streamed else 1):
        raise ValueError(f"`data.position.readers` must be as many as the rows, {rows}, got {len(readers)}")
    parameters = {name for name, _ in found.config.parameter_shapes()} if step else set()
    if {key.rpartition("/")[0] for key in found.optimizer} != parameters:
        raise ValueError(
            "the optimizer's state must be that of every parameter after the first step, and of none before"
        )
    if found.num_rows != (wanted := rows if streamed and step else 0):
        raise ValueError(f"the state must be that of {wanted or 'no'} rows")


def check_where_trained(found: Checkpoint) -> None:
    """Raises as :func:`check` does, but lets a checkpoint of another training program be."""
    if is_of_train(found.record):
        check(found)


def is_of_train(record: dict[str, Any] | None) -> bool:
    """Whether `train` has written a record, and not another training program."""
    return record is not None and record.keys() >= RECORD.keys()


def _is_reader(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and is_whole(value[0], -1) and is_whole(value[1], 0)


def _is_anchor(value: Any) -> bool:
    progress = isinstance(value, list) and len(value) == 2 and is_number(value[1]) and 0 <= value[1] <= 1
    return progress and is_whole(value[0], 0)


_PATHS = Rule(lambda value: list_of(schema.TEXT.holds)(value) and len(value) > 0, "a list of paths")
_GLOBS = Rule(lambda value: _PATHS.holds(value) and all(map(is_glob, value)), "a list of patterns of file names")

RECORD: dict[str, Any] = {
    "options": {
        "data": or_null(_PATHS),
        "glob": or_null(_GLOBS),
        "tokenizer_file": or_null(schema.TEXT),
        "steps": or_null(whole(1)),
        "minutes": or_null(POSITIVE),
        "preset": one_of(SMALL, *MegalodonConfig.presets()),
        "context": one_of("streamed", "packed"),
        "batch": whole(1),
        "length": whole(1),
        "context_length": or_null(whole(1)),
        "optimizer": one_of("muon", "adamw"),
        "lr": POSITIVE,
        "warmup": whole(1),
        "weight_decay": NOT_NEGATIVE,
        "clip": POSITIVE,
        "seed": whole(0),
        "device": matching(r"(cpu|cuda)(:\d{1,3})?", "cpu or cuda, or one of several by its number"),
        "dtype": one_of("float32", "bfloat16"),
        "eval_every": whole(1),
        "checkpoint_every": whole(1),
    },
    "data": {
        "fingerprint": SHA256,
        "position": {"taken": whole(0), "readers": Rule(list_of(_is_reader), "a list of pairs (document, offset)")},
    },
    "schedule": {
        "steps": or_null(whole(1)),
        "budget": or_null(POSITIVE),
        "anchor": Rule(_is_anchor, "a step and a number from 0 to 1"),
        "end": or_null(whole(0)),
    },
    "seconds": NOT_NEGATIVE,
}
"""Fields of `training.json` that are not every training program's"""
