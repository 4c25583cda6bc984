"""What a training program needs around the model; needs the extra `train`.

    documents   hold_out, Shards                                batches   Batches, Batch, Reader
    optimizer   parameter_groups, adamw, Muon, Schedule     metrics   Metrics, read_metrics, draw_metrics
    checkpoint  save_checkpoint, load_checkpoint, Saver

`python -m megalodon_ops train` is made of these; docs/training.md has a program of one's own.
"""

from typing import TYPE_CHECKING, Any

from .batches import START, Batch, Batches
from .checkpoint import Checkpoint, load_any, load_checkpoint, save_checkpoint
from .corpus import Corpus, hold_out
from .metrics import Metrics, read_metrics
from .optimizer import Muon, adamw, optimizer_threads, parameter_groups, threads
from .reader import Reader
from .saver import Saver
from .schedule import Schedule
from .shards import Shards

if TYPE_CHECKING:
    from .curve import draw_metrics

__all__ = [
    "START", "Batch", "Batches", "Checkpoint", "Corpus", "Metrics", "Muon", "Reader", "Saver", "Schedule", "Shards",
    "adamw", "draw_metrics", "hold_out", "load_any", "load_checkpoint", "optimizer_threads", "parameter_groups",
    "read_metrics", "save_checkpoint", "threads",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name != "draw_metrics":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .curve import draw_metrics  # here: matplotlib takes long to load, and programs that draw nothing do without

    return draw_metrics
