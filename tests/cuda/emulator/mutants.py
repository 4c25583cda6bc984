"""Mutants of a kernel file, each of which some test should notice.

Barriers, waits for copies and commits are deleted; a wait may also leave one more group in flight. Conditions of `if`
and `?:` and operands of `&&` and `||` become constants. Loops take one more iteration.

A file can be rewritten to contain all of its mutants; a number chooses one at run time.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from emulator.source import CLOSING, OPENING, closing, loop_heads, without_comments

SYNCHRONISATION = r"(?:gpu::)?\b(?:__sync(?:threads|warp)|named_barrier|cp_async_(?:commit|wait))\b(?:<[^<>;]*>)?\("
# Ends of an operand of && and || and of the condition of ?:.
BOUNDARY = r"&&|\|\||\?|(?<!:):(?!:)|;|,|(?<![=<>!])=(?!=)|\breturn\b|[{}]"

# Written before each kernel file by device.py: the number of the active mutant, and functions that record mutants
# that would change a value.
SWITCH = """
extern "C" {
extern const int gpu_mutant;
void gpu_reached(int mutant);
bool gpu_value(int mutant, bool constant, bool value);
int gpu_turns(int mutant);
}
"""


@dataclass(frozen=True)
class Mutant:
    line: int
    change: str  # for the table
    text: str  # whole file
    start: int  # text[start:end] of the original is replaced by `new`
    end: int
    new: str


def mutants(text: str) -> list[Mutant]:
    """All mutants of a kernel file, sorted by line."""
    code = without_comments(text)
    found = {}
    for start, end, new in _edits(code):
        changed = text[:start] + new + text[end:]
        if changed != text and not _is_constant(code, start):
            old = " ".join(text[start:end].split())
            change = f"`{old}` becomes `{new}`" if new else f"`{old}` deleted"
            found.setdefault(changed, Mutant(text.count("\n", 0, start) + 1, change, changed, start, end, new))
    return sorted(found.values(), key=lambda mutant: mutant.line)


def with_mutants(text: str, numbered: Iterable[tuple[int, Mutant]]) -> str:
    """The file with all these mutants, line for line; it behaves like the mutant with number gpu_mutant.

    gpu_mutant is declared as a constant, so that the emulator does not check reads of it.
    """
    code = without_comments(text)
    inserted = []
    for number, mutant in numbered:
        is_on = f"gpu_mutant == {number}"
        start, end = mutant.start, mutant.end
        if mutant.new == "":  # a call that returns nothing
            before, after = f"({is_on} ? void() : (gpu_reached({number}), ", "))"
        elif mutant.new in ("true", "false"):  # a condition
            before, after = f"({is_on} ? {mutant.new} : gpu_value({number}, {mutant.new}, bool(", ")))"
        elif mutant.new.endswith("<="):  # i <= n, of integers: i - 1 < n
            start = end = text.index(" <", start)
            before, after = f" - gpu_turns({number})", ""
        else:  # the argument of cp_async_wait<n>(): both calls of it, with n and with n + 1
            name = text.rindex("cp_async_wait", 0, start)
            start = name - len(re.search(r"(gpu::)?$", code[:name])[0])
            end = closing(code, text.index("(", end)) + 1
            changed = f"{text[start : mutant.start]}{mutant.new}{text[mutant.end : end]}"
            before, after = f"({is_on} ? {changed} : (gpu_reached({number}), ", "))"
        # At one place, ends (0) come before beginnings (1); inner expressions end before outer ones and begin after them.
        length = end - start
        inserted += [((start, 1, -length, number), before), ((end, 0, length, -number), after)]
    pieces, at = [], 0
    for (place, *_), piece in sorted(inserted):
        pieces += [text[at:place], piece]
        at = place
    return "".join([*pieces, text[at:]])


def _edits(code: str) -> Iterator[tuple[int, int, str]]:
    """Yield (start, end, replacement)."""
    for call in re.finditer(SYNCHRONISATION, code):
        end = closing(code, call.end() - 1) + 1
        if re.match(r"\s*;", code[end:]):
            yield call.start(), end, ""
    for wait in re.finditer(r"cp_async_wait<([^<>;]+)>", code):
        yield *wait.span(1), f"{wait[1]} + 1"
    for condition in re.finditer(r"\bif \(", code):
        end = closing(code, condition.end() - 1)
        leaves = re.match(r"\)\s*\{?\s*(return|continue|break)\b", code[end:])
        yield condition.end(), end, "false" if leaves else "true"
    for definition in re.finditer(r"\bbool (?=\w+ = )", code):
        at = definition.end()
        while name := re.compile(r"\s*\w+ = ").match(code, at):  # several definitions, separated by commas
            start, end = _right_operand(code, name.end(), r",(?=\s+\w+ = )|;")
            yield start, end, "true"
            at = end + 1
    loops = list(_loops(code))
    for operator in re.finditer(r"\s(&&|\|\|)\s", code):
        constant = "true" if operator[1] == "&&" else "false"
        for start, end in (_left_operand(code, operator.start(1)), _right_operand(code, operator.end(1))):
            words = set(re.findall(r"\w+", code[start:end]))
            if not any(first <= start < last and words & names for first, last, names in loops):
                yield start, end, constant  # a constant in place of a loop's bound would make it endless
    for choice in re.finditer(r"\s\?\s", code):
        start, end = _left_operand(code, choice.start() + 1, through_logic=True)
        yield start, end, "true"
        yield start, end, "false"
    for start, end, names in loops:
        for bound in re.finditer(r"\b(\w+) <(?=\s)", code[start:end]):
            if bound[1] in names:
                yield start + bound.start(), start + bound.end(), f"{bound[0]}="


def _loops(code: str) -> Iterator[tuple[int, int, set[str]]]:
    """Conditions of `for` loops that are not unrolled: start, end, names that the increment changes."""
    for start, end in loop_heads(code):
        first, *rest = code[start : end - 1].split(";")
        if first.startswith("for") and len(rest) == 2:
            condition = start + len(first) + 1
            yield condition, condition + len(rest[0]), set(re.findall(r"[A-Za-z_]\w*", rest[1]))


def _left_operand(code: str, end: int, through_logic: bool = False) -> tuple[int, int]:
    """The operand that ends before `end`; with `through_logic`, the whole chain of && and ||."""
    depth, start = 0, end
    while start > 0:
        character = code[start - 1]
        depth += (character in CLOSING) - (character in OPENING)
        if depth < 0 or depth == 0 and _boundary_before(code, start, through_logic):
            break
        start -= 1
    return _trimmed(code, start, end)


def _boundary_before(code: str, at: int, through_logic: bool) -> bool:
    if code[at - 1] == "{":  # its closing brace is in the operand
        return False
    if code[at - 1] in CLOSING:
        return code[at - 1] == "}" and not re.search(r"[\w>]\{[^{}]*\}$", code[:at])  # R{0} is part of an operand
    begin = max(0, at - 8)  # no boundary has more than 8 characters
    return any(
        match.end() == at - begin and not (through_logic and match[0] in ("&&", "||"))
        for match in re.finditer(BOUNDARY, code[begin : at + 1])
    )


def _right_operand(code: str, start: int, boundary: str = BOUNDARY) -> tuple[int, int]:
    depth, end = 0, start
    while end < len(code):
        depth += (code[end] in OPENING) - (code[end] in CLOSING)
        if depth < 0 or depth == 0 and code[end] not in CLOSING and re.compile(boundary).match(code, end):
            break
        end += 1
    return _trimmed(code, start, end)


def _trimmed(code: str, start: int, end: int) -> tuple[int, int]:
    inside = code[start:end]
    return start + len(inside) - len(inside.lstrip()), end - len(inside) + len(inside.rstrip())


def _is_constant(code: str, at: int) -> bool:
    """Return True if `at` is in a statement that the compiler evaluates."""
    start = max(code.rfind(c, 0, at) for c in ";{}") + 1
    size_of_array = r"^\s*(?!return\b)\w[\w:<>, ]* \w+\[[^=(]*$"
    return bool(re.search(rf"\b(constexpr|static_assert|template|using)\b|{size_of_array}", code[start:at]))
