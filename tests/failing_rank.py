"""A process that torchrun starts: `train`, with a fault in one rank alone.

torchrun ... failing_rank.py FAULT RANK train --data ...
"""

from __future__ import annotations

import os
import sys
from typing import Any, NoReturn

from megalodon_ops.cli import errors, process, train
from megalodon_ops.training import Batches, Metrics, Reader


def missing_file(*arguments: Any) -> NoReturn:
    raise errors.CommandError("--data book.txt: no such file or folder")


def unreadable_text(batches: Batches) -> NoReturn:
    raise OSError(5, "Input/output error", "book.txt")


def full_disk(metrics: Metrics, **row: Any) -> NoReturn:
    raise OSError("metrics.jsonl: could not be written: No space left on device")


def bad_evaluation(*arguments: Any) -> NoReturn:
    raise FloatingPointError("the loss of the text to predict is nan")


def broken_backward(reader: Reader, batch: Any) -> Any:
    loss = LOSS(reader, batch)
    loss.register_hook(lambda gradient: 1 / 0)
    return loss


LOSS = Reader.loss
FAULTS = {
    "missing file": (train, "load_data", missing_file),
    "unreadable text": (Batches, "next", unreadable_text),
    "full disk": (Metrics, "write", full_disk),
    "bad evaluation": (train, "nats_and_bytes", bad_evaluation),
    "broken backward": (Reader, "loss", broken_backward),
}

if __name__ == "__main__":
    fault, rank = sys.argv[1:3]
    del sys.argv[1:3]
    if os.environ["RANK"] == rank:
        setattr(*FAULTS[fault])
    process()
