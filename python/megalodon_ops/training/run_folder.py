"""The checkpoints in a run's folder: their names, their order, and which of them stay."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def keep_newest(root: Path, written: Path, keep: int) -> None:
    """Removes, of the checkpoint just written and those of earlier steps, all but the newest `keep`."""
    for old in [path for path in in_order(root) if _order(path) <= _order(written)][:-keep]:
        hidden = old.with_name(f".{old.name}.draft-old")
        os.rename(old, hidden)  # a folder is whole or not there
        shutil.rmtree(hidden)


def checkpoint_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def _order(folder: Path) -> tuple[int, str]:
    """Sorts folders by their steps, of eight digits or more."""
    return len(folder.name), folder.name


def in_order(root: Path) -> list[Path]:
    return sorted(root.glob("step-*"), key=_order)


def has_checkpoint(run: Path) -> bool:
    """Whether a run's folder holds a checkpoint, complete or damaged."""
    return any((run / "checkpoints").glob("step-*"))
