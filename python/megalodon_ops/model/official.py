"""Checkpoints in the format of the released code: config.json, and parameters in one `.pth` file or in one a rank."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import CONFIG, as_device, as_path, check_dtype, check_tokenizer, kept_files
from .config import MegalodonConfig
from .files import file_size, read_json, reading, write_atomically
from .model import Megalodon
from .weights import plain_tensors
from ..errors import FileError
from ..ops.library import OWN_TYPES
from ..ops.memory import check_fits, is_finite
from ..ops.values import check_integer, is_whole, shown

# How a model-parallel checkpoint splits its parameters: along dim 1, along dim 0, or not at all.
_SPLIT_DIM_1 = re.compile(r"embed\.weight|.*\.mega\.(gamma|beta)|.*\.(wh2|fc2)\.weight|output\.output\.weight")
_SPLIT_DIM_0 = re.compile(
    r".*\.cema\.\w+|.*\.(timenorm|final_norm)\.(weight|bias)|.*\.(wv|wz|wr|wh1)\.(weight|bias)|.*\.(fc1|fc3)\.weight"
)
_BUFFERS = re.compile(r"(.*\.)?(rope\.freqs|prior_(count|mean|logv))")
_PARALLEL = "consolidate_config.json"
_SHARD, _OF_WEIGHTS = re.compile(r"consolidated\.\d\d"), re.compile(r"consolidated(\.\d\d)?\.pth")
_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_EMBEDDING, _OUTPUT = "embed.weight", "output.output.weight"

Shards = dict[Path, dict[str, Tensor]]
"""The parameters in every shard by name"""


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
        code writes, or the model is larger than the machine's memory. The message names the file and the fault.

    Files are unpickled with `weights_only=True`, after their checksums were compared.
    """
    check_dtype("load_official", dtype)
    directory, device = as_path("load_official", "directory", directory), as_device("load_official", device)
    try:
        return read_official(directory, dtype or torch.float32, device)
    except (FileNotFoundError, FileError) as error:
        raise type(error)(f"load_official: {error}") from error


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
    with write_atomically(folder, folder=True) as draft:
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
    for name, weight in weights.items():
        if id(weight) not in parts:
            dim = None if shards == 1 else _split_dim(name)
            parts[id(weight)] = weight.contiguous() if dim is None else weight.chunk(shards, dim)[rank].clone()
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
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: no such folder")
    if not (directory / CONFIG).exists():
        raise FileNotFoundError(f"{directory}: no config.json in this folder, so the released code did not write it")
    shards = {path: _read_shard(path) for path in _shard_files(directory)}
    config = _read_config(directory / CONFIG, next(iter(shards.values())))
    with reading(directory):
        check_fits(config.num_parameters() * dtype.itemsize, "a model of its configuration")
    _check_parameters(config, shards)
    with torch.device("meta"):
        model = Megalodon(config).to(dtype)
    weights: dict[str, Tensor] = {}
    places: set[int] = set()
    for name, parameter in model.named_parameters():
        weights[name] = _own(_joined(name, shards).detach(), places).to(device=device, dtype=parameter.dtype)
        if not is_finite(weights[name]):
            raise FileError(f"{_files(shards)}: `{name}` must be finite as {parameter.dtype}, got NaN or infinity")
    if config.share_emb:
        weights[_OUTPUT] = weights[_EMBEDDING]
        has_both = _OUTPUT in next(iter(shards.values()))
        if has_both and not torch.equal(_joined(_OUTPUT, shards), _joined(_EMBEDDING, shards)):
            raise FileError(f"{_files(shards)}: `{_OUTPUT}` must be the embedding by `share_emb`, got other values")
    model.load_state_dict(weights, strict=True, assign=True)
    model.tie_weights()
    return model.eval()


def _shard_files(directory: Path) -> list[Path]:
    """The files of weights, in the order of their ranks, as many as `consolidate_config.json` names."""
    ranks, whole = len(list(directory.glob("consolidated.[0-9][0-9].pth"))), directory / "consolidated.pth"
    paths = [directory / f"consolidated.{rank:02d}.pth" for rank in range(ranks)] or [whole]
    if ranks and whole.exists():
        raise FileError(f"{directory}: holds both {whole.name} and {paths[0].name}; one of them must go")
    if (parallel := directory / _PARALLEL).exists():
        expected = read_json(parallel).get("model_parallel_size", 1)
        if not is_whole(expected, len(paths), len(paths)):
            raise FileError(
                f"{parallel}: says `model_parallel_size` {shown(expected)}, and there are {len(paths)} shards"
            )
    return paths


def _read_shard(path: Path) -> dict[str, Tensor]:
    """The parameters in a file by name, their memory mapped from it, without the released code's buffers.

    Every byte of the archive is compared with its CRC32 first, which torch.load does not do, at about 2 GB/s a core.
    """
    file_size(path)
    with reading(path):
        if not zipfile.is_zipfile(path):
            raise ValueError("is no archive of torch.save, or is cut short")
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise ValueError(f"is damaged: the checksum of {shown(damaged)} in it is another")
            if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
                raise ValueError("is compressed, which torch.save does not do")
            written_as = min(archive.namelist()).partition("/")[0]
        if _SHARD.fullmatch(written_as) and written_as != path.stem:
            raise ValueError(f"was written as {written_as}.pth, another shard")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of kinds of tensors that `_check_parameters` refuses
            try:
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except Exception as error:  # whose text says how to load the file all the same, and run what is in it
                raise ValueError(
                    "holds something else than tensors, or is damaged: weights_only=True refuses it"
                ) from error
        if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
            raise ValueError(f"must hold a dictionary of tensors by name, got {shown(content)}")
    return {name: value for name, value in content.items() if not _BUFFERS.fullmatch(name)}


def _read_config(path: Path, shard: dict[str, Tensor]) -> MegalodonConfig:
    """The configuration; where it names no vocabulary, it has the embedding's size."""
    fields = read_json(path).get("model")
    with reading(path):
        if not isinstance(fields, dict):
            raise ValueError(f"must hold an object `model`, got {shown(fields)}")
        if is_whole(fields.get("vocab_size", -1), -1, 0) and getattr(shard.get(_EMBEDDING), "ndim", 0) == 2:
            fields = {**fields, "vocab_size": len(shard[_EMBEDDING])}
        return MegalodonConfig.from_dict(fields)


def _check_parameters(config: MegalodonConfig, shards: Shards) -> None:
    """Raises unless every shard holds its part of exactly the parameters of the configuration."""
    wanted = dict(config.parameter_shapes())
    if config.share_emb and all(_OUTPUT in shard for shard in shards.values()):  # the embedding a second time
        wanted[_OUTPUT] = wanted[_EMBEDDING]
    for path, shard in shards.items():
        for names, problem in ((wanted.keys() - shard.keys(), "missing"), (shard.keys() - wanted.keys(), "unknown")):
            if names:
                listed = ", ".join(ascii(name[:80])[1:-1] for name in sorted(names)[:4])
                raise FileError(f"{path}: {problem} parameters: {listed}{', ...' if len(names) > 4 else ''}")
        for name, shape in wanted.items():
            if type(tensor := shard[name]) not in OWN_TYPES:
                got = type(tensor).__name__
            elif tensor.is_meta or tensor.layout != torch.strided or tensor.dtype not in (*_NAMES, torch.float64):
                got = "a meta tensor" if tensor.is_meta else f"{tensor.layout} of {tensor.dtype}"
            else:
                times = [len(shards) if dim == _split_dim(name) else 1 for dim in range(tensor.ndim)]
                got = tuple(map(math.prod, zip(tensor.shape, times, strict=True)))  # of all shards together
            if got != shape:
                raise FileError(f"{path}: `{name}` must be a dense tensor of real numbers of shape {shape}, got {got}")


def _split_dim(name: str) -> int | None:
    return 1 if _SPLIT_DIM_1.fullmatch(name) else 0 if _SPLIT_DIM_0.fullmatch(name) else None


def _joined(name: str, shards: Shards) -> Tensor:
    first, *others = (shard[name] for shard in shards.values())
    if others and (dim := _split_dim(name)) is not None:
        return torch.cat([first, *others], dim)
    if not all(torch.equal(first, other) for other in others):
        raise FileError(f"{_files(shards)}: `{name}` must be equal in every shard, got other values")
    return first


def _own(weight: Tensor, places: set[int]) -> Tensor:
    """The weight, memory-mapped as it is, or a copy where it is a part of other memory or shares its own with others."""
    storage = weight.untyped_storage()
    alone = weight.is_contiguous() and storage.nbytes() == weight.nbytes and storage.data_ptr() not in places
    places.add(storage.data_ptr())
    return weight if alone else weight.clone(memory_format=torch.contiguous_format)


def _files(shards: Shards) -> str:
    first, *others = shards
    return f"{first} or another shard" if others else str(first)
