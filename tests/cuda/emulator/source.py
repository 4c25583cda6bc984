"""Kernel files as text: comments, parentheses, loops."""

import re
from collections.abc import Iterator

OPENING, CLOSING = "([{", ")]}"


def without_comments(text: str) -> str:
    """The text with comments, strings and preprocessor lines replaced by spaces."""
    return re.sub(
        r'"(?:\\.|[^"\\\n])*"|//[^\n]*|/\*.*?\*/|^[ \t]*#(?:\\\n|[^\n])*',
        lambda token: re.sub(r"[^\n]", " ", token[0]),
        text,
        flags=re.DOTALL | re.MULTILINE,
    )


def closing(code: str, opening: int) -> int:
    """Index of the parenthesis that closes the one at `opening`."""
    depth = 0
    for i in range(opening, len(code)):
        depth += (code[i] in OPENING) - (code[i] in CLOSING)
        if depth == 0:
            return i
    raise ValueError(f"nothing closes the parenthesis at {opening}")


def loop_heads(code: str) -> Iterator[tuple[int, int]]:
    """Start and end of "for (...)" and "while (...)" of each loop that nvcc does not unroll."""
    for loop in re.finditer(r"(GPU_UNROLL\s+)?\b(for|while) \(", code):
        if not loop[1]:
            yield loop.start(2), closing(code, loop.end() - 1) + 1
