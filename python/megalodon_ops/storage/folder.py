"""A model in a folder: `config.json` and weights, as `Megalodon.save`, `train` and transformers write them.

    config.json, model.safetensors     written by one process; or shards and their index
    config.json, distributed/          written by several processes, see sharded_tensors.py
    modeling_megalodon.py              for transformers' `trust_remote_code=True`; nothing here reads it

A faulty file raises a FileError of one line that begins with the file's path, or a FileNotFoundError.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import _C
from ..model.config import CLIENT_NAMES, MegalodonConfig
from .files import FileError, as_path, drafting, read_json, reading, write_atomically
from ..inference.parameters import WEIGHT_DTYPES, Model, empty_model, plain_tensors, with_values
from ..inference.quantized_layers import METHOD, computing_dtype, stored_shapes
from .weights import StoredTensors, is_weight_file, write_weights
from ..ops.common.memory import check_fits, machine_memory
from ..ops.quantized_linear.quantized_linear import KINDS, check_activations
from ..ops.common.checks import as_device, check_integer, describe, did_you_mean, is_integer_between, short_text

FORMAT = 1
"""Version of the folder's content; newer folders are not read"""
CONFIG = "config.json"
AUTO_CLASSES = {
    "megalodon": {
        "AutoConfig": "MegalodonHFConfig",
        "AutoModel": "MegalodonModel",
        "AutoModelForCausalLM": "MegalodonForCausalLM",
        "AutoModelForSequenceClassification": "MegalodonForSequenceClassification",
        "AutoModelForTokenClassification": "MegalodonForTokenClassification",
    },
    "megalodon_encoder": {
        "AutoConfig": "MegalodonEncoderHFConfig",
        "AutoModel": "MegalodonEncoderModel",
        "AutoModelForMaskedLM": "MegalodonEncoderForMaskedLM",
        "AutoModelForSequenceClassification": "MegalodonEncoderForSequenceClassification",
        "AutoModelForTokenClassification": "MegalodonEncoderForTokenClassification",
    },
}
"""For each `model_type`, transformers' Auto classes and the classes of `megalodon_ops.hf` that they create"""
_MODULE = "modeling_megalodon"
_MODULE_TEXT = '''"""Classes of this folder's model for transformers' `trust_remote_code=True`, from the package megalodon_ops."""

try:
    from megalodon_ops.hf import *  # noqa: F403
except ModuleNotFoundError as error:
    if not str(error.name).startswith("megalodon_ops"):
        raise
    raise ImportError('this model needs megalodon_ops: pip install "megalodon_ops[hf]"') from error
'''
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
"""Files of a tokenizer, of this package or of transformers; saving another tokenizer replaces all of them"""
DISTRIBUTED = "distributed"
"""Subfolder of tensors that several processes have written"""
_RUN_FILES = ("training.json", "checkpoints")
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in WEIGHT_DTYPES}


def save_model(model: nn.Module, directory: str | os.PathLike, *, tokenizer: Any, max_shard_bytes: int) -> None:
    """:meth:`Megalodon.save`."""
    folder = as_path("save", "directory", directory)
    max_shard_bytes = check_integer("save", "max_shard_bytes", max_shard_bytes, "a positive integer", 1)
    check_tokenizer("save", tokenizer)
    written = (CONFIG,) if tokenizer is None else (CONFIG, *TOKENIZER_FILES)
    with write_atomically(folder, folder=True) as draft:
        with drafting(folder.resolve(), "turn"):
            kept = kept_files("save", folder, holds_model(folder, model.config.model_type), written)
        write_model(model, draft, tokenizer=tokenizer, max_shard_bytes=max_shard_bytes, caller="save")
        for path in kept:
            if not (draft / path.name).exists():
                shutil.copy2(path, draft / path.name, follow_symlinks=False)


def write_model(
    model: nn.Module, folder: Path, *, tokenizer: Any = None, max_shard_bytes: int = 4 << 30, caller: str
) -> None:
    """Write the files of a model and its tokenizer into an existing folder."""
    quantization = getattr(model, "quantization", None)
    tensors = plain_tensors(model, *stored_shapes(model.config, quantization), caller=caller)
    activations = getattr(model, "activations", None)
    write_config(model.config, computing_dtype(model), folder, tokenizer, quantization, activations)
    write_weights(folder, tensors, max_shard_bytes)


def write_config(
    config: MegalodonConfig,
    dtype: torch.dtype,
    folder: Path,
    tokenizer: Any,
    quantization: str | None = None,
    activations: str | None = None,
) -> None:
    """Write `config.json` of a model that computes in this dtype, and the tokenizer's files."""
    fields = {
        "model_type": config.model_type,
        "architectures": [config.architecture],
        "format": FORMAT,
        "megalodon_ops_version": _C.build_info()["version"],
        "dtype": str(dtype).removeprefix("torch."),
        "auto_map": auto_map(config.model_type),
        **config.to_dict(),
        **{name: getattr(config, field) for name, field in CLIENT_NAMES.items()},
    }
    if quantization:
        own = {"activations": activations} if activations else {}
        fields["quantization_config"] = {"quant_method": METHOD, "kind": quantization, **own}
    (folder / CONFIG).write_text(json.dumps(fields, indent=1) + "\n")
    write_module(folder)
    if tokenizer is not None:
        tokenizer.save(folder)


def auto_map(model_type: str) -> dict[str, str]:
    """Return the entry `auto_map` of `config.json`: for each Auto class, the class in the folder's module."""
    return {auto: f"{_MODULE}.{name}" for auto, name in AUTO_CLASSES[model_type].items()}


def write_module(folder: Path) -> None:
    (folder / f"{_MODULE}.py").write_text(_MODULE_TEXT)


def load_model(
    kind: type[Model], directory: str | os.PathLike, *, dtype: torch.dtype | None, device: torch.device | str
) -> Model:
    """:meth:`Megalodon.load`."""
    folder, device = as_path("load", "directory", directory), as_device("load", device)
    check_dtype("load", dtype)
    try:
        return read_model(kind, folder, dtype, device)
    except (FileNotFoundError, FileError) as error:
        raise type(error)(f"load: {error}") from error


def holds_model(folder: Path, model_type: str) -> bool:
    """Return True if the folder holds a model of this type, which saving a model there may replace."""
    try:
        return read_json(folder / CONFIG).get("model_type") == model_type
    except (OSError, ValueError):
        return False


def read_config(
    path: Path, kind: type[MegalodonConfig] = MegalodonConfig
) -> tuple[MegalodonConfig, torch.dtype | None]:
    """Read the configuration and the dtype in a folder's `config.json`.

    All fields but `eos_token_id` are required, so that a misspelt name is an error. Other fields, of transformers and
    its tools, are ignored; so is an encoder's `eos_token_id`, which Trainer takes from the tokenizer.
    """
    fields = read_json(path)
    with reading(path):
        if "model" in fields:
            raise ValueError("is that of a folder of the released code; megalodon_ops.load_official reads it")
        if fields.get("model_type") != kind.model_type:
            raise ValueError(f'`model_type` must be "{kind.model_type}", got {short_text(fields.get("model_type"))}')
        if not is_integer_between(number := fields.get("format", FORMAT), 1, FORMAT):
            raise ValueError(f"`format` must be {FORMAT}, got {short_text(number)}: a newer megalodon_ops wrote it")
        dtype = fields.get("dtype", fields.get("torch_dtype"))
        if dtype is not None and (not isinstance(dtype, str) or dtype not in _DTYPES):
            raise ValueError(f"`dtype` must be one of {', '.join(_DTYPES)}, got {short_text(dtype)}")
        names = [field.name for field in dataclasses.fields(kind)]
        fields["eos_token_id"] = fields.get("eos_token_id") if kind.causal else None
        if missing := [name for name in names if name not in fields]:
            others = [name for name in fields if name not in names and name not in CLIENT_NAMES]
            near = [f"; is `{name}` misspelt?" for name in others if did_you_mean(name, missing[:1])]
            raise ValueError(f"`{missing[0]}` is missing{''.join(near[:1])}")
        return kind(**{name: fields[name] for name in names}), _DTYPES.get(dtype)


def read_quantization(path: Path) -> tuple[str | None, str | None]:
    """Read the kind of a quantised model's weights, None: floating point, and that of its activations."""
    fields = read_json(path).get("quantization_config")
    with reading(path):
        if fields is None:
            return None, None
        if not isinstance(fields, dict) or fields.get("quant_method") != METHOD or fields.get("kind") not in KINDS:
            raise ValueError(
                f'`quantization_config` must have quant_method "{METHOD}" and a kind of {", ".join(KINDS)}, got '
                f"{short_text(fields)}: another tool has quantised the weights"
            )
        check_activations("quantization_config", fields.get("activations"))
        return fields["kind"], fields.get("activations")


def stored_tensors(folder: Path, kind: str = "model") -> StoredTensors | None:
    """Open a folder's tensors of a kind: "model" or, for a run, "optimizer", "state", "random". None if it has none."""
    if os.path.lexists(folder / DISTRIBUTED):
        from .sharded_tensors import Archive  # here: torch.distributed.checkpoint takes long to load

        archive = Archive(folder / DISTRIBUTED, kind)
        return archive if archive.tensors or kind == "model" else None
    if kind == "model":
        return StoredTensors.from_folder(folder)
    path = folder / f"{kind}.safetensors"
    return StoredTensors(path) if os.path.lexists(path) else None


def read_model_files(
    folder: Path, dtype: torch.dtype | None = None, kind: type[MegalodonConfig] = MegalodonConfig
) -> tuple[MegalodonConfig, torch.dtype, StoredTensors, str | None, str | None]:
    """Read configuration, dtype, weights and quantisation; raise unless they agree and the model fits in memory.

    dtype: dtype of the linear layers and the embedding; None: that of `config.json`, or else that of the weights.
    """
    before = folder.stat()
    config, stored = read_config(folder / CONFIG, kind)
    quantization, activations = read_quantization(folder / CONFIG)
    dtype = dtype or stored or (torch.float32 if quantization else None)
    with reading(folder / CONFIG):
        bits = {"int8": 8, "int4": 4, None: 8 * (dtype or torch.bfloat16).itemsize}[quantization]
        check_fits(config.num_parameters() * bits // 8, "a model of this configuration", machine_memory())
    shapes, quantised_dtypes = stored_shapes(config, quantization)
    weights = stored_tensors(folder)
    if not kind.causal:
        for name in ("output.weight", "score.weight", "score.bias"):  # heads that models of transformers add
            weights.tensors.pop(name, None)
    weights.check(shapes, quantised_dtypes)
    if not os.path.samestat(before, folder.stat()):  # replaced during the reads: the files may be of two models
        return read_model_files(folder, dtype, kind)
    return config, dtype or weights.tensors["embed.weight"].dtype, weights, quantization, activations


def read_model(kind: type[Model], folder: Path, dtype: torch.dtype | None, device: torch.device) -> Model:
    """:meth:`Megalodon.load` with checked arguments."""
    check_folder(folder)
    return model_of(kind, *read_model_files(folder, dtype, kind.config_type), device=device)


def model_of(
    kind: type[Model],
    config: MegalodonConfig,
    dtype: torch.dtype,
    weights: StoredTensors,
    quantization: str | None = None,
    activations: str | None = None,
    *,
    device: torch.device,
) -> Model:
    """Build a model from checked weights, in evaluation mode."""
    model = empty_model(kind, config, dtype, quantization, activations)
    values = {name: weights.get(name, parameter.dtype, device) for name, parameter in model.named_parameters()}
    return with_values(model, values)


def check_folder(folder: Path) -> None:
    """Raise unless there is a folder with a `config.json`."""
    if not os.path.lexists(folder):
        raise FileNotFoundError(f"{folder}: no such folder")
    if not folder.is_dir():
        raise FileError(f"{folder}: must be a folder, got a file")
    if not os.path.lexists(folder / CONFIG):
        run = any(os.path.lexists(folder / name) for name in _RUN_FILES)
        hint = "; it is a run of `megalodon-ops train`: name a folder in its checkpoints/" if run else ""
        raise FileNotFoundError(f"{folder}: no {CONFIG} in this folder{hint}")


def kept_files(caller: str, folder: Path, is_checkpoint: bool, written: Iterable[str]) -> list[Path]:
    """Return the files that saving a model in a folder keeps; raise unless it is new, empty or a checkpoint."""
    if not folder.exists():
        return []
    wrong = f"{caller}: `directory` must be a new folder or a checkpoint, got {folder}"
    if not folder.is_dir():
        raise ValueError(f"{wrong}, a file.")
    if folder.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise ValueError(f"{wrong}, the working directory; name a folder inside it.")
    paths = sorted(folder.iterdir())
    if paths and not is_checkpoint:
        raise ValueError(f"{wrong}, which holds other files.")
    for path in paths:
        if path.name in _RUN_FILES:
            raise ValueError(f"{wrong}, a training run's.")
        if path.is_dir() and not path.is_symlink():
            raise ValueError(f"{wrong}, which holds {path.name}/.")
    return [path for path in paths if path.name not in written and not is_weight_file(path.name)]


def check_tokenizer(caller: str, tokenizer: Any) -> None:
    """Raise a TypeError unless the tokenizer has a method `save` or is None."""
    if tokenizer is not None and not callable(getattr(tokenizer, "save", None)):
        raise TypeError(f"{caller}: `tokenizer` must have `save(folder)` or be None, got {describe(tokenizer)}.")


def check_dtype(caller: str, dtype: object) -> None:
    """Raise unless the value is None or a dtype that weights can have."""
    if dtype is not None and dtype not in WEIGHT_DTYPES:
        fix = f"; use torch.{dtype}." if isinstance(dtype, str) and dtype in _DTYPES else "."
        raise ValueError(f"{caller}: `dtype` must be a dtype of 16 bits or more, or None, got {short_text(dtype)}{fix}")
