"""What a process of several tells torchrun, whose last words are the failure that it takes for the first."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path

SEEN = 2.0
"""Seconds in which torchrun, which looks ten times a second, has seen that a process has ended, and ends the others"""
FOLLOWS = "another process has ended, or does not answer"


def tell(line: str, *, first: bool = True) -> None:
    """Leaves a line on why this process ends where torchrun looks, if torchrun has started it.

    A process that ends because another has failed or was killed (not `first`) waits, so that its end is the later one.
    """
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        if not first:
            time.sleep(SEEN)
        failure = {"message": line.partition("\n")[0], "extraInfo": {"timestamp": str(int(time.time()))}}
        Path(file).write_text(json.dumps({"message": failure}))


def is_of_another_process(error: BaseException) -> bool:
    """Whether torch says in an error that another process has ended, or does not answer."""
    words = ("gloo", "NCCL", "onnection", "imed out", "ime-out", "timeout", "Broken pipe")
    several = "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1
    return several and isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def first_line(error: BaseException) -> str:
    """The first line of what torch says, without the place in gloo's source and gloo's guesses."""
    return re.sub(r"^\[\S+:\d+\] |\. This is typically .*", "", str(error).strip().partition("\n")[0])[:300]
