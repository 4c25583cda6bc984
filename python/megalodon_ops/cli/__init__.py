"""The command line. Each command is a module with `run(options)`; all but `info` need the extra `train`."""

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
from megalodon_ops.storage.files import FileError
from megalodon_ops.ops.common.memory import keep_freed_memory
from megalodon_ops_startup import interruptible

TRAIN_PACKAGES = ("msgspec", "tqdm", "matplotlib", "tokenizers", "sentencepiece", "filelock")
EXTRAS = dict.fromkeys(TRAIN_PACKAGES, "train") | dict(tensorboard="tensorboard", pyarrow="data", backports="data")
EXTRAS |= dict.fromkeys(("onnx", "onnxscript", "onnxruntime"), "onnx")
"""Package -> the extra that installs it"""
MODULES = {"eval": "evaluate", "plan": "plan_command", "tokenizer": "tokenizer_command"}
"""Command -> its module, if the names differ"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0: done. 2: an error that the user can fix; one line on stderr describes it. 128 + n: stopped by signal n.
    """
    for stream in (sys.stdout, sys.stderr):  # escape characters that the encoding lacks
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    words = list(sys.argv[1:] if arguments is None else arguments)
    name = words[0] if words else ""
    logging.getLogger("megalodon_ops").addHandler(_WARNINGS)
    keep_freed_memory()
    try:
        command, options = _parse_command(words)
        with interruptible():
            code = command(options)
            sys.stdout.flush()  # raises here, not at interpreter exit, if the reader has gone
            return code
    except BrokenPipeError:  # `... generate | head`: drop output that is still buffered
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        return _show_error(name, CommandError(extras.missing(package, EXTRAS[package])))
    except (CommandError, FileError, FloatingPointError, OSError) as error:
        return _show_error(name, error)
    except RuntimeError as error:
        if not torchrun.is_peer_failure(error):
            raise
        lost = "another process of the run has ended, or has not answered within --timeout"
        return _show_error(name, CommandError(f"{lost}: {torchrun.first_line(error)}"), is_root_cause=False)


def _show_error(name: str, error: Exception, is_root_cause: bool = True) -> int:
    """Print an error in one line, unless another process has printed its cause."""
    if (line := torchrun.error_line(error)) is not None:
        begin = "\n" if torchrun.is_distributed() else ""  # rank 0's progress bar may be in this line
        print(f"{begin}megalodon_ops {name}: error: {line}", file=sys.stderr, flush=True)
    torchrun.report_failure(line or torchrun.PEER_FAILURE, is_root_cause=is_root_cause and line is not None)
    return 2


def process() -> NoReturn:
    """Run the command and end the process; one of several does not wait for its threads and connections."""
    if not torchrun.is_distributed():
        raise SystemExit(main())
    code: Any = 1
    try:
        code = main()
    except SystemExit as end:
        code = end.code
    except Exception as error:
        is_root_cause = torchrun.error_line(error) is not None
        if is_root_cause:
            traceback.print_exc()
        line = f"{type(error).__name__}: {error}" if is_root_cause else torchrun.PEER_FAILURE
        torchrun.report_failure(line, is_root_cause=is_root_cause)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _parse_command(words: list[str]) -> tuple[Callable[[Any], int], Any]:
    """Return the function that runs the command, and its options."""
    if words == ["info"]:
        return importlib.import_module("megalodon_ops.cli.info").run, None
    from megalodon_ops.cli.flags import parse
    from megalodon_ops.cli.options import COMMANDS

    name, options = parse(words, COMMANDS)
    if getattr(options, "dry_run", False):
        return importlib.import_module("megalodon_ops.cli.data").list_files, options
    return importlib.import_module(f"megalodon_ops.cli.{MODULES.get(name, name)}").run, options


class _Warnings(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:  # to the current sys.stderr
        print(f"megalodon_ops: {record.getMessage()}", file=sys.stderr)


_WARNINGS = _Warnings()
