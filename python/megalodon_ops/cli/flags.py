"""Convert a command line to a command's dataclass.

A field of a command's dataclass (options.py) is a flag. argparse splits the line; msgspec checks the values against the
fields' types and bounds, as for the options in a checkpoint.
"""

from __future__ import annotations

import argparse
import codecs
import dataclasses
import inspect
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, NoReturn

import msgspec
from msgspec.inspect import BoolType, FloatType, IntType, LiteralType, Metadata, NoneType, UnionType, VarTupleType

from megalodon_ops import __version__, torchrun
from megalodon_ops.ops.common.checks import did_you_mean, short_text

REQUIRED = MISSING


def flag(default: Any, help_text: str, **settings: Any) -> Any:
    """Field of a flag: default, help, and settings of argparse's `add_argument`; `positional`: without a `--name`."""
    return dataclasses.field(default=default, metadata={"help": help_text, **settings})


@dataclass
class Options:
    """Options of a command. `given` holds the names of the fields that the user has set."""

    def __post_init__(self) -> None:
        self.given: frozenset[str] = frozenset()


class Mesh(dict):
    """Sizes of a mesh's dimensions, parsed from text such as data=2,chunk=2."""

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


class Amount(int):
    """A number such as 50M or 8GB."""

    def __new__(cls, text: str) -> Amount:
        found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)B?", text, re.ASCII | re.IGNORECASE)
        amount = float(found[1]) * 1000 ** " KMGT".index(found[2].upper() or " ") if found else 0
        if amount < 1:
            raise ValueError("must be a number such as 50M or 8GB")
        return super().__new__(cls, min(amount, 2**62))


class Encoding(str):
    """The name of an encoding of text."""

    def __new__(cls, text: str) -> Encoding:
        try:
            return super().__new__(cls, codecs.lookup(text).name)
        except LookupError:
            raise ValueError("must be an encoding of Python's codecs, such as cp1252 or utf-16") from None


def convert(values: Mapping[str, Any], kind: type, *, strict: bool = True) -> Any:
    """Convert values to `kind`, or raise a msgspec.ValidationError; if not `strict`, values may be strings."""
    return msgspec.convert(values, kind, strict=strict, dec_hook=_construct)


def _construct(kind: type, value: Any) -> Any:
    if kind is Path and value == "":
        raise ValueError("must name a file or a folder")
    return kind(value)


def flag_of(name: str) -> str:
    return f"--{name.strip('_').replace('_', '-')}"


def parse(words: Sequence[str] | None, commands: Mapping[str, type[Options]]) -> tuple[str, Options]:
    """Return a command line's command and its options; if the words are wrong, exit with a line on stderr."""
    style = dict(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    lines = {name: inspect.cleandoc(kind.__doc__).split("\n") for name, kind in commands.items()}
    first = "\n".join(f"  {examples[0]}" for _, _, *examples in lines.values())
    texts = dict(description="MEGALODON: train, evaluate, sample.", epilog=f"examples:\n{first}")
    parser = _Parser(prog="megalodon-ops", **texts, **style)
    parser.add_argument("--version", action="version", version=f"megalodon_ops {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar=f"{{{','.join(commands)}}}")
    parsers = {}
    for name, kind in commands.items():
        summary, _, *examples = lines[name]
        texts = dict(help=summary, description=summary, epilog="\n  ".join(["examples:", *examples]))
        parsers[name] = subparsers.add_parser(name, argument_default=argparse.SUPPRESS, **texts, **style)
        _add_flags(parsers[name], kind)
    if not words:
        parser.print_help()
        parser.exit()
    values = vars(parser.parse_args(words))
    name = values.pop("command")
    try:
        options = convert(values, commands[name], strict=False)
    except msgspec.ValidationError as error:
        parsers[name].error(fault(error, values))
    options.given = frozenset(values)
    return name, options


def _add_flags(parser: argparse.ArgumentParser, kind: type[Options]) -> None:
    """Add a dataclass's flags, grouped by the class that declares them and titled by its docstring."""
    types = {field.name: field.type for field in msgspec.inspect.type_info(kind).fields}
    owner = {name: base for base in reversed(kind.__mro__) for name in getattr(base, "__annotations__", ())}
    groups: dict[Any, Any] = {kind: parser}
    for field in dataclasses.fields(kind):
        declaring = owner[field.name]
        settings = dict(field.metadata)
        if declaring not in groups:
            title, _, description = (declaring.__doc__ or "").partition(": ")
            groups[declaring] = parser.add_argument_group(title, description)
        group = groups[declaring]
        if not isinstance(field.default, (bool, type(None))) and field.default not in (MISSING, "", ()):
            default = " ".join(field.default) if isinstance(field.default, tuple) else field.default
            settings["help"] += f" ({default})"
        settings = {**_argparse(types[field.name], field.default), **settings}
        if settings.pop("positional", False):
            group.add_argument(field.name, **settings)
        else:
            if settings.get("action") == "append":
                del settings["nargs"]
            group.add_argument(flag_of(field.name), dest=field.name, required=field.default is MISSING, **settings)


def _argparse(kind: Any, default: Any) -> dict[str, Any]:
    """Return argparse's settings for a field's type; values stay strings, except those of switches and choices."""
    while isinstance(kind, (Metadata, UnionType)):
        types = kind.types if isinstance(kind, UnionType) else [kind.type]
        kind = next(one for one in types if not isinstance(one, NoneType))  # X of X | None
    if isinstance(kind, BoolType):
        return {"action": "store_true" if default is False else argparse.BooleanOptionalAction}
    if isinstance(kind, LiteralType):
        return {"choices": kind.values}
    if isinstance(kind, VarTupleType):
        return {**_argparse(kind.item_type, None), "nargs": "+"}
    metavars = {IntType: "N", FloatType: "X", Path: "PATH", Mesh: "data=N,chunk=M", Amount: "N"}
    return {"metavar": metavars.get(getattr(kind, "cls", type(kind)), "TEXT")}


def fault(error: msgspec.ValidationError, values: Mapping[str, Any]) -> str:
    """Rewrite msgspec's error, such as "Expected `int`, got `str` - at `$.steps`", with the flag and its value."""
    message, _, path = str(error).partition(" - at `$.")
    name, _, index = path.rstrip("`]").partition("[")
    value = values[name][int(index)] if index else values[name]
    if message.startswith("Invalid enum"):
        message = "must be a whole number, or a word that --help names"
    message = message.partition(", got")[0].replace("Expected", "must be").replace(" | null", "")
    for kind, words in {"`int`": "a whole number", "`float`": "a number", "`str` of length >= 1": "text"}.items():
        message = message.replace(kind, words)
    return f"{flag_of(name)}: {message}, got {short_text(value)}"


class _Parser(argparse.ArgumentParser):
    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            error.message += did_you_mean(value, map(str, action.choices))
            raise

    def error(self, message: str) -> NoReturn:
        is_rank0 = os.environ.get("RANK", "0") == "0"  # all ranks have the same arguments
        name = self.prog.replace("megalodon-ops", "megalodon_ops")  # as in every error
        torchrun.report_failure(message)
        self.exit(2, f"{name}: error: {message}\n" if is_rank0 else None)

    def parse_known_args(self, args=None, namespace=None):
        """Refuse unknown arguments in a command's own parser, which knows the command's flags."""
        options, unknown = super().parse_known_args(args, namespace)
        if unknown:
            near = did_you_mean(unknown[0].partition("=")[0], self._option_string_actions)
            fix = near or f"; {self.prog} --help lists the flags"
            self.error(f"unrecognized arguments: {' '.join(unknown)}{fix}")
        return options, unknown
