"""Fields that `train` adds to a checkpoint's `training.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from megalodon_ops.cli.flags import convert
from megalodon_ops.cli.options import NotNegative, Train
from megalodon_ops.files import FileError
from megalodon_ops.training.batches import BatchesPosition
from megalodon_ops.training.schedule import SchedulePosition


class Text(msgspec.Struct):
    fingerprint: str
    position: BatchesPosition


class TrainRecord(msgspec.Struct):
    step: Annotated[int, Meta(ge=0)]
    options: Train
    data: Text
    schedule: SchedulePosition
    seconds: NotNegative

    @classmethod
    def of(cls, folder: Path, record: dict[str, Any]) -> TrainRecord | None:
        """Return the record in a checkpoint's folder, or None if another training program wrote it."""
        if not record.keys() >= set(cls.__struct_fields__):
            return None
        try:
            return convert(record, cls)
        except msgspec.ValidationError as error:
            raise FileError(f"{folder / 'training.json'}: {error}") from error
