"""A process that torchrun starts: a command, whose second backward fails in rank 1.

torchrun ... failing_rank.py train --data ...
"""

from __future__ import annotations

import os
from typing import Any

from megalodon_ops.cli import process
from megalodon_ops.training import Reader

LOSS, losses = Reader.loss, []


def broken(reader: Reader, batch: Any) -> Any:
    losses.append(LOSS(reader, batch))
    if len(losses) == 2:
        losses[-1].register_hook(lambda gradient: 1 / 0)
    return losses[-1]


if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        Reader.loss = broken
    process()
