"""Commands as processes of torchrun: the error file from which it reports the rank that failed first."""

import json
import os
import re
import time
from pathlib import Path

SHUTDOWN_DELAY = 2.0
"""Seconds in which torchrun, which polls every 0.1 s, notices that a process has ended, and stops the others"""
PEER_FAILURE = "another process has ended, or does not answer"


def is_distributed() -> bool:
    """Return True if a launcher has started this process as one of several."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def report_failure(line: str, *, is_root_cause: bool = True) -> None:
    """Write the reason why this process ends to torchrun's error file, if torchrun has started it.

    Unless this process is the root cause, it waits first, so that the one that failed first also ends first.
    """
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        if not is_root_cause:
            time.sleep(SHUTDOWN_DELAY)
        failure = {"message": line.partition("\n")[0], "extraInfo": {"timestamp": str(int(time.time()))}}
        Path(file).write_text(json.dumps({"message": failure}))


def is_peer_failure(error: BaseException) -> bool:
    """Return True if torch raised the error because another process has ended or does not answer."""
    # without first letters, which may be capitals
    words = ("gloo", "NCCL", "onnection", "imed out", "ime-out", "timeout", "Broken pipe")
    return is_distributed() and isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def first_line(error: BaseException) -> str:
    """Return the first line of torch's message, without gloo's source position and guesses."""
    return re.sub(r"^\[\S+:\d+\] |\. This is typically .*", "", str(error).strip().partition("\n")[0])[:300]


def error_line(error: Exception) -> str | None:
    """Return the line to print for an error; None if another process failed first."""
    text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
    if not is_distributed():
        return text
    import torch.distributed as dist

    try:
        # The first process that fails adds the first 1 to a counter that all share.
        is_root_cause = not dist.is_initialized() or dist.distributed_c10d._get_default_store().add("failed", 1) == 1
    except RuntimeError:  # the process that holds the store has ended
        is_root_cause = False
    return f"rank {os.environ['RANK']}: {text}" if is_root_cause else None
