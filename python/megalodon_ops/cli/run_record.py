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
    held_out_bits_per_byte: NotNegative | None = None
    """Of the sample of held-out text, after this step; None where it was not evaluated"""

    @classmethod
    def of(cls, folder: Path, record: dict[str, Any]) -> TrainRecord | None:
        """Return the record in a checkpoint's folder, or None if another training program wrote it."""
        if not record.keys() >= {field.name for field in msgspec.structs.fields(cls) if field.required}:
            return None
        try:
            return convert(record, cls)
        except msgspec.ValidationError as error:
            raise FileError(f"{folder / 'training.json'}: {error}") from error
