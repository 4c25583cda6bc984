"""A model in a folder: `config.json` and weights, as `Megalodon.save`, `train` and transformers write them."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _C
from .config import MegalodonConfig
from .files import read_json, write_folder_atomically
from .weights import (
    INDEX, WEIGHT_DTYPES, WHOLE, StoredTensors, dtype_name, is_weight_file, plain_tensors, stored_weights, write_weights,
)  # fmt: skip
from ..errors import FileError
from ..ops.memory import check_fits
from ..ops.values import check_integer, described, is_whole, shown

if TYPE_CHECKING:
    from .model import Megalodon

FORMAT = 1
"""Counts the changes of the folder's content; folders of another format are not read"""
CONFIG = "config.json"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip
"""Files of a tokenizer, ours or transformers'; another tokenizer replaces all of them"""
_OF_A_RUN = ("training.json", "checkpoint.json", "checkpoints")
_OWN = ("architectures", "dtype", "format", "megalodon_ops_version", "model_type")
_OF_TRANSFORMERS = frozenset({
    "_attn_implementation_autoset", "_name_or_path", "add_cross_attention", "attn_implementation", "bos_token_id",
    "chunk_size_feed_forward", "cross_attention_hidden_size", "decoder_start_token_id", "eos_token_id", "id2label",
    "is_decoder", "is_encoder_decoder", "label2id", "output_attentions", "output_hidden_states", "pad_token_id", "prefix",
    "problem_type", "return_dict", "sep_token_id", "task_specific_params", "tie_word_embeddings", "tokenizer_class",
    "torch_dtype", "transformers_version", "use_cache",
})  # fmt: skip
"""Fields that transformers writes into every model's config.json, and that change nothing of what ours computes"""


def transformers_fields() -> frozenset[str]:
    """Names of fields of a `config.json` that change nothing of what a model of ours computes."""
    return _OF_TRANSFORMERS | set(_OWN)


def save_model(model: Megalodon, directory: str | os.PathLike, *, tokenizer: Any, max_shard_bytes: int) -> None:
    """:meth:`Megalodon.save`."""
    folder = as_path("save", "directory", directory)
    max_shard_bytes = check_integer("save", "max_shard_bytes", max_shard_bytes, "a positive integer", 1)
    check_tokenizer("save", tokenizer)
    kept = kept_files("save", folder, _is_ours(folder), (CONFIG, *_tokenizer_files(tokenizer)))
    with write_folder_atomically(folder) as draft:
        write_model(model, draft, tokenizer=tokenizer, max_shard_bytes=max_shard_bytes, caller="save")
        for path in kept:
            if not (draft / path.name).exists():
                shutil.copy2(path, draft / path.name, follow_symlinks=False)


def write_model(
    model: Megalodon, folder: Path, *, tokenizer: Any = None, max_shard_bytes: int = 4 << 30, caller: str
) -> None:
    """Writes the files of a model and its tokenizer into a folder that exists."""
    tensors = plain_tensors(model, model.config.parameter_shapes(), caller)
    write_config(model.config, tensors["embed.weight"].dtype, folder)
    write_weights(folder, tensors, max_shard_bytes)
    if tokenizer is not None:
        tokenizer.save(folder)


def write_config(config: MegalodonConfig, dtype: torch.dtype, folder: Path) -> None:
    """Writes `config.json` of a model whose linear layers have this dtype."""
    fields = {
        "model_type": "megalodon",
        "architectures": ["MegalodonForCausalLM"],
        "format": FORMAT,
        "megalodon_ops_version": _C.build_info()["version"],
        "dtype": dtype_name(dtype),
        **config.to_dict(),
    }
    (folder / CONFIG).write_text(json.dumps(fields, indent=1) + "\n")


def load_model(
    kind: type[Megalodon], directory: str | os.PathLike, *, dtype: torch.dtype | None, device: torch.device | str
) -> Megalodon:
    """:meth:`Megalodon.load`."""
    folder, device = as_path("load", "directory", directory), as_device("load", device)
    check_dtype("load", dtype)
    try:
        return read_model(kind, folder, dtype, device)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"load: {error}") from error
    except ValueError as error:
        raise FileError(f"load: {error}") from error


def is_own(folder: Path) -> bool:
    """Whether the folder holds weights, or a configuration, as :meth:`Megalodon.save` and transformers write them."""
    return any(os.path.lexists(folder / name) for name in (WHOLE, INDEX, CONFIG))


def _is_ours(folder: Path) -> bool:
    """Whether the folder's configuration is that of a model of ours, which saving another one may replace."""
    try:
        fields = read_json(folder / CONFIG)
    except (OSError, ValueError):
        return False
    return fields.get("model_type") == "megalodon"


def read_config(path: Path) -> tuple[MegalodonConfig, torch.dtype | None]:
    """The configuration in a folder's `config.json`, and the dtype that it names."""
    fields = read_json(path)
    try:
        return _config_of(fields)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _config_of(fields: dict[str, Any]) -> tuple[MegalodonConfig, torch.dtype | None]:
    if "model" in fields:
        raise ValueError("is that of a folder of the released code; megalodon_ops.load_official reads it")
    if fields.get("model_type") != "megalodon":
        raise ValueError(f'`model_type` must be "megalodon", got {shown(fields.get("model_type"))}')
    if "max_positions" in fields:
        raise ValueError(
            "is that of the pure-PyTorch port megalodon-hf, another function; `python -m megalodon_ops convert "
            "--from port` converts it and says by how much results differ"
        )
    if not is_whole(number := fields.get("format", FORMAT), 1, FORMAT):
        raise ValueError(f"`format` must be {FORMAT}, got {shown(number)}: a newer megalodon_ops wrote it")
    names = {dtype_name(dtype): dtype for dtype in WEIGHT_DTYPES}
    name = fields.get("dtype", fields.get("torch_dtype"))
    if name is not None and (not isinstance(name, str) or name not in names):
        raise ValueError(f"`dtype` must be one of {', '.join(names)}, got {shown(name)}")
    known = [field.name for field in dataclasses.fields(MegalodonConfig)]
    for field in known:
        if field not in fields:
            raise ValueError(f"`{field}` is missing")
    for field in fields:
        if field not in known and field not in _OWN and field not in _OF_TRANSFORMERS:
            raise ValueError(f"{shown(field)} is an unknown field")
    return MegalodonConfig(**{field: fields[field] for field in known}), names.get(name)


def read_model_files(folder: Path) -> tuple[MegalodonConfig, torch.dtype | None, StoredTensors]:
    """Configuration, dtype in `config.json` and weights on the disk, once they agree and the model fits in memory."""
    config, dtype = read_config(folder / CONFIG)
    check_fits(config.num_parameters() * torch.bfloat16.itemsize, f"{folder / CONFIG}: a model of this configuration")
    weights = stored_weights(folder)
    weights.check(config.parameter_shapes(), of=f"of {CONFIG}")
    return config, dtype, weights


def read_model(kind: type[Megalodon], folder: Path, dtype: torch.dtype | None, device: torch.device) -> Megalodon:
    """:meth:`Megalodon.load` of arguments that were checked."""
    check_folder(folder)
    config, stored, weights = read_model_files(folder)
    dtype = dtype or stored or weights.found["embed.weight"][0]
    size = config.num_parameters() * dtype.itemsize
    if device.type == "cpu":
        check_fits(size, f"{folder}: the model")
    with torch.device("meta"):
        model = kind(config).to(dtype)
    values: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        values[name] = weights.get(name, parameter.dtype, device)
    if config.share_emb:
        values["output.output.weight"] = values["embed.weight"]
    model.load_state_dict(values, strict=True, assign=True)
    model.tie_weights()
    return model.eval()


def load_weights(model: Megalodon, folder: Path) -> None:
    """Copies the weights of a folder of the model's configuration into the model's own memory.

    Of a model that is split over processes, each takes its own part.
    """
    config, _, weights = read_model_files(folder)
    if config != model.config:
        raise ValueError(f"{folder / CONFIG}: must be the model's configuration, got another")
    weights.fill(dict(model.named_parameters()))


def check_folder(folder: Path) -> None:
    """Raises unless there is a folder with a `config.json`."""
    if not os.path.lexists(folder):
        raise FileNotFoundError(f"{folder}: no such folder")
    if not folder.is_dir():
        raise ValueError(f"{folder}: must be a folder, got a file")
    if not os.path.lexists(folder / CONFIG):
        run = any(os.path.lexists(folder / name) for name in _OF_A_RUN)
        hint = "; it is a run of `python -m megalodon_ops train`: name a folder in its checkpoints/" if run else ""
        raise FileNotFoundError(f"{folder}: no {CONFIG} in this folder{hint}")


def kept_files(caller: str, folder: Path, is_checkpoint: bool, written: Iterable[str]) -> list[Path]:
    """The files of a folder that saving a model there leaves as they are; raises where saving would harm others."""
    if not os.path.lexists(folder):
        return []
    if not folder.is_dir():
        raise ValueError(f"{caller}: `directory` must be a folder, got the file {folder}.")
    if Path.cwd() == (real := folder.resolve()) or real in Path.cwd().parents:
        raise ValueError(
            f"{caller}: `directory` must not be the working directory, got {folder}; name a folder inside it."
        )
    paths = sorted(folder.iterdir())
    if paths and not is_checkpoint:
        raise ValueError(
            f"{caller}: `directory` must be a new folder or a checkpoint, got {folder}, which holds other files."
        )
    for path in paths:
        if path.name in _OF_A_RUN:
            raise ValueError(f"{caller}: `directory` must not be a checkpoint of a training run, got {folder}.")
        if path.is_dir() and not path.is_symlink():
            raise ValueError(
                f"{caller}: `directory` must be a folder of files alone, got {folder}, which holds {path.name}/."
            )
    return [path for path in paths if path.name not in written and not is_weight_file(path.name)]


def _tokenizer_files(tokenizer: Any) -> tuple[str, ...]:
    return () if tokenizer is None else TOKENIZER_FILES


def check_tokenizer(caller: str, tokenizer: Any) -> None:
    """Raises a TypeError unless the tokenizer can write itself or is None."""
    if tokenizer is not None and not callable(getattr(tokenizer, "save", None)):
        raise TypeError(
            f"{caller}: `tokenizer` must have a method `save(folder)` or be None, got {described(tokenizer)}."
        )


def as_path(caller: str, argument: str, value: object) -> Path:
    """The value as a path, or a TypeError."""
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{caller}: `{argument}` must be a path, got {described(value)}.")
    return Path(value)


def check_dtype(caller: str, dtype: object) -> None:
    """Raises unless the value is None or a dtype that weights can have."""
    if dtype is not None and dtype not in WEIGHT_DTYPES:
        raise ValueError(f"{caller}: `dtype` must be a torch dtype of 16 bits or more, or None, got {shown(dtype)}.")


def as_device(caller: str, value: object) -> torch.device:
    """The value as a device, or a ValueError."""
    try:
        return torch.device(value)
    except (RuntimeError, TypeError):
        raise ValueError(
            f'{caller}: `device` must be a device as torch names them, such as "cpu", got {shown(value)}.'
        ) from None
