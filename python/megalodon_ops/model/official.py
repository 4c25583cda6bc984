"""Checkpoints in the format of the released code."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import CONFIG, as_device, as_path, check_tokenizer, kept_files
from .config import MegalodonConfig
from .files import read_json, write_folder_atomically
from ..ops.memory import check_fits, is_finite
from .model import Megalodon
from .pth import check_tensor, read_pth
from ..errors import FileError
from .weights import plain_tensors
from ..ops.values import check_integer, described, is_whole, shown

# How a model-parallel checkpoint splits its parameters: along dim 1, along dim 0, or not at all.
_SPLIT_DIM_1 = re.compile(r"embed\.weight|.*\.mega\.(gamma|beta)|.*\.(wh2|fc2)\.weight|output\.output\.weight")
_SPLIT_DIM_0 = re.compile(
    r".*\.cema\.\w+|.*\.(timenorm|final_norm)\.(weight|bias)|.*\.(wv|wz|wr|wh1)\.(weight|bias)|.*\.(fc1|fc3)\.weight"
)
_BUFFERS = re.compile(r"(.*\.)?(rope\.freqs|prior_(count|mean|logv))")
_PARALLEL = "consolidate_config.json"
_OF_WEIGHTS = re.compile(r"consolidated(\.\d\d)?\.pth")
_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
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


def save_official(model: Megalodon, directory: str | os.PathLike, *, shards: int = 1, tokenizer: Any = None) -> None:
    """Writes the model as the released code does: :func:`load_official`, that code and megalodon-jax read the folder.

    Args:
        directory: a new folder, an empty one, or one in this format, whose weights are replaced.
        shards: of how many model-parallel ranks. A rank has whole heads and whole groups of the norms, so that it must
            divide `num_heads`, `norm_num_groups` and `ffn_hidden_dim`.
        tokenizer: one with a method `save(folder)`, to go along.

    The buffers that the released code keeps beside its parameters are written, too. The folder is complete or not there,
    as after :meth:`Megalodon.save`.

    Raises:
        ValueError: the model's parameters are not those of its configuration, not finite or float64, or cannot be shared
        out so. OSError: the folder cannot be written.

    Example:
        >>> import tempfile, megalodon_ops as mo
        >>> config = mo.MegalodonConfig(num_layers=1, model_dim=32, z_dim=16, value_dim=32, num_heads=2, ffn_hidden_dim=32,
        ...                             vocab_size=9)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     mo.save_official(mo.Megalodon(config), f"{folder}/model", shards=2)
        ...     mo.load_official(f"{folder}/model").config == config
        True
    """
    if not isinstance(model, Megalodon):
        raise TypeError(f"save_official: `model` must be a Megalodon, got {described(model)}.")
    folder, config = as_path("save_official", "directory", directory), model.config
    shards = check_integer("save_official", "shards", shards, "an integer from 1 to 99", 1, 99)
    check_tokenizer("save_official", tokenizer)
    for field in ("num_heads", "norm_num_groups", "ffn_hidden_dim"):
        if (size := getattr(config, field)) % shards:
            raise ValueError(f"save_official: `shards` must divide {field} = {size}, got {shards}.")
    weights = plain_tensors(model, config.parameter_shapes(), "save_official")
    if (dtype := weights["embed.weight"].dtype) not in _NAMES:
        raise ValueError(f"save_official: `model` must be {', '.join(map(str, _NAMES))}, got {dtype}.")
    weights = {name: weight.detach().cpu() for name, weight in weights.items()}
    if config.share_emb:
        weights["output.output.weight"] = weights["embed.weight"]
    kept = kept_files("save_official", folder, is_official(folder), (CONFIG, _PARALLEL))
    with write_folder_atomically(folder) as draft:
        for path in kept:
            if not _OF_WEIGHTS.fullmatch(path.name):
                shutil.copy2(path, draft / path.name, follow_symlinks=False)
        if tokenizer is not None:
            tokenizer.save(draft)
        for rank in range(shards):
            part = _part(weights, rank, shards) | _buffers(config, shards)
            torch.save(part, draft / ("consolidated.pth" if shards == 1 else f"consolidated.{rank:02d}.pth"))
        has_tokenizer = (draft / "tokenizer.model").exists()
        fields = {"path": str(folder.absolute() / "tokenizer.model") if has_tokenizer else None}
        (draft / CONFIG).write_text(json.dumps({"model": config.to_dict(), "tokenizer": fields}, indent=1) + "\n")
        facts = {"model_parallel_size": shards, "dtype": _NAMES[dtype]}
        (draft / _PARALLEL).write_text(json.dumps(facts, indent=1) + "\n")


def _part(weights: dict[str, Tensor], rank: int, shards: int) -> dict[str, Tensor]:
    """What the file of one rank holds; a shared embedding is one tensor under two names."""
    parts: dict[int, Tensor] = {}
    for weight, dim in ((weight, _split_dim(name)) for name, weight in weights.items()):
        if id(weight) not in parts:
            whole = dim is None or shards == 1
            parts[id(weight)] = weight.contiguous() if whole else weight.chunk(shards, dim)[rank].clone()
    return {name: parts[id(weight)] for name, weight in weights.items()}


def _buffers(config: MegalodonConfig, shards: int) -> dict[str, Tensor]:
    """The released code's buffers in one shard: rotary frequencies, and the state that its norms begin with."""
    pairs = config.z_dim // config.num_heads // 2
    periods = torch.tensor([config.rotary_base ** (pair / pairs) for pair in range(pairs)], dtype=torch.float32)
    buffers = {"rope.freqs": 1 / periods}
    for norm in (*(f"layers.{layer}.mega.timenorm" for layer in range(config.num_layers)), "output.final_norm"):
        buffers[f"{norm}.prior_count"] = torch.tensor(0)
        buffers[f"{norm}.prior_mean"] = torch.zeros(config.norm_num_groups // shards)
        buffers[f"{norm}.prior_logv"] = torch.zeros(config.norm_num_groups // shards)
    return buffers


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
    places: set[int] = set()
    for name, parameter in model.named_parameters():
        weight = _own(_joined(name, shards).detach(), places).to(device=device, dtype=parameter.dtype)
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
    parallel = directory / _PARALLEL
    if os.path.lexists(parallel):
        found = read_json(parallel)
        expected, dtype = found.get("model_parallel_size", 1), found.get("dtype", "fp32")
        if not is_whole(expected, 1) or dtype not in _NAMES.values():
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


def _own(weight: Tensor, places: set[int]) -> Tensor:
    """The weight, memory-mapped as it is, or a copy where it is a part of other memory or shares its own with others."""
    storage = weight.untyped_storage()
    alone = weight.is_contiguous() and storage.nbytes() == weight.nbytes and storage.data_ptr() not in places
    places.add(storage.data_ptr())
    return weight if alone else weight.clone(memory_format=torch.contiguous_format)


def _files(shards: Shards) -> str:
    first, *others = shards
    return f"{first} or another shard" if others else str(first)
