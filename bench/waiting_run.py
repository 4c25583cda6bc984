"""The process of `bench_waiting`: answers each line on standard input, a number of steps to take, with their losses."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import megalodon_ops
import torch
from megalodon_ops.cli.arguments import parse
from megalodon_ops.cli.data import load_corpus
from megalodon_ops.cli.settings import resolve
from megalodon_ops.cli.train import Trainer
from megalodon_ops.training import Metrics
from megalodon_ops.training.team import Team


def main() -> None:
    megalodon_ops.keep_freed_memory()  # as the command line does
    with tempfile.TemporaryDirectory() as folder:
        settings, _ = resolve(parse(["train"]), Path(folder, "run"))
        corpus = load_corpus(settings.data)
        with Metrics(Path(folder, "metrics.jsonl")) as metrics:
            for line in sys.stdin:
                if line == "start over\n":
                    trainer = Trainer(settings, corpus, torch.device(settings.device), metrics, None, Team())
                    print(flush=True)
                else:
                    print(*(trainer.train_step(trainer.batches.next())["loss"] for _ in range(int(line))), flush=True)


if __name__ == "__main__":
    main()
