"""`training.json` of a checkpoint: what the training program says, and the sizes and sha256 sums of the other files.

Every fault is a ValueError of one line.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch

from . import schema
from .. import _C
from ..model.checkpoint import CONFIG
from ..model.files import file_facts, file_sha256, file_size, read_json
from ..model.weights import reading
from ..ops.values import described, is_whole, shown

FORMAT = 3
"""Counts the changes of the files' content; checkpoints of another format are not read"""
RECORD = "training.json"
OLD_RECORD = "checkpoint.json"  # of format 2 and before


def new_record(step: int, optimizer: torch.optim.Optimizer | None, record: dict[str, Any] | None) -> dict[str, Any]:
    """The content of `training.json` but for the facts of files; raises where the program's own part cannot be that."""
    record = {} if record is None else record
    if not isinstance(record, dict) or schema.OWN.keys() & record.keys():
        got = described(record) if not isinstance(record, dict) else shown(min(schema.OWN.keys() & record.keys()))
        raise ValueError(f"save_checkpoint: `record` must be a dictionary without {', '.join(schema.OWN)}, got {got}.")
    return {
        "format": FORMAT,
        "step": step,
        "megalodon_ops": _C.build_info()["version"],
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "optimizer": None if optimizer is None else type(optimizer).__name__,
        **_as_json(record),
    }


def write_record(folder: Path, content: dict[str, Any], others: dict[str, dict[str, Any]] | None = None) -> None:
    """Writes `training.json` beside the files that are in the folder; `others` are facts of files in folders inside."""
    files = {path.name: file_facts(path) for path in sorted(folder.iterdir()) if path.is_file()}
    content = {**content, "files": files | (others or {})}
    (folder / RECORD).write_text(json.dumps({**content, "checksum": checksum_of(content)}, indent=1) + "\n")


def read_record(folder: Path) -> dict[str, Any]:
    """The content of `training.json`, which agrees with its own checksum."""
    path = folder / RECORD
    if not os.path.lexists(path) and os.path.lexists(folder / OLD_RECORD):
        raise ValueError(f"{folder / OLD_RECORD}: {_of_an_old_version(folder / OLD_RECORD)}")
    record = read_json(path)
    with reading(path):
        if not is_whole(number := record.get("format"), FORMAT, FORMAT):
            raise ValueError(
                f"its format is {shown(number)}, and this version reads {FORMAT}; the version that wrote it reads it"
            )
        schema.check_own(record)
        content = {name: value for name, value in record.items() if name != "checksum"}
        if checksum_of(content) != record["checksum"]:
            raise ValueError("was changed after it was written: its checksum is another")
    return record


def _of_an_old_version(path: Path) -> str:
    try:
        record = read_json(path)
    except (OSError, ValueError):
        record = {}
    return (
        f"is a checkpoint of format {shown(record.get('format'))}, of megalodon_ops before checkpoints were folders with "
        f"a {CONFIG}; the commit that wrote it, of version {shown(record.get('megalodon_ops'))}, reads it"
    )


def check_file(path: Path, wanted: dict[str, Any] | None) -> None:
    """Raises unless a file is as `training.json` has it."""
    if wanted is None:
        raise ValueError(f"{path}: is not one of the files that {RECORD} lists")
    size = file_size(path)
    if size != wanted["bytes"]:
        raise ValueError(f"{path}: has {size} bytes instead of {wanted['bytes']}")
    if file_sha256(path) != wanted["sha256"]:
        raise ValueError(f"{path}: was changed after it was written: its checksum is another")


def checksum_of(record: dict[str, Any]) -> str:
    """The sha256 sum of a record's content, whatever its layout."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _as_json(record: dict[str, Any]) -> dict[str, Any]:
    """The record as reading it back gives it."""
    try:
        return json.loads(json.dumps(record, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"save_checkpoint: `record` must be JSON, got what is none: {error}.") from error
