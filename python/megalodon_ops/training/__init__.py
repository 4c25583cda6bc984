"""The parts of a training program around the model; needs the extra `train`.

    documents   hold_out, Shards                                batches   Batches, Batch, Reader
    optimizer   parameter_groups, adamw, Muon, Schedule     metrics   Metrics, read_metrics, draw_metrics
    checkpoint  save_checkpoint, load_checkpoint, Saver

`megalodon-ops train` is built from them; docs/training.md shows how to write your own program.
"""

from .batches import START, Batch, Batches
from .run_checkpoint import Checkpoint, load_any, load_checkpoint, save_checkpoint
from .corpus import Corpus, hold_out
from .curve import draw_metrics
from .metrics import Metrics, read_metrics
from .optimizer import Muon, adamw, optimizer_threads, parameter_groups, threads
from .reader import Reader
from .saver import Saver
from .schedule import Schedule
from .shards import Shards

__all__ = [
    "START", "Batch", "Batches", "Checkpoint", "Corpus", "Metrics", "Muon", "Reader", "Saver", "Schedule", "Shards",
    "adamw", "draw_metrics", "hold_out", "load_any", "load_checkpoint", "optimizer_threads", "parameter_groups",
    "read_metrics", "save_checkpoint", "threads",
]  # fmt: skip
