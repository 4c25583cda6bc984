"""Build or load a model on a device from flags, and read the record that `train` wrote of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
import torch
from msgspec import Meta

from megalodon_ops import Megalodon, MegalodonConfig
from megalodon_ops.cli.errors import CommandError
from megalodon_ops.cli.flags import convert, flag_of
from megalodon_ops.cli.options import ModelOptions, NotNegative, Train, config_field
from megalodon_ops.storage.files import FileError
from megalodon_ops.ops.common.definition import has_cuda_kernels
from megalodon_ops.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer
from megalodon_ops.training.batches import BatchesPosition
from megalodon_ops.training.run_checkpoint import load_any
from megalodon_ops.training.schedule import SchedulePosition

WIDTHS = ("z_dim", "value_dim", "ffn_hidden_dim")
"""Fields that scale with `model_dim`"""


def model_config(
    preset: str, flags: dict[str, Any], tokenizer: Tokenizer | None = None, *, ends: bool = True
) -> MegalodonConfig:
    """Return the configuration of a preset changed by `flags`, for a tokenizer (None: bytes).

    WIDTHS that `flags` does not name scale with `model_dim`. With `ends`, the model also predicts the id `end`.
    """
    tokenizer = tokenizer or ByteTokenizer()
    values = MegalodonConfig.preset(preset).to_dict()
    scale = flags.get("model_dim", values["model_dim"]) / values["model_dim"]
    unit = 2 * flags.get("num_heads", values["num_heads"])  # each head of z holds pairs, which rotate together
    values |= {name: max(1, round(values[name] * scale / unit)) * unit for name in WIDTHS}
    values |= flags
    values |= {"vocab_size": tokenizer.vocab_size, "output_size": -1, "eos_token_id": tokenizer.end if ends else None}
    try:
        return MegalodonConfig(**values)
    except (TypeError, ValueError) as error:
        raise CommandError(_in_flags(str(error))) from error


def _in_flags(message: str) -> str:
    """Replace field names by flags in an error of MegalodonConfig."""
    message = message.removeprefix("MegalodonConfig: ")
    flags = {config_field(name): flag_of(name) for name in ModelOptions.__annotations__}
    for field, flag in flags.items():
        message = re.sub(rf"^`{field}`", f"{flag}:", message)
        message = re.sub(rf"(?<![\w-]){field}(?!\w)", flag, message)
    return message


def usable_device(name: str) -> torch.device:
    if not re.fullmatch(r"(cpu|cuda)(:(0|[1-9]\d?))?", name, re.ASCII):
        kinds = "must be cpu, cuda or one card, such as cuda:1; there are no kernels for other devices"
        raise CommandError(f"--device {name}: {kinds}")
    device = torch.device(name)
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise CommandError(f"--device {name}: {str(error).splitlines()[0]}; --device cpu needs no GPU") from error
    if device.type == "cuda" and not has_cuda_kernels():
        raise CommandError(f"--device {name}: this build has no kernels for it; megalodon-ops info says why")
    return device


class DataRecord(msgspec.Struct):
    fingerprint: str
    position: BatchesPosition


class TrainRecord(msgspec.Struct):
    """Fields that `train` adds to a checkpoint's `training.json`."""

    step: Annotated[int, Meta(ge=0)]
    options: Train
    data: DataRecord
    schedule: SchedulePosition
    seconds: NotNegative
    held_out_bits_per_byte: NotNegative | None = None
    """Figure of the sample of held-out text after this step; None if it was not evaluated"""

    @classmethod
    def of(cls, folder: Path, record: dict[str, Any]) -> TrainRecord | None:
        """Return the record in a checkpoint's folder, or None if another training program wrote it."""
        if not record.keys() >= {field.name for field in msgspec.structs.fields(cls) if field.required}:
            return None
        try:
            return convert(record, cls)
        except msgspec.ValidationError as error:
            raise FileError(f"{folder / 'training.json'}: {error}") from error


class TrainedModel(NamedTuple):
    model: Megalodon
    tokenizer: Tokenizer
    record: TrainRecord | None
    """The record of `train`; None if another program has saved the model"""

    @property
    def dtype(self) -> str:
        """The run's dtype for autocast; without a run "float32", which means no autocast."""
        return "float32" if self.record is None else self.record.options.dtype


def trained_model(
    path: Path, device: torch.device, tokenizer: Path | None = None, dtype: str | None = None
) -> TrainedModel:
    """Load the model and tokenizer of a run's folder, of a checkpoint or of any saved model.

    tokenizer: its file, for a folder without one. dtype: "float32" converts the weights to float32.
    """
    weight_dtype = torch.float32 if dtype == "float32" else None
    model, stored_tokenizer, record = read("--checkpoint", load_any, path, dtype=weight_dtype, device=device)
    if model.config.num_features is not None:
        raise CommandError(f"--checkpoint {path}: the model reads numbers, not text; call it from Python")
    if tokenizer is not None:
        named_tokenizer = read_tokenizer(tokenizer)
        if stored_tokenizer is not None and stored_tokenizer.fingerprint != named_tokenizer.fingerprint:
            raise CommandError(f"--tokenizer {tokenizer}: {path} holds another tokenizer; leave the flag out")
        stored_tokenizer = named_tokenizer
    if stored_tokenizer is None:
        raise CommandError(f"--checkpoint {path}: has no tokenizer.json or tokenizer.model; name one with --tokenizer")
    if stored_tokenizer.vocab_size > model.config.vocab_size:
        sizes = f"{stored_tokenizer.vocab_size} ids, and the model knows {model.config.vocab_size}"
        raise CommandError(f"--checkpoint {path}: its tokenizer has {sizes}")
    return TrainedModel(model, stored_tokenizer, None if record is None else TrainRecord.of(path, record))


def read_tokenizer(path: Path) -> Tokenizer:
    return read("--tokenizer", load_tokenizer, path)


def read(flag: str, load: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call a function that loads a file; name the flag in errors of the file."""
    try:
        return load(*arguments, **options)
    except (FileError, FileNotFoundError) as error:
        raise CommandError(f"{flag} {error}") from error


def precision(device: torch.device, dtype: str) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")
