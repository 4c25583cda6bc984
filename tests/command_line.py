"""Quick runs of the command line, for tests: a text, a finished run, and what is read of a run."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from megalodon_ops import Megalodon
from megalodon_ops.cli import main
from megalodon_ops.training import adamw, read_metrics, threads
from megalodon_ops.training.checkpoint import load_checkpoint, save_checkpoint
from megalodon_ops.training.record import Record

TINY = "--dim 32 --layers 2 --chunk 16 --batch 3 --length 24 --norm-groups 4 --warmup 5 --optimizer adamw --lr 0.01".split()


def train(text: Path, out: Path, *flags: object) -> int:
    return main(["train", "--data", str(text), "--out", str(out), *TINY, *map(str, flags)])


def shell(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "megalodon_ops", *map(str, arguments)]


def rows(out: Path) -> list[dict[str, Any]]:
    """The run's metrics without what the clock says."""
    return [
        {name: value for name, value in row.items() if "second" not in name}
        for row in read_metrics(out / "metrics.jsonl")
    ]


def overflow(run: Path, by: float = 1e30) -> None:
    """Makes the weights in a run's newest checkpoint larger: finite still, but by default with outputs that are not."""
    found = load_checkpoint(run)
    model = Megalodon(found.config)
    found.load_weights(model)
    optimizer = adamw(model, lr=1.0, weight_decay=0.0)
    found.load_optimizer(optimizer, model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(by)
    record = {name: value for name, value in found.record.items() if name not in Record.__struct_fields__}
    save_checkpoint(
        run, found.step, model, optimizer=optimizer, state=found.state, tokenizer=found.tokenizer(), record=record
    )


@contextmanager
def quick_commands() -> Iterator[None]:
    """Inside, commands have one thread, which is faster on models this small, and short samples end a run."""
    with pytest.MonkeyPatch.context() as patch, threads(1):
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr("megalodon_ops.cli.generate.SAMPLE", 20)
        yield


@pytest.fixture(scope="module")
def quick() -> Iterator[None]:
    with quick_commands():
        yield


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of about 20 KB of text."""
    folder = tmp_path_factory.mktemp("text")
    source = Path(argparse.__file__).read_bytes()
    for i in range(40):
        (folder / f"{i}.py").write_bytes(source[500 * i : 500 * (i + 1)])
    return folder


@pytest.fixture(scope="session")
def finished(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 60 steps. Tests that change a run take `ended`."""
    out = tmp_path_factory.mktemp("finished")
    with quick_commands():
        assert train(text, out, "--steps", 60, "--eval-every", 20, "--checkpoint-every", 25) == 0
    return out


@pytest.fixture
def ended(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(finished, tmp_path / "ended"))
