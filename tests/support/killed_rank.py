"""A process that torchrun starts: a command that is killed, in rank 0, at its second step."""

from __future__ import annotations

import os
from typing import Any

from megalodon_ops.cli import process
from megalodon_ops.training import Reader

LOSS, losses = Reader.loss, []


def killed(reader: Reader, batch: Any) -> Any:
    if losses:
        os.kill(os.getpid(), 9)
    losses.append(LOSS(reader, batch))
    return losses[-1]


if __name__ == "__main__":
    if os.environ["RANK"] == "0":
        Reader.loss = killed
    process()
