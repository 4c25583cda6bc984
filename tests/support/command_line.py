"""Quick runs of the command line for tests: a text, a finished run, and a run's metrics."""

import argparse
import gc
import multiprocessing
import os
import re
import shlex
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from megalodon_ops import Megalodon
from megalodon_ops.cli import main, process
from megalodon_ops.training import adamw, read_metrics, threads
from megalodon_ops.training.run_checkpoint import load_checkpoint, save_checkpoint
from megalodon_ops.training.curve import draw_metrics
from megalodon_ops.training.record import Record

TINY = "--dim 32 --layers 2 --chunk 16 --batch 3 --length 24 --norm-groups 4 --warmup 5 --optimizer adamw --lr 0.01".split()


def train(text: Path, out: Path, *flags: object) -> int:
    return main(["train", "--data", str(text), "--out", str(out), *TINY, *map(str, flags)])


def shell(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "megalodon_ops", *map(str, arguments)]


def output(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that succeeds, and return what it prints."""
    assert main([*map(str, arguments)]) == 0
    return capsys.readouterr().out


def evaluated_bits(capsys: pytest.CaptureFixture[str], *arguments: object) -> float:
    """The bits per byte that `eval` prints."""
    return float(output(capsys, "eval", *arguments).splitlines()[-1].split()[0])


def error_of(
    capsys: pytest.CaptureFixture[str], *arguments: object, has_bar: bool = False, prints: bool = False
) -> str:
    """Run a command that fails, and return the line with its error. Assert that it writes nothing else, except:

    has_bar: progress bars and messages about the data; prints: results.
    """
    capsys.readouterr()
    try:
        code = main([*map(str, arguments)])
    except SystemExit as end:  # argparse leaves this way
        code = end.code
    out, err = capsys.readouterr()
    (line,) = lines_of(err)
    assert code == 2 and line.startswith("megalodon_ops"), (code, line)
    assert (prints or out == "") and (has_bar or err.count("\n") == 1), (out, err)
    return line


def lines_of(text: str) -> list[str]:
    """The lines of a text without progress bars and the message about the data."""
    skipped = re.compile(r"%\||B/s|\d(step/s|s/step)|megalodon_ops: taking ")
    return [line for line in text.splitlines() if line.strip() and not skipped.search(line)]


def refusals(table: str) -> pytest.MarkDecorator:
    """Parametrize a test by cases "command => words of its error"; the words may stand on a line of their own."""
    cases = re.findall(r"^ *(\S.*?)\s+=> (.+)$", table, re.M)
    return pytest.mark.parametrize(("command", "words"), cases, ids=[command for command, _ in cases])


def assert_refused(capsys: pytest.CaptureFixture[str], command: str, words: str, **paths: object) -> None:
    """Assert that a command fails with these words; {name} in both stands for a path."""

    def filled(text: str) -> str:
        return re.sub(r"\{(\w+)\}", lambda found: str(paths.get(found[1], found[0])), text)

    assert filled(words) in error_of(capsys, *map(filled, shlex.split(command)))


class Forked(multiprocessing.get_context("fork").Process):
    """`megalodon-ops` with these arguments, forked from this process, so it need not import torch."""

    def __init__(
        self, *arguments: object, stdin: bytes = b"", encoding: str = "utf-8", folder: Path | None = None
    ) -> None:
        super().__init__()
        self._arguments = [*map(str, arguments)]
        self._encoding = encoding
        self._folder = folder
        self._stdin = tempfile.TemporaryFile()
        self._stderr = tempfile.TemporaryFile()
        self._stdin.write(stdin)
        self._stdin.seek(0)
        self._read_end, self._write_end = os.pipe()  # of stdout
        self.stdout = open(self._read_end, "rb", buffering=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks of a process with threads
            self.start()
        os.close(self._write_end)

    def run(self) -> None:
        gc.freeze()  # garbage may own threads that only the parent has; collecting it here would wait for them
        os.close(self._read_end)
        for number, file in enumerate((self._stdin.fileno(), self._write_end, self._stderr.fileno())):
            os.dup2(file, number)
        os.close(self._write_end)
        sys.stdin = open(0, encoding=self._encoding)
        sys.stdout = open(1, "w", encoding=self._encoding)
        sys.stderr = open(2, "w", encoding=self._encoding)
        sys.argv[1:] = self._arguments
        if self._folder is not None:
            os.chdir(self._folder)
        process()

    def wait(self, timeout: float = 60) -> tuple[int | None, bytes]:
        """Exit code (-n after signal n, None if the process has not ended in time) and content of stderr."""
        self.join(timeout)
        self._stderr.seek(0)
        error = self._stderr.read()
        for file in (self._stdin, self.stdout, self._stderr):
            file.close()
        return self.exitcode, error


def rows(out: Path) -> list[dict[str, Any]]:
    """The run's metrics without times and rates."""
    metrics = read_metrics(out / "metrics.jsonl")
    return [{name: value for name, value in row.items() if "second" not in name} for row in metrics]


def overflow(run: Path, by: float = 1e30) -> None:
    """Scale the weights in a run's newest checkpoint: by default they stay finite, and the outputs overflow."""
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


def draw_nothing(path: Path, rows: list[dict[str, Any]], references: dict[str, float] | None = None) -> None:
    """Replacement of `draw_metrics`, which takes half the time of a short run."""
    path.write_bytes(b"no picture")


def hasten(patch: pytest.MonkeyPatch, draw: Callable[..., None] = draw_nothing) -> None:
    """Make commands faster: one thread, short samples, `draw` for curves, and no waiting for the disk."""
    patch.setenv("OMP_NUM_THREADS", "1")
    patch.setattr(os, "fsync", lambda file: None)
    patch.setattr("megalodon_ops.cli.train.draw_metrics", draw)
    patch.setattr("megalodon_ops.cli.generate.SAMPLE_TOKENS", 20)


@contextmanager
def quick_commands(draw: Callable[..., None] = draw_nothing) -> Iterator[None]:
    """Context in which commands of this process are fast, by :func:`hasten`."""
    with pytest.MonkeyPatch.context() as patch, threads(1):
        hasten(patch, draw)
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
    """A run of 60 steps with its loss curve. Tests that change a run take `ended`."""
    out = tmp_path_factory.mktemp("finished")
    with quick_commands(draw_metrics):
        assert train(text, out, "--steps", 60, "--eval-every", 20, "--checkpoint-every", 25) == 0
    return out


@pytest.fixture
def ended(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(finished, tmp_path / "ended"))
