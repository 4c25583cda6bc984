"""A process that torchrun starts: a command that fails, or is killed, in one of the processes, at its second step.

FAILS=backward FAILING_RANK=1 torchrun ... failing_rank.py train --data ...
"""

from __future__ import annotations

import os
from typing import Any

from megalodon_ops.cli import process
from megalodon_ops.training import Reader

LOSS, losses = Reader.loss, []


def broken(reader: Reader, batch: Any) -> Any:
    if len(losses) == 1 and os.environ["FAILS"] == "killed":
        os.kill(os.getpid(), 9)
    losses.append(LOSS(reader, batch))
    if len(losses) == 2:
        losses[-1].register_hook(lambda gradient: 1 / 0)
    return losses[-1]


if __name__ == "__main__":
    if os.environ["RANK"] == os.environ["FAILING_RANK"]:
        Reader.loss = broken
    process()
