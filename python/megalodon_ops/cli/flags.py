"""From a dataclass to a command line, and from its words to the dataclass.

A field of a command's dataclass (options.py) is a flag. The standard library's argparse reads a line; msgspec checks the
words by the fields' types and bounds, as it checks what a checkpoint has recorded.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, NoReturn

import msgspec
from msgspec.inspect import BoolType, FloatType, IntType, LiteralType, Metadata, NoneType, UnionType, VarTupleType

from megalodon_ops import __version__, torchrun
from megalodon_ops.ops.common.checks import shown

REQUIRED = MISSING


def flag(default: Any, meaning: str, **how: Any) -> Any:
    """A field that is a flag: its default, its help, and what else argparse's `add_argument` takes.

    `positional=True` does without `--name`.
    """
    return dataclasses.field(default=default, metadata={"help": meaning, **how})


@dataclass
class Options:
    """The options of a command. `given` has the names of the fields that the user has named."""

    def __post_init__(self) -> None:
        self.given: frozenset[str] = frozenset()


class Mesh(dict):
    """Sizes of a mesh's dimensions, from text such as data=2,chunk=2."""

    def __init__(self, text: str) -> None:
        for word in text.split(","):
            name, _, size = word.partition("=")
            if name not in ("data", "chunk", "tensor") or name in self or not size.isascii() or not size.isdigit():
                raise ValueError("must be sizes of data, chunk and tensor such as data=2,chunk=2")
            self[name] = int(size[:10])
        if 0 in self.values():
            raise ValueError("must have sizes of at least 1")

    def __str__(self) -> str:
        return ",".join(f"{name}={size}" for name, size in self.items())


def convert(values: Mapping[str, Any], kind: type, *, strict: bool = True) -> Any:
    """An object of values, which are strings of a command line where not `strict`; a fault is a msgspec.ValidationError."""
    return msgspec.convert(values, kind, strict=strict, dec_hook=_made)


def _made(kind: type, value: Any) -> Any:
    if kind is Path and value == "":
        raise ValueError("must name a file or a folder")
    return kind(value)


def flag_of(name: str) -> str:
    """The flag of a field."""
    return f"--{name.strip('_').replace('_', '-')}"


def parse(words: Sequence[str] | None, commands: Mapping[str, type[Options]]) -> tuple[str, Options]:
    """The name of the command that the words give, and its options; exits with a line on stderr where they don't fit."""
    style = dict(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    first = "\n".join(_examples(kind)[0] for kind in commands.values())
    texts = dict(description="MEGALODON: train, evaluate, sample.", epilog=f"examples:\n{first}")
    parser = _Parser(prog="python -m megalodon_ops", **texts, **style)
    parser.add_argument("--version", action="version", version=f"megalodon_ops {__version__}")
    below = parser.add_subparsers(dest="command", required=True, metavar=f"{{{','.join(commands)}}}")
    parsers = {}
    for name, kind in commands.items():
        summary = _lines(kind)[0]
        texts = dict(help=summary, description=summary, epilog="\n".join(["examples:", *_examples(kind)]))
        parsers[name] = below.add_parser(name, argument_default=argparse.SUPPRESS, **texts, **style)
        _add_flags(parsers[name], kind)
    found = vars(parser.parse_args(words))
    name = found.pop("command")
    try:
        options = convert(found, commands[name], strict=False)
    except msgspec.ValidationError as error:
        parsers[name].error(fault(error, found))
    options.given = frozenset(found)
    return name, options


def _add_flags(parser: argparse.ArgumentParser, kind: type[Options]) -> None:
    """Adds the flags of a dataclass, each in the group of the class that declares it, named by that class's docstring."""
    types = {field.name: field.type for field in msgspec.inspect.type_info(kind).fields}
    owner = {name: base for base in reversed(kind.__mro__) for name in getattr(base, "__annotations__", ())}
    groups: dict[Any, Any] = {kind: parser}
    for field in dataclasses.fields(kind):
        of_class, how = owner[field.name], dict(field.metadata)
        if of_class not in groups:
            title, _, description = (of_class.__doc__ or "").partition(": ")
            groups[of_class] = parser.add_argument_group(title, description)
        group = groups[of_class]
        if not isinstance(field.default, (bool, type(None))) and field.default not in (MISSING, "", ()):
            default = " ".join(field.default) if isinstance(field.default, tuple) else field.default
            how["help"] += f" ({default})"
        how = {**_argparse(types[field.name], field.default), **how}
        if how.pop("positional", False):
            group.add_argument(field.name, **how)
        else:
            if how.get("action") == "append":
                del how["nargs"]
            group.add_argument(flag_of(field.name), dest=field.name, required=field.default is MISSING, **how)


def _argparse(kind: Any, default: Any) -> dict[str, Any]:
    """What argparse must know of a field's type: to it, words are strings, but for switches and choices."""
    while isinstance(kind, (Metadata, UnionType)):
        union = isinstance(kind, UnionType)  # with None
        kind = next(one for one in kind.types if not isinstance(one, NoneType)) if union else kind.type
    if isinstance(kind, BoolType):
        return {"action": "store_true" if default is False else argparse.BooleanOptionalAction}
    if isinstance(kind, LiteralType):
        return {"choices": kind.values}
    if isinstance(kind, VarTupleType):
        return {**_argparse(kind.item_type, None), "nargs": "+"}
    return {
        "metavar": {IntType: "N", FloatType: "X", Path: "PATH", Mesh: "data=N,chunk=M"}.get(
            getattr(kind, "cls", type(kind)), "TEXT"
        )
    }


def fault(error: msgspec.ValidationError, found: Mapping[str, Any]) -> str:
    """What msgspec says of one of the values, with the flag's name and what was given."""
    said, _, path = str(error).partition(" - at `$.")
    name, _, index = path.rstrip("`]").partition("[")
    value = found[name][int(index)] if index else found[name]
    if said.startswith("Invalid enum"):
        said = "must be a whole number, or a word that --help names"
    said = said.partition(", got")[0].replace("Expected", "must be").replace(" | null", "")
    for kind, words in {"`int`": "a whole number", "`float`": "a number", "`str` of length >= 1": "text"}.items():
        said = said.replace(kind, words)
    return f"{flag_of(name)}: {said}, got {shown(value)}"


def _lines(kind: type[Options]) -> list[str]:
    return [line.strip() for line in (kind.__doc__ or "").splitlines() if line.strip()]


def _examples(kind: type[Options]) -> list[str]:
    """The examples in a docstring: the lines that follow the first."""
    return [f"  {line}" for line in _lines(kind)[1:]]


class _Parser(argparse.ArgumentParser):
    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            near = difflib.get_close_matches(str(value), map(str, action.choices), n=1)
            error.message += f"; did you mean {near[0]}?" if near else ""
            raise

    def error(self, message: str) -> NoReturn:
        first = os.environ.get("RANK", "0") == "0"  # of the processes of torchrun, which all have the same arguments
        name = self.prog.removeprefix("python -m ")
        torchrun.tell(message)
        self.exit(2, f"{name}: error: {message}\n" if first else None)

    def parse_known_args(self, args=None, namespace=None):
        """Refuses what this parser does not know here, where a command knows its flags, and not in the parser of commands."""
        options, unknown = super().parse_known_args(args, namespace)
        if unknown:
            near = difflib.get_close_matches(unknown[0].partition("=")[0], self._option_string_actions, n=1, cutoff=0.7)
            fix = f"did you mean {near[0]}?" if near else f"{self.prog} --help says what there is"
            self.error(f"unrecognized arguments: {' '.join(unknown)}; {fix}")
        return options, unknown
