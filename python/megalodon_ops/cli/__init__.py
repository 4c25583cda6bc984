"""The command line. Each command is a module with `run(options)`; only `info` does without the extra `train`."""

from __future__ import annotations

import importlib
import io
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from megalodon_ops import extras, torchrun
from megalodon_ops.cli.errors import CommandError
from megalodon_ops.files import FileError
from megalodon_ops.ops.common.memory import keep_freed_memory
from megalodon_ops_startup import interruptible

OF_TRAIN = ("msgspec", "tqdm", "matplotlib", "tokenizers", "sentencepiece", "filelock")
EXTRAS = {**dict.fromkeys(OF_TRAIN, "train"), "tensorboard": "tensorboard"}
"""Which extra brings a package"""
MODULES = {"eval": "evaluate", "plan": "plan_command", "tokenizer": "tokenizer_command"}
"""The modules of commands whose names are not theirs"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Exit code: 0 done, 2 a line on stderr says what to put right, 128 + n stopped by signal n."""
    for stream in (sys.stdout, sys.stderr):  # a character that the encoding lacks is shown as an escape
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    words = list(sys.argv[1:] if arguments is None else arguments)
    name = words[0] if words else ""
    logging.getLogger("megalodon_ops").addHandler(_WARNINGS)
    keep_freed_memory()
    try:
        command, options = _chosen(words)
        with interruptible():
            code = command(options)
            sys.stdout.flush()  # if the reader has gone, this raises here and not at the interpreter's end
            return code
    except BrokenPipeError:  # `... generate | head`: the reader has gone, so output still buffered is thrown away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        return _say_why(name, CommandError(extras.missing(package, EXTRAS[package])))
    except (CommandError, FileError, FloatingPointError, OSError) as error:
        return _say_why(name, error)
    except RuntimeError as error:
        if not torchrun.is_of_another_process(error):
            raise
        lost = "another process of the run has ended, or has not answered within --timeout"
        return _say_why(name, CommandError(f"{lost}: {torchrun.first_line(error)}"), first=False)


def _say_why(name: str, error: Exception, first: bool = True) -> int:
    """Shows an error of a command in one line, unless another process of it has shown what this one comes from."""
    from megalodon_ops.cli.processes import is_one_of_several, says_why

    if (line := says_why(error)) is not None:
        begin = "\n" if is_one_of_several() else ""  # the first process's bar may stand in the line
        print(f"{begin}megalodon_ops {name}: error: {line}", file=sys.stderr, flush=True)
    torchrun.tell(line or torchrun.FOLLOWS, first=first and line is not None)
    return 2


def process() -> NoReturn:
    """Runs the command of this process, and ends the process.

    One process of several ends at once, so that no thread and no connection keeps it which waits for one that is gone.
    """
    from megalodon_ops.cli.processes import is_one_of_several, says_why

    if not is_one_of_several():
        raise SystemExit(main())
    code: Any = 1
    try:
        code = main()
    except SystemExit as end:
        code = end.code
    except Exception as error:
        if first := says_why(error) is not None:
            traceback.print_exc()
        torchrun.tell(f"{type(error).__name__}: {error}" if first else torchrun.FOLLOWS, first=first)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _chosen(words: list[str]) -> tuple[Callable[[Any], int], Any]:
    """The function that runs the command, and its options."""
    if words == ["info"]:
        return importlib.import_module("megalodon_ops.cli.info").run, None
    from megalodon_ops.cli.flags import parse
    from megalodon_ops.cli.options import COMMANDS

    name, options = parse(words, COMMANDS)
    return importlib.import_module(f"megalodon_ops.cli.{MODULES.get(name, name)}").run, options


class _Warnings(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        print(f"megalodon_ops: {record.getMessage()}", file=sys.stderr)


_WARNINGS = _Warnings()
