"""The command line. Each command is a module with `run(options)`; only `info` does without the extra `train`."""

from __future__ import annotations

import importlib
import io
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from megalodon_ops import extras, startup
from megalodon_ops.cli import launch
from megalodon_ops.cli.arguments import parse
from megalodon_ops.cli.errors import CommandError
from megalodon_ops.errors import FileError, TeamLost, UserFault
from megalodon_ops.ops.memory import keep_freed_memory

COMMANDS = {
    "info": "info", "train": "train", "eval": "evaluate", "generate": "generate", "convert": "convert",
    "tokenizer": "tokenizer", "tokenize": "tokenize", "plan": "plan",
}  # fmt: skip
EXTRA = {"numpy", "safetensors", "tqdm", "matplotlib", "tokenizers", "sentencepiece"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Exit code: 0 done, 2 a line on stderr says what to put right, 128 + n stopped by signal n."""
    for stream in (sys.stdout, sys.stderr):  # a character that the encoding lacks is shown as an escape
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    options = parse(arguments)
    logging.getLogger("megalodon_ops").addHandler(_WARNINGS)
    keep_freed_memory()
    try:
        with _needing_the_extra():
            command = importlib.import_module(f"megalodon_ops.cli.{COMMANDS[options.command]}")
            with startup.interruptible():
                code = command.run(options)
                sys.stdout.flush()  # if the reader has gone, this raises here and not at the interpreter's end
                return code
    except BrokenPipeError:  # `... generate | head`: the reader has gone, so output still buffered is thrown away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (UserFault, FileError, FloatingPointError, OSError) as error:
        if launch.speaks_for(error):
            print(f"megalodon_ops {options.command}: error: {_text(error)}", file=sys.stderr, flush=True)
        if isinstance(error, TeamLost):  # what still waits for the lost process, in a thread, would wait long
            os._exit(2)
        return 2


class _Warnings(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        print(f"megalodon_ops: {record.getMessage()}", file=sys.stderr)


_WARNINGS = _Warnings()


def _text(error: Exception) -> str:
    return f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)


@contextmanager
def _needing_the_extra() -> Iterator[None]:
    """Inside the block, a package that is missing and belongs to the extra `train` is a CommandError."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRA:
            raise
        raise CommandError(extras.missing(package, "train")) from error
