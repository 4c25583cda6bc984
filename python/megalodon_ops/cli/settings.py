"""What a run is to do: the flags given, over those of the run it resumes or over the defaults."""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalodon_ops import MegalodonConfig
from megalodon_ops.cli import schema
from megalodon_ops.cli.arguments import DEFAULTS, MINUTES, RATE_TIMES_WIDTH, ROWS_OF_CONTEXT, flag_of
from megalodon_ops.cli.data import check_glob, tokens_folder
from megalodon_ops.cli.errors import CommandError
from megalodon_ops.cli.models import configured, read_tokenizer
from megalodon_ops.errors import FileError
from megalodon_ops.tokenizers import ByteTokenizer, Tokenizer
from megalodon_ops.training.checkpoint import Checkpoint, load_checkpoint
from megalodon_ops.training.run_folder import has_checkpoint
from megalodon_ops.training.team import Team

MAY_CHANGE = {"data", "glob", "tokenizer_file", "steps", "minutes", "eval_every", "checkpoint_every", "device"}
"""Flags a resumed run may be given anew (text and tokenizer are compared by content); the other flags decide its losses"""


_OF_THE_LAUNCH = ("command", "out", "resume", "mesh", "timeout")
"""Flags that say nothing of the run itself"""
_NO_OPTIONS = ("out", "config", "tokenizer")


@dataclass(frozen=True)
class Settings:
    out: Path
    config: MegalodonConfig
    tokenizer: Tokenizer
    data: list[str] | None
    """None: the standard library"""
    glob: list[str] | None
    """Patterns of the files to take of folders; None: files of text"""
    tokenizer_file: str | None
    """None: bytes"""
    steps: int | None
    minutes: float | None
    preset: str
    context: str
    batch: int
    length: int
    context_length: int | None
    """None: no document is cut but at a row's end, which is so where rows are packed"""
    optimizer: str
    lr: float
    warmup: int
    weight_decay: float
    clip: float
    seed: int
    device: str
    dtype: str
    eval_every: int
    checkpoint_every: int

    def record(self) -> dict[str, Any]:
        """All but `out` and what has files of its own in a checkpoint, as JSON."""
        return {name: value for name, value in vars(self).items() if name not in _NO_OPTIONS}


def run_folder(options: argparse.Namespace) -> Path:
    """The folder of the run; the folder of a run to resume must exist."""
    resume = getattr(options, "resume", False)
    if not hasattr(options, "out"):
        if resume:
            raise CommandError("--resume: name the folder of the run with --out DIR")
        return Path("runs", time.strftime("%Y%m%d-%H%M%S"))
    if resume and not options.out.is_dir():
        raise CommandError(f"--resume {options.out}: no such folder")
    return options.out


def resolve(options: argparse.Namespace, out: Path, team: Team | None = None) -> tuple[Settings, Checkpoint | None]:
    """The settings of the run in `out`, and the checkpoint if the run goes on from one; each process calls this function."""
    given = {name: value for name, value in vars(options).items() if name not in _OF_THE_LAUNCH}
    if "data" in given:
        given["data"] = [str(path.absolute()) for path in given["data"]]
    if "tokenizer_file" in given:
        given["tokenizer_file"] = str(given["tokenizer_file"].absolute())
    if not getattr(options, "resume", False):
        if has_checkpoint(out):
            raise CommandError(f"--out {out}: holds a run already; continue it with --resume, or name another folder")
        check_glob(given.get("glob"), given.get("data"))
        _check_apart(out, given.get("data") or [], given.get("glob"))
        nothing = {"data": None, "glob": None, "tokenizer_file": None}
        flags = {**DEFAULTS, **nothing, **_length(given, {}), **given}
        return _settings(out, flags, _tokenizer(flags["data"], flags["tokenizer_file"])), None
    try:
        saved = load_checkpoint(out, check=schema.check, team=team)
    except (FileError, FileNotFoundError) as error:
        raise CommandError(f"--resume {error}") from error
    before, config = saved.record["options"], saved.config.to_dict()
    for name, value in given.items():
        if name not in MAY_CHANGE and (old := {**config, **before}[name]) != value:
            raise CommandError(
                f"{flag_of(name)}: the run in {out} has {old}, got {value}; leave the flag out, or start another run"
            )
    tokenizer = saved.tokenizer() or ByteTokenizer()
    if file := given.get("tokenizer_file"):
        if read_tokenizer(Path(file)).fingerprint != tokenizer.fingerprint:
            raise CommandError(f"--tokenizer {file}: the run in {out} has another; leave the flag out")
    flags = {**before, **given, **_length(given, before)}
    check_glob(given.get("glob"), flags["data"])
    return _settings(out, flags, tokenizer, saved.config), saved


def _tokenizer(data: list[str] | None, file: str | None) -> Tokenizer:
    """The tokenizer of a folder of tokens; else that of a file, or the one of bytes."""
    given = None if file is None else read_tokenizer(Path(file))
    if (folder := tokens_folder(data)) is None:
        return given or ByteTokenizer()
    tokenizer = read_tokenizer(folder)
    if given is not None and given.fingerprint != tokenizer.fingerprint:
        raise CommandError(f"--tokenizer {file}: the tokens in {folder} are another's; leave the flag out")
    return tokenizer


def _settings(
    out: Path, flags: dict[str, Any], tokenizer: Tokenizer, config: MegalodonConfig | None = None
) -> Settings:
    fields = {field.name for field in dataclasses.fields(Settings)}
    own = {name: value for name, value in flags.items() if name in fields}
    model = {name: value for name, value in flags.items() if name not in fields}
    config = config or configured(flags["preset"], model, tokenizer)
    if own["context"] == "packed" and own.setdefault("context_length", None) is not None:
        raise CommandError(
            "--context-length: goes with --context streamed; packed rows have --length tokens of context"
        )
    own.setdefault("context_length", ROWS_OF_CONTEXT * own["length"])
    own.setdefault("lr", float(f"{RATE_TIMES_WIDTH / config.model_dim:.2g}"))
    return Settings(out=out, config=config, tokenizer=tokenizer, **own)


def _check_apart(out: Path, data: Sequence[str], globs: Sequence[str] | None) -> None:
    """Refuses a run in a folder of its text, which the run's own files would become a part of."""
    for path in map(Path, data):
        if not globs and path.is_dir() and out.resolve().is_relative_to(path.resolve()):
            raise CommandError(
                f"--out {out}: lies in {path}, so that what the run writes would be text to learn from; "
                "name a folder outside, or choose the text with --glob"
            )


def _length(given: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """--steps and --minutes: those given, else those of the run before, else the default."""
    for flags in (given, before):
        if "steps" in flags or "minutes" in flags:
            return {"steps": flags.get("steps"), "minutes": flags.get("minutes")}
    return {"steps": None, "minutes": MINUTES}
