"""Settings of a run of `train`, new or resumed; on a resume, some flags may change."""

import time
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch

from megalodon_ops import Megalodon, MegalodonConfig
from megalodon_ops.cli.data import tokens_folder
from megalodon_ops.cli.errors import CommandError
from megalodon_ops.cli.flags import convert, fault, flag_of
from megalodon_ops.cli.models import TrainRecord, model_config, read, read_tokenizer
from megalodon_ops.cli.options import CONTEXT_ROWS, LAUNCH_OPTIONS, MINUTES, RATE_TIMES_WIDTH
from megalodon_ops.cli.options import ModelOptions, Train, config_field
from megalodon_ops.storage.files import FileError, read_json
from megalodon_ops.ops.common.checks import did_you_mean, short_text
from megalodon_ops.tokenizers import ByteTokenizer, Tokenizer
from megalodon_ops.training.run_checkpoint import Checkpoint, load_any

CHANGEABLE_OPTIONS = frozenset(LAUNCH_OPTIONS).union(
    "data glob field encoding validation tokenizer steps minutes eval_every checkpoint_every device tensorboard peak_tflops".split()
)
"""Options that may change on a resume (text and tokenizer are compared by content); the others determine the losses"""

WEIGHTLESS_OPTIONS = frozenset({"dropout", "attention_dropout", "layerwise_ckpt"})
"""Options of a model that may differ from those of --init-from"""


class Run(NamedTuple):
    options: Train
    """Has a value for every option that determines the losses"""
    config: MegalodonConfig
    tokenizer: Tokenizer
    initial: Megalodon | None = None
    """Model of --init-from"""


def with_config(options: Train) -> Train:
    """Return the options of the --config file, overridden by the user's flags."""
    if options.config is None:
        return options
    file = options.config
    try:
        values = read_json(file)
    except FileError as error:
        raise CommandError(f'--config {error}; it must hold a JSON object of options, such as {{"dim": 64}}') from error
    names = [field.name for field in fields(Train) if field.name not in ("config", "resume")]
    if unknown := [name for name in values if name not in names]:
        fix = did_you_mean(unknown[0], names) or "; train --help names them, with - for _"
        raise CommandError(f"--config {file}: not an option of a run: {short_text(unknown[0])}{fix}")
    try:
        merged = _override(convert(values, Train), options)
    except msgspec.ValidationError as error:
        raise CommandError(f"--config {file}: {fault(error, values)}") from error
    merged.given = options.given | values.keys()
    return merged


def _override(options: Train, given: Train) -> Train:
    """Replace options by those that the user has set; --steps and --minutes replace each other."""
    new = {name: getattr(given, name) for name in given.given}
    if {"steps", "minutes"} & new.keys():
        new |= {"steps": given.steps, "minutes": given.minutes}
    return replace(options, **new)


def run_folder(options: Train, is_distributed: bool) -> Path:
    """Return the run's folder, which must exist for a resume."""
    if options.steps is not None and options.minutes is not None:
        raise CommandError("--steps: cannot be combined with --minutes")
    if options.out is None:
        if options.resume or is_distributed:
            raise CommandError(f"{'--resume' if options.resume else 'train'}: name the run's folder with --out DIR")
        return Path("runs", time.strftime("%Y%m%d-%H%M%S"))
    if options.resume and not options.out.is_dir():
        raise CommandError(f"--resume {options.out}: no such folder")
    return options.out


def new_run(options: Train, out: Path) -> Run:
    _check_apart(out, options.data or (), options.glob)
    options = _with_absolute_paths(options)
    initial = None
    if options.init_from is None:
        tokenizer = _tokenizer(options) or ByteTokenizer()
        config = model_config(options.preset, options.config_fields(), tokenizer, ends=options.end_token)
    else:
        initial, config, tokenizer = _initial_model(options)
        options = replace(options, end_token=config.eos_token_id is not None)
    if options.context_length is None:
        options = replace(options, context_length=CONTEXT_ROWS * options.length)
    if options.lr is None:
        options = replace(options, lr=float(f"{RATE_TIMES_WIDTH / config.model_dim:.2g}"))
    if options.steps is None and options.minutes is None:
        options = replace(options, minutes=MINUTES)
    return Run(options, config, tokenizer, initial)


def _initial_model(options: Train) -> tuple[Megalodon, MegalodonConfig, Tokenizer]:
    """Load the model of --init-from; return it, the run's configuration and its tokenizer."""
    folder = options.init_from
    model, stored_tokenizer, _ = read("--init-from", load_any, folder, dtype=torch.float32)
    if model.quantization or model.config.num_features is not None:
        kind = "reads numbers, not text" if model.quantization is None else f"has {model.quantization} weights"
        raise CommandError(f"--init-from {folder}: the model {kind}; name one of text with floating-point weights")
    tokenizer = _tokenizer(options) or stored_tokenizer or ByteTokenizer()
    if stored_tokenizer is not None and tokenizer.fingerprint != stored_tokenizer.fingerprint:
        flag = "--data" if options.tokenizer is None else "--tokenizer"
        raise CommandError(f"{flag}: has another tokenizer than the model in {folder}")
    if tokenizer.vocab_size > model.config.vocab_size:
        sizes = f"{tokenizer.vocab_size} ids, and the model knows {model.config.vocab_size}"
        raise CommandError(f"--init-from {folder}: the tokenizer has {sizes}; name the model's with --tokenizer")
    ends = model.config.eos_token_id is not None
    values = {**model.config.to_dict(), "preset": "a configuration of its own", "end_token": ends}
    for name in sorted(options.given & {"end_token", *ModelOptions.__annotations__} - WEIGHTLESS_OPTIONS):
        given, value = getattr(options, name), values[config_field(name)]
        if given is not None and given != value:
            raise CommandError(f"{flag_of(name)}: the model in {folder} has {value}, got {given}; leave the flag out")
    changes = {name: value for name in WEIGHTLESS_OPTIONS if (value := getattr(options, name)) is not None}
    return model, replace(model.config, **changes), tokenizer


def resumed_run(options: Train, out: Path, saved: Checkpoint) -> Run:
    """Return a saved run's settings, changed by the flags that may change with --resume; without it, none may."""
    record = TrainRecord.of(saved.folder, saved.record)
    if record is None:
        raise CommandError(f"--resume {out}: this run was not written by `train`")
    old = _values(record.options, saved.config)
    if options.resume:
        new = options.record()
        compared = sorted(options.given - CHANGEABLE_OPTIONS)
    else:  # restarted by torchrun
        run = new_run(options, out)
        new = _values(run.options, run.config)
        compared = old
    for name in compared:
        if new[name] != old[name]:
            fix = "leave the flag out" if options.resume else "go on with --resume"
            raise CommandError(
                f"{flag_of(name)}: the run in {out} has {old[name]}, got {new[name]}; {fix}, or start another run"
            )
    tokenizer = saved.tokenizer() or ByteTokenizer()
    if options.tokenizer is not None and read_tokenizer(options.tokenizer).fingerprint != tokenizer.fingerprint:
        raise CommandError(f"--tokenizer {options.tokenizer}: the run in {out} has another one; leave the flag out")
    return Run(_with_absolute_paths(_override(record.options, options)), saved.config, tokenizer)


def _values(options: Train, config: MegalodonConfig) -> dict[str, Any]:
    """Return the values of all options of a run; model options come from the configuration."""
    model = config.to_dict()
    return {name: model.get(config_field(name), value) for name, value in options.record().items()}


def _with_absolute_paths(options: Train) -> Train:

    def absolute_path(value: tuple[Path, ...] | Path | None) -> Any:
        if isinstance(value, tuple):
            return tuple(path.absolute() for path in value)
        return None if value is None else value.absolute()

    names = ("data", "validation", "tokenizer", "init_from")
    absolute = replace(options, **{name: absolute_path(getattr(options, name)) for name in names})
    absolute.given = options.given
    return absolute


def _tokenizer(options: Train) -> Tokenizer | None:
    """Return the tokenizer of a folder of tokens, else that of --tokenizer, or None."""
    named = None if options.tokenizer is None else read_tokenizer(options.tokenizer)
    if (folder := tokens_folder(options.data)) is None:
        return named
    tokenizer = read_tokenizer(folder)
    if named is not None and named.fingerprint != tokenizer.fingerprint:
        raise CommandError(f"--tokenizer {options.tokenizer}: {folder} has another tokenizer; leave the flag out")
    return tokenizer


def _check_apart(out: Path, data: Sequence[Path], globs: Sequence[str] | None) -> None:
    """Refuse a run inside its own training text."""
    for path in data:
        if not globs and path.is_dir() and out.resolve().is_relative_to(path.resolve()):
            fault = f"lies in {path}, so that what the run writes would be text to learn from"
            raise CommandError(f"--out {out}: {fault}; name a folder outside, or choose the text with --glob")
