"""From flags to a model on a device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megalodon_ops import Megalodon, MegalodonConfig
from megalodon_ops.cli.arguments import SMALL
from megalodon_ops.cli.batches import VOCABULARY
from megalodon_ops.cli.errors import CommandError
from megalodon_ops.errors import FileError
from megalodon_ops.ops.library import has_cuda_kernels
from megalodon_ops.training.checkpoint import load_any

SMALL_CONFIG = {
    "num_layers": 4,
    "model_dim": 128,
    "z_dim": 32,
    "value_dim": 256,
    "num_heads": 1,
    "ffn_hidden_dim": 256,
    "cema_ndim": 8,
    "chunk_size": 256,
    "norm_num_groups": 32,
}
"""Sized for a run of minutes on a few cores"""

WIDTHS = ("z_dim", "value_dim", "ffn_hidden_dim")


def byte_config(preset: str, flags: dict[str, Any]) -> MegalodonConfig:
    """The preset over bytes, changed by flags; widths without a flag keep the preset's proportion to `model_dim`."""
    values = dict(SMALL_CONFIG) if preset == SMALL else MegalodonConfig.preset(preset).to_dict()
    scale = flags.get("model_dim", values["model_dim"]) / values["model_dim"]
    unit = 2 * flags.get("num_heads", values["num_heads"])  # a head of z is made of pairs
    values |= {name: max(1, round(values[name] * scale / unit)) * unit for name in WIDTHS}
    values |= flags
    tied = values.get("share_emb", False)
    values |= {"vocab_size": VOCABULARY, "output_size": -1 if tied else VOCABULARY - 1}  # START is never predicted
    try:
        return MegalodonConfig(**values)
    except (TypeError, ValueError) as error:
        raise CommandError(str(error)) from error


def usable_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise CommandError(f"--device {name}: {str(error).splitlines()[0]}") from error
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not has_cuda_kernels()):
        raise CommandError(f"--device {name}: this build of megalodon_ops has no kernels for it")
    return device


def trained_model(path: Path, device: torch.device) -> tuple[Megalodon, dict[str, Any]]:
    """The model of a run's folder or of one checkpoint of a run, and what `train` has written beside it."""
    try:
        model, _, record = load_any(path, device=device)
    except (FileError, FileNotFoundError) as error:
        raise CommandError(f"--checkpoint {error}") from error
    if record is None:
        raise CommandError(f"--checkpoint {path}: holds no run of `train`, so it is not known what its tokens are")
    return model, record


def precision(device: torch.device, dtype: str) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")
