"""What `train` adds to the record of a checkpoint, `training.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from megalodon_ops.cli.flags import convert
from megalodon_ops.cli.options import NotNegative, Train
from megalodon_ops.errors import FileError


class Text(msgspec.Struct):
    fingerprint: str
    position: dict[str, Any]
    """That of Batches"""


class TrainRecord(msgspec.Struct):
    step: Annotated[int, Meta(ge=0)]
    options: Train
    data: Text
    schedule: dict[str, Any]
    """The position of Schedule"""
    seconds: NotNegative

    @classmethod
    def of(cls, folder: Path, record: dict[str, Any]) -> TrainRecord | None:
        """That of a checkpoint's folder; None of one that another training program has written."""
        if not record.keys() >= set(cls.__struct_fields__):
            return None
        try:
            return convert(record, cls)
        except msgspec.ValidationError as error:
            raise FileError(f"{folder / 'training.json'}: {error}") from error
