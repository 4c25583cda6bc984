"""Loads checkpoints in the format of the released code."""

from __future__ import annotations

import itertools
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import as_device, as_path
from .config import MegalodonConfig
from .files import read_json
from ..ops.memory import check_fits, is_finite
from .model import Megalodon
from .pth import check_tensor, read_pth
from ..errors import FileError
from ..ops.values import is_whole, shown

# How a model-parallel checkpoint splits its parameters: along dim 1, along dim 0, or not at all.
_SPLIT_DIM_1 = re.compile(r"embed\.weight|.*\.mega\.(gamma|beta)|.*\.(wh2|fc2)\.weight|output\.output\.weight")
_SPLIT_DIM_0 = re.compile(
    r".*\.cema\.\w+|.*\.(timenorm|final_norm)\.(weight|bias)|.*\.(wv|wz|wr|wh1)\.(weight|bias)|.*\.(fc1|fc3)\.weight"
)
_BUFFERS = re.compile(r"(.*\.)?(rope\.freqs|prior_(count|mean|logv))")
_SHOWN = 4  # most names of parameters in an error

Shards = dict[Path, dict[str, Tensor]]


def load_official(
    directory: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Megalodon:
    """A model from a folder that the released code wrote, in evaluation mode.

    Args:
        directory: holds `config.json` ({"model": {...}}) and `consolidated.pth`, or the shards
            `consolidated.00.pth`, `consolidated.01.pth`, ... of a model-parallel run, which are joined.
        dtype: the dtype of the linear layers and the embedding. Wide parameters stay float32 under a 16-bit dtype.
        device: the device of the parameters.

    Raises:
        FileNotFoundError: the folder or a file in it is missing. ValueError: a file is damaged or not what the released
        code writes (a field of the configuration of another type or range; a parameter missing, unknown, of another
        shape, not dense, not real, not finite; another number of shards than `consolidate_config.json` names), or the
        model is larger than the machine's memory. The message names the file and the fault.

    Files are unpickled with `weights_only=True`, after their checksums were compared.
    """
    if dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise ValueError(f"load_official: `dtype` must be a torch dtype of 16 bits or more, got {shown(dtype)}.")
    directory, device = as_path("load_official", "directory", directory), as_device("load_official", device)
    try:
        return read_official(directory, dtype, device)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"load_official: {error}") from error
    except ValueError as error:
        raise FileError(f"load_official: {error}") from error


def is_official(directory: Path) -> bool:
    """Whether the folder holds a checkpoint of the released code."""
    return any(directory.glob("consolidated*.pth"))


def read_official(directory: Path, dtype: torch.dtype, device: torch.device) -> Megalodon:
    """:func:`load_official` of arguments that were checked."""
    _check_folder(directory)
    fields = _model_fields(directory / "config.json")
    shards = _read_shards(directory)
    config = _config(directory / "config.json", fields, shards)
    check_fits(config.num_parameters() * dtype.itemsize, f"{directory}: a model of its configuration")
    _check_parameters(directory, config, shards)
    with torch.device("meta"):
        model = Megalodon(config).to(dtype)
    weights: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        weight = _joined(name, shards).detach().to(device=device, dtype=parameter.dtype, copy=True)
        if not is_finite(weight):
            raise ValueError(f"{_files(shards)}: `{name}` must be finite as {parameter.dtype}, got NaN or infinity")
        weights[name] = weight
    if config.share_emb:
        weights["output.output.weight"] = weights["embed.weight"]
    for name, _ in _second_output(config, shards):
        if not torch.equal(_joined(name, shards), _joined("embed.weight", shards)):
            raise ValueError(
                f"{_files(shards)}: `{name}` must be the embedding, which `share_emb` says, got other values"
            )
    model.load_state_dict(weights, strict=True, assign=True)
    model.tie_weights()
    return model.eval()


def _check_folder(directory: Path) -> None:
    if not os.path.lexists(directory):
        raise FileNotFoundError(f"{directory}: no such folder")
    if not directory.is_dir():
        raise ValueError(f"{directory}: must be a folder that the released code wrote, got a file")
    if not os.path.lexists(directory / "config.json"):
        own = os.path.lexists(directory / "checkpoints")
        hint = "; `python -m megalodon_ops train` wrote it, and `eval` and `generate` read it" if own else ""
        raise FileNotFoundError(
            f"{directory}: no config.json in this folder, so the released code did not write it{hint}"
        )


def _model_fields(path: Path) -> dict[str, Any]:
    fields = read_json(path).get("model")
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: `config.json` must hold an object `model`, got {shown(fields)}")
    return fields


def _config(path: Path, fields: dict[str, Any], shards: Shards) -> MegalodonConfig:
    """The configuration; where `fields` names no vocabulary, it has the embedding's size."""
    if is_whole(fields.get("vocab_size", -1), -1, 0):
        embed = next(iter(shards.values())).get("embed.weight")
        if not isinstance(embed, Tensor) or embed.dim() != 2:
            raise ValueError(f"{path.parent}: missing parameters: embed.weight")
        fields = {**fields, "vocab_size": embed.shape[0]}
    try:
        return MegalodonConfig.from_dict(fields)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read_shards(directory: Path) -> Shards:
    """The parameters of every shard by name, without the released code's buffers."""
    paths, whole = sorted(directory.glob("consolidated.[0-9][0-9].pth")), directory / "consolidated.pth"
    if paths and os.path.lexists(whole):
        raise ValueError(f"{directory}: holds both {whole.name} and {paths[0].name}; one of them must go")
    for rank, path in enumerate(paths):
        if path.name != f"consolidated.{rank:02d}.pth":
            raise FileNotFoundError(f"{directory / f'consolidated.{rank:02d}.pth'}: no such file")
    paths = paths or [whole]
    parallel = directory / "consolidate_config.json"
    if os.path.lexists(parallel):
        found = read_json(parallel)
        expected, dtype = found.get("model_parallel_size", 1), found.get("dtype", "fp32")
        if not is_whole(expected, 1) or dtype not in ("fp32", "bf16", "fp16"):
            raise ValueError(
                f"{parallel}: must hold a positive integer `model_parallel_size` and a `dtype` of fp32, bf16 or fp16, "
                f"got {shown(expected)} and {shown(dtype)}"
            )
        if expected != len(paths):
            raise ValueError(f"{directory}: expected {expected} shards as {parallel.name} says, got {len(paths)}")
    return {
        path: {name: value for name, value in read_pth(path).items() if not _BUFFERS.fullmatch(name)} for path in paths
    }


def _check_parameters(directory: Path, config: MegalodonConfig, shards: Shards) -> None:
    """Raises unless the shards hold exactly the parameters of the configuration.

    The check stops at the first few missing parameters, so that a configuration of 10^9 layers takes no time.
    """
    known, missing = set(), []
    for name, shape in itertools.chain(config.parameter_shapes(), _second_output(config, shards)):
        known.add(name)
        holders = [path for path, shard in shards.items() if name in shard]
        if not holders:
            missing.append(name)
            if len(missing) > _SHOWN:
                break
            continue
        for path, shard in shards.items():
            if name not in shard:
                raise ValueError(f"{directory}: `{name}` must be in every shard, got none in {path.name}")
            check_tensor(path, name, shard[name], _shape_in_shard(directory, name, shape, len(shards)))
    unknown = sorted(set().union(*shards.values()) - known)
    for names, problem in ((missing, "missing"), (unknown, "unknown")):
        if names:
            listed = ", ".join(name if name.isprintable() else ascii(name) for name in (n[:80] for n in names[:_SHOWN]))
            raise ValueError(f"{directory}: {problem} parameters: {listed}{', ...' if len(names) > _SHOWN else ''}")


def _second_output(config: MegalodonConfig, shards: Shards) -> list[tuple[str, tuple[int, ...]]]:
    """Name and shape of the output matrix where a checkpoint holds the shared embedding a second time."""
    twice = config.share_emb and any("output.output.weight" in shard for shard in shards.values())
    return [("output.output.weight", (config.vocab_size, config.model_dim))] if twice else []


def _split_dim(name: str) -> int | None:
    return 1 if _SPLIT_DIM_1.fullmatch(name) else 0 if _SPLIT_DIM_0.fullmatch(name) else None


def _shape_in_shard(directory: Path, name: str, shape: tuple[int, ...], shards: int) -> tuple[int, ...]:
    dim = _split_dim(name)
    if dim is None:
        return shape
    if shape[dim] % shards:
        raise ValueError(f"{directory}: {shards} shards cannot hold equal parts of `{name}`, which is {shape}")
    return tuple(size // shards if d == dim else size for d, size in enumerate(shape))


def _joined(name: str, shards: Shards) -> Tensor:
    parts, dim = {path: shard[name] for path, shard in shards.items()}, _split_dim(name)
    if dim is not None:
        return torch.cat(list(parts.values()), dim) if len(parts) > 1 else next(iter(parts.values()))
    first, *others = parts
    for other in others:
        if not torch.equal(parts[first], parts[other]):
            raise ValueError(f"{other}: `{name}` must be as in {first.name}, got other values")
    return parts[first]


def _files(shards: Shards) -> str:
    first, *others = shards
    return f"{first} or another shard" if others else str(first)
