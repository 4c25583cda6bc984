"""The Markdown pages that people read, their code, and how it runs: to the letter, from top to bottom."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FOLLOWED = [ROOT / "docs" / "start.md", ROOT / "docs" / "recipes.md", *sorted((ROOT / "docs" / "tutorials").glob("*.md"))]
"""Pages whose commands are followed too"""
SERIES = [ROOT / "docs" / "tutorials" / f"{name}.md" for name in ("your-text", "book", "context", "lora")]
"""Tutorials that are followed in one folder: the first makes the model of the others"""

_BLOCK = re.compile(r"^```(python|bash|cpp)\n(.*?)^```$", re.S | re.M)
_FILE = re.compile(r"^(?:#|//) ([\w.]+\.(?:py|cpp))\n")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and text of each block of code, in order."""
    return blocks_of(page.read_text())


def blocks_of(text: str) -> list[tuple[str, str]]:
    return _BLOCK.findall(text)


def has_commands(page: Path) -> bool:
    return page in FOLLOWED and any(language == "bash" for language, _ in blocks(page))


def has_examples(page: Path) -> bool:
    return any(language == "python" for language, _ in blocks(page))


def follow(page: Path, folder: Path) -> None:
    """Runs the page's code in a folder. A block that begins with a file's name is saved; a later one may use earlier names."""
    scope = {"__name__": page.stem}
    for language, code in blocks(page):
        if named := _FILE.match(code):
            (folder / named[1]).write_text(code)
        elif language == "python":
            exec(compile(code, name_of(page), "exec"), scope)
        elif language == "bash" and page in FOLLOWED:
            _run(code, folder)


def _run(commands: str, folder: Path) -> None:
    """Runs shell commands in which `python` is this one."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    done = subprocess.run(
        ["bash", "-e", "-c", commands], cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{commands}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
