"""The Markdown pages and a runner of their code, from top to bottom.

A block of `text` shows the output of the code block before it: its lines must be printed in this order, possibly with
others in between. Words are compared exactly, times (12 ms) not at all, other numbers to 3 % or to the tolerance of the
block: "```text within 20 %". Python's own texts differ by version: "```text within 20 %, 60 % for another Python".
"""

import contextlib
import io
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from command_line import Forked
from paths import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FOLLOWED = [
    ROOT / "docs" / "start.md",
    ROOT / "docs" / "recipes.md",
    ROOT / "docs" / "elsewhere.md",
    *sorted((ROOT / "docs" / "tutorials").glob("*.md")),
]
"""Pages whose shell commands run, too"""
SERIES = [ROOT / "docs" / "tutorials" / f"{name}.md" for name in ("your-text", "book", "context", "lora")]
"""Tutorials that run in one folder: the first trains the model of the others"""

_PYTHON = (3, 11)
"""Version whose own texts gave the figures of the pages"""
_BLOCK = re.compile(
    r"^```(python|bash|cpp|text)(?: within (\d+) %(?:, (\d+) % for another Python)?)?\n(.*?)^```$", re.S | re.M
)
_SHELL = re.compile(r"[|<>$&;*`]")
_FILE = re.compile(r"^(?:#|//) ([\w.]+\.(?:py|cpp))\n")
_NUMBER = re.compile(r"(?<![\w.])(\d[\d,]*(?:\.\d+)?)( ?(?:ms|s|minutes?)\b)?")


class Block(NamedTuple):
    language: str
    code: str
    within: float  # relative tolerance of the numbers in a `text`


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[Block]:
    """The page's blocks of code and of text, in order."""
    return blocks_of(page.read_text())


def blocks_of(text: str) -> list[Block]:
    found, is_other = _BLOCK.findall(text), sys.version_info[:2] != _PYTHON
    return [Block(kind, code, int((is_other and other) or within or 3) / 100) for kind, within, other, code in found]


def has_commands(page: Path) -> bool:
    return page in FOLLOWED and any(block.language == "bash" for block in blocks(page))


def has_examples(page: Path) -> bool:
    return any(block.language == "python" for block in blocks(page))


def follow(page: Path, folder: Path) -> None:
    """Run the page's code in a folder, in one namespace; a block that begins with a file name is saved there."""
    scope, printed = {"__name__": page.stem}, ""
    for language, code, within in blocks(page):
        if language == "text":
            missing = first_missing(code, printed, within)
            assert missing is None, f"{name_of(page)} shows\n{missing}\nwhere its code prints\n{printed}"
        elif named := _FILE.match(code):
            (folder / named[1]).write_text(code)
        elif language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as output:
                exec(compile(code, name_of(page), "exec"), scope)
            printed = output.getvalue()
        elif language == "bash" and page in FOLLOWED:
            printed = _run(code, folder)


def first_missing(shown: str, printed: str, within: float) -> str | None:
    """The first line of `shown` that is not printed after the lines before it, if there is one."""
    lines = iter(printed.splitlines())  # one iterator: each search goes on after the last match
    return next((line for line in shown.splitlines() if not any(_match(line, other, within) for other in lines)), None)


def _match(shown: str, printed: str, within: float) -> bool:
    """Return True if two lines have the same words, and numbers within a tolerance."""
    if _NUMBER.sub("#", shown).split() != _NUMBER.sub("#", printed).split():
        return False
    pairs = zip(_NUMBER.findall(shown), _NUMBER.findall(printed), strict=True)
    numbers = [(float(a.replace(",", "")), float(b.replace(",", ""))) for (a, time), (b, _) in pairs if not time]
    return all(math.isclose(a, b, rel_tol=within) for a, b in numbers)


def _run(commands: str, folder: Path) -> str:
    """Run shell commands with this Python and return their output; `--minutes` is divided by 10.

    Commands of the package are forked from this process, which has already imported what most commands need.
    """
    import torch._dynamo  # imported by optimizers and by loaded models

    import megalodon_ops.cli.train  # imports the package that draws curves

    printed = ""
    commands = re.sub(r"(?<=--minutes )\d+", lambda minutes: str(int(minutes[0]) / 10), commands)
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    for command in commands.replace("\\\n", " ").splitlines():
        words = shlex.split(command, comments=True)
        if words[:1] == ["megalodon-ops"] and not _SHELL.search(command):
            started = Forked(*words[1:], folder=folder)
            out = started.stdout.readall()
            code, error = started.wait()
        else:
            environment = {**os.environ, "PATH": path}
            done = subprocess.run(["bash", "-e", "-c", command], cwd=folder, env=environment, capture_output=True)
            out, code, error = done.stdout, done.returncode, done.stderr
        assert code == 0, f"{command}\n{out.decode()[-2000:]}\n{error.decode()[-2000:]}"
        printed += out.decode() + error.decode()
    return printed
