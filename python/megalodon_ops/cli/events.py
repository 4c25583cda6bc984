"""Metrics of a run for TensorBoard."""

from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from megalodon_ops.training import Metrics

NO_CURVES = frozenset({"step", "seconds", "tokens", "final", "compressors"})
"""Fields of a row that are not drawn against the step"""


class Events(Metrics):
    """Metrics that are also written to the folder `events` beside their file."""

    def __init__(self, path: Path, step: int = 0):
        super().__init__(path, step)
        self._writer = SummaryWriter(path.with_name("events"), purge_step=step + 1)

    def write(self, **row: Any) -> None:
        super().write(**row)
        for name in row.keys() - NO_CURVES:
            self._writer.add_scalar(name, row[name], row["step"])

    def __exit__(self, *error: object) -> None:
        self._writer.close()
        super().__exit__(*error)
