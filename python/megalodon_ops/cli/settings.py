"""What a run of `train` is to do: its options, or those of the run that it goes on with and what is given anew."""

from __future__ import annotations

import difflib
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from megalodon_ops import MegalodonConfig
from megalodon_ops.cli.data import tokens_folder
from megalodon_ops.cli.errors import CommandError
from megalodon_ops.cli.flags import convert, fault, flag_of
from megalodon_ops.cli.models import configured, read_tokenizer
from megalodon_ops.cli.options import MINUTES, OF_LAUNCH, RATE_TIMES_WIDTH, ROWS_OF_CONTEXT, Train, config_field
from megalodon_ops.cli.run_record import TrainRecord
from megalodon_ops.files import read_json
from megalodon_ops.ops.common.checks import shown
from megalodon_ops.tokenizers import ByteTokenizer, Tokenizer
from megalodon_ops.training.run_checkpoint import Checkpoint

MAY_CHANGE = frozenset(OF_LAUNCH).union(
    "data glob tokenizer steps minutes eval_every checkpoint_every device tensorboard peak_tflops".split()
)
"""Options that a run may be given anew (text and tokenizer are compared by content); the others decide its losses"""


class Run(NamedTuple):
    options: Train
    """With a value for all that decides the losses"""
    config: MegalodonConfig
    tokenizer: Tokenizer


def with_config(options: Train) -> Train:
    """The options of the file that --config names, and before them those that the user has named."""
    if options.config is None:
        return options
    file, values = options.config, read_json(options.config)
    names = [field.name for field in fields(Train) if field.name not in ("config", "resume")]
    if unknown := [name for name in values if name not in names]:
        near = difflib.get_close_matches(unknown[0], names, n=1)
        fix = f"did you mean {near[0]}?" if near else "train --help names them, with - for _"
        raise CommandError(f"--config {file}: no option of a run: {shown(unknown[0])}; {fix}")
    try:
        found = _over(convert(values, Train), options)
    except msgspec.ValidationError as error:
        raise CommandError(f"--config {file}: {fault(error, values)}") from error
    found.given = options.given | values.keys()
    return found


def _over(options: Train, given: Train) -> Train:
    """Options, with the others that the user has named in their place; of --steps and --minutes, one puts the other out."""
    new = {name: getattr(given, name) for name in given.given}
    if {"steps", "minutes"} & new.keys():
        new |= {"steps": given.steps, "minutes": given.minutes}
    return replace(options, **new)


def run_folder(options: Train, several: bool) -> Path:
    """The folder of the run; the folder of a run to resume must exist."""
    if options.steps is not None and options.minutes is not None:
        raise CommandError("--steps: does not go with --minutes")
    if options.out is None:
        if options.resume or several:
            raise CommandError(
                f"{'--resume' if options.resume else 'train'}: name the folder of the run with --out DIR"
            )
        return Path("runs", time.strftime("%Y%m%d-%H%M%S"))
    if options.resume and not options.out.is_dir():
        raise CommandError(f"--resume {options.out}: no such folder")
    return options.out


def begun(options: Train, out: Path) -> Run:
    """A new run."""
    _check_apart(out, options.data or (), options.glob)
    options = _absolute(options)
    tokenizer = _tokenizer(options)
    config = configured(options.preset, options.of_config(), tokenizer, ends=options.end_token)
    if options.context_length is None:
        options = replace(options, context_length=ROWS_OF_CONTEXT * options.length)
    if options.lr is None:
        options = replace(options, lr=float(f"{RATE_TIMES_WIDTH / config.model_dim:.2g}"))
    if options.steps is None and options.minutes is None:
        options = replace(options, minutes=MINUTES)
    return Run(options, config, tokenizer)


def resumed(options: Train, out: Path, saved: Checkpoint) -> Run:
    """The run that has saved a checkpoint, with what it is given anew; without --resume, all options must be the run's."""
    record = TrainRecord.of(saved.folder, saved.record)
    if record is None:
        raise CommandError(f"--resume {out}: another program than `train` has written this run")
    old = _values(record.options, saved.config)
    new = options.record() if options.resume else _values(*begun(options, out)[:2])
    for name in sorted(options.given - MAY_CHANGE) if options.resume else old:
        if new[name] != old[name]:
            fix = "leave the flag out" if options.resume else "go on with --resume"
            raise CommandError(
                f"{flag_of(name)}: the run in {out} has {old[name]}, got {new[name]}; {fix}, or start another run"
            )
    tokenizer = saved.tokenizer() or ByteTokenizer()
    if options.tokenizer is not None and read_tokenizer(options.tokenizer).fingerprint != tokenizer.fingerprint:
        raise CommandError(f"--tokenizer {options.tokenizer}: the run in {out} has another; leave the flag out")
    return Run(_absolute(_over(record.options, options)), saved.config, tokenizer)


def _values(options: Train, config: MegalodonConfig) -> dict[str, Any]:
    """Values of all options of a run; those of the model are the configuration's."""
    model = config.to_dict()
    return {name: model.get(config_field(name), value) for name, value in options.record().items()}


def _absolute(options: Train) -> Train:
    """The options with paths that mean the same in another folder."""
    data, file = options.data, options.tokenizer
    return replace(
        options,
        data=None if data is None else tuple(path.absolute() for path in data),
        tokenizer=None if file is None else file.absolute(),
    )


def _tokenizer(options: Train) -> Tokenizer:
    """The tokenizer of a folder of tokens; else that of a file, or the one of bytes."""
    given = None if options.tokenizer is None else read_tokenizer(options.tokenizer)
    if (folder := tokens_folder(options.data)) is None:
        return given or ByteTokenizer()
    tokenizer = read_tokenizer(folder)
    if given is not None and given.fingerprint != tokenizer.fingerprint:
        raise CommandError(f"--tokenizer {options.tokenizer}: the tokens in {folder} are another's; leave the flag out")
    return tokenizer


def _check_apart(out: Path, data: Sequence[Path], globs: Sequence[str] | None) -> None:
    """Refuses a run in a folder of its text, which the run's own files would become a part of."""
    for path in data:
        if not globs and path.is_dir() and out.resolve().is_relative_to(path.resolve()):
            raise CommandError(
                f"--out {out}: lies in {path}, so that what the run writes would be text to learn from; "
                "name a folder outside, or choose the text with --glob"
            )
