"""From flags to a model on a device."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megalodon_ops import Megalodon, MegalodonConfig
from megalodon_ops.cli.errors import CommandError
from megalodon_ops.cli.flags import flag_of
from megalodon_ops.cli.options import ModelOptions, config_field
from megalodon_ops.cli.run_record import TrainRecord
from megalodon_ops.files import FileError
from megalodon_ops.ops.common.definition import has_cuda_kernels
from megalodon_ops.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer
from megalodon_ops.training.run_checkpoint import load_any

WIDTHS = ("z_dim", "value_dim", "ffn_hidden_dim")


def configured(
    preset: str, flags: dict[str, Any], tokenizer: Tokenizer | None = None, *, ends: bool = True
) -> MegalodonConfig:
    """The preset over a tokenizer's ids, or bytes; widths without a flag keep the preset's proportion to `model_dim`.

    ends: whether the model is to predict the tokenizer's `end`.
    """
    tokenizer = tokenizer or ByteTokenizer()
    values = MegalodonConfig.preset(preset).to_dict()
    scale = flags.get("model_dim", values["model_dim"]) / values["model_dim"]
    unit = 2 * flags.get("num_heads", values["num_heads"])  # a head of z is made of pairs
    values |= {name: max(1, round(values[name] * scale / unit)) * unit for name in WIDTHS}
    values |= flags
    values |= {"vocab_size": tokenizer.vocab_size, "output_size": -1, "eos_token_id": tokenizer.end if ends else None}
    try:
        return MegalodonConfig(**values)
    except (TypeError, ValueError) as error:
        raise CommandError(_in_flags(str(error))) from error


def _in_flags(message: str) -> str:
    """An error of MegalodonConfig, with the flags' names in the place of its fields'."""
    message = message.removeprefix("MegalodonConfig: ")
    flags = {config_field(name): flag_of(name) for name in ModelOptions.__annotations__}
    for field, flag in flags.items():
        message = re.sub(rf"^`{field}`", f"{flag}:", message)
        message = re.sub(rf"(?<![\w-]){field}(?!\w)", flag, message)
    return message


def usable_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise CommandError(f"--device {name}: {_DEVICES}") from error
    if device.type not in ("cpu", "cuda"):
        raise CommandError(f"--device {name}: {_DEVICES}")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise CommandError(f"--device {name}: {str(error).splitlines()[0]}; --device cpu does without a GPU") from error
    if device.type == "cuda" and not has_cuda_kernels():
        raise CommandError(
            f"--device {name}: this build of megalodon_ops has no kernels for it; python -m megalodon_ops info says why"
        )
    return device


_DEVICES = "must be cpu, cuda or one card, such as cuda:1; there are no kernels for other devices"


class Trained(NamedTuple):
    model: Megalodon
    tokenizer: Tokenizer
    record: TrainRecord | None
    """What `train` has written beside the model; None where another program has saved it"""

    @property
    def dtype(self) -> str:
        """That of the run, for autocast; a model that no run left computes in its own."""
        return "float32" if self.record is None else self.record.options.dtype


def trained_model(path: Path, device: torch.device, tokenizer: Path | None = None, dtype: str | None = None) -> Trained:
    """The model and the tokenizer of a folder: a run's, one checkpoint of a run, or any other that holds a model.

    tokenizer: a file for a folder that holds none. dtype: "float32" computes in it, whatever the folder's weights are in.
    """
    try:
        wanted = torch.float32 if dtype == "float32" else None
        model, found, record = load_any(path, dtype=wanted, device=device)
    except (FileError, FileNotFoundError) as error:
        raise CommandError(f"--checkpoint {error}") from error
    if tokenizer is not None:
        given = read_tokenizer(tokenizer)
        if found is not None and found.fingerprint != given.fingerprint:
            raise CommandError(f"--tokenizer {tokenizer}: {path} holds another tokenizer; leave the flag out")
        found = given
    if found is None:
        raise CommandError(
            f"--checkpoint {path}: holds no tokenizer.json and no tokenizer.model, so it is not known what its tokens are; "
            "name the file with --tokenizer"
        )
    if found.vocab_size > model.config.vocab_size:
        raise CommandError(
            f"--checkpoint {path}: its tokenizer has {found.vocab_size} ids, and the model knows {model.config.vocab_size}"
        )
    return Trained(model, found, None if record is None else TrainRecord.of(path, record))


def read_tokenizer(path: Path) -> Tokenizer:
    try:
        return load_tokenizer(path)
    except (FileError, FileNotFoundError) as error:
        raise CommandError(f"--tokenizer {error}") from error


def precision(device: torch.device, dtype: str) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")
