"""Process of `bench_waiting`: for each number of steps on standard input, take them and print their losses."""

import sys
from collections.abc import Iterator
from pathlib import Path

import megalodon_ops as mo
import torch
from megalodon_ops.cli.data import load_corpus
from megalodon_ops.cli.flags import parse
from megalodon_ops.cli.options import COMMANDS
from megalodon_ops.cli.settings import new_run
from megalodon_ops.training import Batches, Corpus, Muon, Reader, optimizer_threads, threads


def steps(corpus: Corpus) -> Iterator[float]:
    """Losses of the default run's steps, at the peak learning rate."""
    options, config, tokenizer, _ = new_run(parse(["train"], COMMANDS)[1], Path("run"))
    torch.manual_seed(options.seed)
    model = mo.Megalodon(config).train()
    optimizer = Muon(model, lr=options.lr, weight_decay=options.weight_decay)
    order = dict(start=tokenizer.start, seed=options.seed, context_length=options.context_length)
    batches = Batches(corpus.train, options.batch, options.length, **order)
    reader = Reader(model)
    while True:
        loss = reader.loss(batches.next())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        with threads(optimizer_threads(model)):
            optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


def main() -> None:
    mo.keep_freed_memory()  # as the command line does
    corpus = load_corpus(None)
    for line in sys.stdin:
        if line == "restart\n":
            losses = steps(corpus)
            print(flush=True)
        else:
            print(*(next(losses) for _ in range(int(line))), flush=True)


if __name__ == "__main__":
    main()
