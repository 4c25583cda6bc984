"""Bits per byte of held-out text during a run and at its end."""

import logging
import math
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

from megalodon_ops import Megalodon
from megalodon_ops.cli.errors import CommandError
from megalodon_ops.cli.evaluate import as_documents
from megalodon_ops.cli.models import TrainRecord
from megalodon_ops.cli.processes import Processes
from megalodon_ops.evaluation import evaluate
from megalodon_ops.storage.files import FileError
from megalodon_ops.tokenizers import Tokenizer
from megalodon_ops.training import load_checkpoint
from megalodon_ops.training.record import RECORD
from megalodon_ops.training.run_checkpoint import BEST

EVAL_SAMPLE = (64, 2048)
"""Number of excerpts of held-out text that a run evaluates every --eval-every steps, and bytes of each"""


class Best(NamedTuple):
    """The evaluation of a run with the lowest bits per byte."""

    bits_per_byte: float = math.inf
    step: int = 0


def best_of_run(out: Path) -> Best:
    """Read the figure of a run's best checkpoint; ignore a damaged one with a warning."""
    folder = out / BEST
    if not os.path.lexists(folder):
        return Best()
    if not os.path.lexists(folder / RECORD):
        raise CommandError(f"--out {out}: {folder} is not a checkpoint; move it, as the run writes its best one there")
    try:
        checkpoint = load_checkpoint(folder)
        record = TrainRecord.of(folder, checkpoint.record)
    except (FileError, FileNotFoundError) as fault:
        logging.getLogger("megalodon_ops").warning("passing over %s", fault)
        return Best()
    figure = None if record is None else record.held_out_bits_per_byte
    return Best() if figure is None else Best(figure, checkpoint.step)


def document_share(documents: Sequence[bytes], processes: Processes) -> list[bytes]:
    """Return this process's documents: longest first, each goes to the process with the fewest bytes."""
    loads = [0] * processes.size
    own = []
    for document in sorted(documents, key=len, reverse=True):
        rank = loads.index(min(loads))
        loads[rank] += len(document)
        if rank == processes.rank:
            own.append(document)
    return own


def eval_sample(documents: Sequence[bytes]) -> list[bytes]:
    """Return excerpts at equal distances in the concatenated documents; if there is little text, all of it."""
    count, size = EVAL_SAMPLE
    text = b"".join(documents)
    if len(text) <= count * size:
        return list(documents)
    begins = (number * len(text) // count for number in range(count))
    return [text[begin : begin + size] for begin in begins]


def bits_per_byte(
    model: Megalodon,
    tokenizer: Tokenizer,
    documents: Sequence[bytes],
    autocast: AbstractContextManager,
    processes: Processes,
    read: Callable[[int], object] = lambda _: None,
) -> float:
    """Return the bits per byte of documents, which the processes share; `read` is told the bytes of each read."""
    nats = 0.0
    if own := as_documents(document_share(documents, processes), tokenizer, read):
        with autocast:
            (result,) = evaluate(model, own, contexts=["all"])
        nats = result.nats
    return math.fsum(processes.gather(nats)) / math.log(2) / sum(map(len, documents))
