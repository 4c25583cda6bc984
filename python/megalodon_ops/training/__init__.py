"""What a training program needs around the model; needs the extra `train`.

    documents   hold_out                                     batches      Batches, Batch, Reader
    optimizer   parameter_groups, adamw, Schedule            metrics      Metrics, read_metrics, draw_metrics
    checkpoint  save_checkpoint, load_checkpoint

`python -m megalodon_ops train` is made of these; docs/training.md has a program of one's own.
"""

from .batches import START, Batch, Batches
from .checkpoint import Checkpoint, load_any, load_checkpoint, save_checkpoint
from .corpus import Corpus, hold_out
from .metrics import Metrics, draw_metrics, read_metrics
from .optimizer import adamw, optimizer_threads, parameter_groups, threads
from .reader import Reader
from .schedule import Schedule

__all__ = [
    "START",
    "Batch",
    "Batches",
    "Checkpoint",
    "Corpus",
    "Metrics",
    "Reader",
    "Schedule",
    "adamw",
    "draw_metrics",
    "hold_out",
    "load_any",
    "load_checkpoint",
    "optimizer_threads",
    "parameter_groups",
    "read_metrics",
    "save_checkpoint",
    "threads",
]
