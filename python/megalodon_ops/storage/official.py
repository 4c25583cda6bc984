"""Checkpoints of the released code: config.json and a `.pth` file, or one `.pth` file per rank (read only)."""

import json
import os
import re
import shutil
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .folder import CONFIG, check_tokenizer, kept_files, model_of
from ..model.config import MegalodonConfig
from .files import FileError, as_path, drafting, file_size, read_json, reading, write_atomically
from ..model.gecko_block import has_gecko_parts
from ..model.inputs import check_reads_tokens
from ..model.megalodon import MegalodonBase
from ..inference.parameters import Model, plain_tensors
from .weights import StoredTensors
from ..ops.common.definition import OWN_TYPES
from ..ops.common.memory import check_fits, machine_memory
from ..ops.common.checks import describe, is_integer_between, short_text

# How a model-parallel checkpoint splits its parameters: along dim 1, along dim 0, or not at all.
_SPLIT_DIM_1 = re.compile(r"embed\.weight|.*\.mega\.(gamma|beta)|.*\.(wh2|fc2)\.weight|output\.output\.weight")
_SPLIT_DIM_0 = re.compile(
    r".*\.cema\.\w+|.*\.(timenorm|final_norm)\.(weight|bias)|.*\.(wv|wz|wr|wh1)\.(weight|bias)|.*\.(fc1|fc3)\.weight"
)
_BUFFERS = re.compile(r"(.*\.)?(rope\.freqs|prior_(count|mean|logv))")
_CONSOLIDATE_CONFIG = "consolidate_config.json"
_SHARD = re.compile(r"consolidated\.\d\d")
_WEIGHT_FILE = re.compile(r"consolidated(\.\d\d)?\.pth")
_DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_OWN_FIELDS = "eos_token_id working_memory visible_chunks num_features scale_inputs missing_values".split()
"""Fields that the released code does not have"""
_EMBEDDING, _OUTPUT = "embed.weight", "output.output.weight"


def save_official(model: MegalodonBase, directory: str | os.PathLike, *, tokenizer: Any = None) -> None:
    """Write the model as the released code does: :func:`load_official`, that code and megalodon-jax read the folder.

    Args:
        directory: a new or empty folder, or one in this format, whose weights are replaced.
        tokenizer: saved with the model; has a method `save(folder)`.

    The released code's buffers are written, too. `eos_token_id` is not written: that code does not have it. The write
    is atomic, as that of :meth:`Megalodon.save`.

    Raises:
        ValueError: the model's parameters are not those of its configuration, are not finite, or are float64. OSError:
        the folder cannot be written. TypeError: the model is no Megalodon; the released code has no encoder.

    Example:
        >>> import tempfile, megalodon_ops as mo
        >>> config = mo.MegalodonConfig(num_layers=1, model_dim=32, z_dim=16, value_dim=32, ffn_hidden_dim=32, vocab_size=9)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     mo.save_official(mo.Megalodon(config), f"{folder}/model")
        ...     mo.load_official(f"{folder}/model").config == config
        True
    """
    if not isinstance(model, MegalodonBase):
        raise TypeError(f"save_official: `model` must be a Megalodon, got {describe(model)}.")
    folder, config = as_path("save_official", "directory", directory), model.config
    check_tokenizer("save_official", tokenizer)
    if has_gecko_parts(config):
        raise ValueError(
            "save_official: `model` must have no working memory and see one chunk: the released code knows neither."
        )
    check_reads_tokens("save_official", config)
    weights = plain_tensors(model, config.parameter_shapes(), caller="save_official")
    if (dtype := weights[_EMBEDDING].dtype) not in _DTYPE_NAMES:
        raise ValueError(f"save_official: `model` must be {', '.join(map(str, _DTYPE_NAMES))}, got {dtype}.")
    weights = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
    if config.share_emb:
        weights[_OUTPUT] = weights[_EMBEDDING]
    with write_atomically(folder, folder=True) as draft:
        with drafting(folder.resolve(), "turn"):
            kept = kept_files("save_official", folder, is_official(folder), (CONFIG, _CONSOLIDATE_CONFIG))
        for path in kept:
            if not _WEIGHT_FILE.fullmatch(path.name):
                shutil.copy2(path, draft / path.name, follow_symlinks=False)
        if tokenizer is not None:
            tokenizer.save(draft)
        torch.save(weights | _buffers(config), draft / "consolidated.pth")
        has_tokenizer = (draft / "tokenizer.model").exists()
        fields = {"path": str(folder.absolute() / "tokenizer.model") if has_tokenizer else None}
        released_fields = {name: value for name, value in config.to_dict().items() if name not in _OWN_FIELDS}
        (draft / CONFIG).write_text(json.dumps({"model": released_fields, "tokenizer": fields}, indent=1) + "\n")
        facts = {"model_parallel_size": 1, "dtype": _DTYPE_NAMES[dtype]}
        (draft / _CONSOLIDATE_CONFIG).write_text(json.dumps(facts, indent=1) + "\n")


def _buffers(config: MegalodonConfig) -> dict[str, Tensor]:
    """Buffers of the released code: rotary frequencies and the initial state of its norms."""
    pairs = config.z_dim // config.num_heads // 2
    periods = torch.tensor([config.rotary_base ** (pair / pairs) for pair in range(pairs)], dtype=torch.float32)
    buffers = {"rope.freqs": 1 / periods}
    for norm in (*(f"layers.{layer}.mega.timenorm" for layer in range(config.num_layers)), "output.final_norm"):
        buffers[f"{norm}.prior_count"] = torch.tensor(0)
        buffers[f"{norm}.prior_mean"] = torch.zeros(config.norm_num_groups)
        buffers[f"{norm}.prior_logv"] = torch.zeros(config.norm_num_groups)
    return buffers


def is_official(directory: Path) -> bool:
    """Return True if the folder holds a checkpoint of the released code."""
    return any(directory.glob("consolidated*.pth"))


def read_official(kind: type[Model], directory: Path, dtype: torch.dtype, device: torch.device) -> Model:
    """Read a folder of the released code as a model of the class `kind`, in evaluation mode."""
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: no such folder")
    if not (directory / CONFIG).exists():
        raise FileNotFoundError(f"{directory}: no config.json in this folder, so the released code did not write it")
    weights = _Shards(directory)
    config = _read_config(directory / CONFIG, weights.tensors.get(_EMBEDDING))
    with reading(directory):
        check_fits(config.num_parameters() * dtype.itemsize, "a model of its configuration", machine_memory())
    if config.share_emb and weights.tensors.keys() >= {_OUTPUT, _EMBEDDING}:
        if not torch.equal(weights.get(_OUTPUT), weights.get(_EMBEDDING)):
            raise FileError(f"{weights.path}: `{_OUTPUT}` must be the embedding, as `share_emb` is true, got others")
        del weights.tensors[_OUTPUT]
    weights.check(config.parameter_shapes())
    return model_of(kind, config, dtype, weights, device=device)


class _Shards(StoredTensors):
    """Parameters in the files of all ranks, joined when they are read. `tensors` has their shapes, on `meta`."""

    def __init__(self, directory: Path) -> None:
        whole = directory / "consolidated.pth"
        paths = sorted(directory.glob("consolidated.[0-9][0-9].pth"))
        if paths and whole.exists():
            raise FileError(f"{directory}: holds both {whole.name} and {paths[0].name}; one of them must go")
        paths = paths or [whole]
        super().__init__(path=paths[0] if len(paths) == 1 else directory)
        self._shards = [_read_shard(path) for path in paths]
        layouts = [{name: (t.dtype, *t.shape) for name, t in shard.items()} for shard in self._shards]
        for path, layout in zip(paths, layouts, strict=True):
            if different := sorted(name for name, _ in layout.items() ^ layouts[0].items()):
                raise FileError(
                    f"{path}: must hold parts as {paths[0].name} does, got another {short_text(different[0])}"
                )
        for name, part in self._shards[0].items():
            shape = [size * len(paths) if dim == _split_dim(name) else size for dim, size in enumerate(part.shape)]
            self.tensors[name] = torch.empty(shape, dtype=part.dtype, device="meta")

    def _read(self, name: str) -> Tensor:
        parts = [shard[name].detach() for shard in self._shards]
        first, *others = parts
        dim = _split_dim(name)
        if others and dim is not None:
            return torch.cat(parts, dim)
        if not all(torch.equal(first, other) for other in others):
            raise FileError(f"{self.path}: `{name}` must be equal in every shard, got other values")
        owns_storage = first.is_contiguous() and first.untyped_storage().nbytes() == first.nbytes
        return first if owns_storage else first.clone(memory_format=torch.contiguous_format)


def _read_shard(path: Path) -> dict[str, Tensor]:
    """Read the parameters in a file by name, memory-mapped, without the released code's buffers.

    The archive's CRC32 checksums are tested first, which torch.load does not do, at about 2 GB/s a core.
    """
    file_size(path)
    with reading(path):
        if not zipfile.is_zipfile(path):
            raise ValueError("is no archive of torch.save, or is cut short")
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise ValueError(f"is damaged: the checksum of {short_text(damaged)} in it does not match")
            written_as = min(archive.namelist()).partition("/")[0]
        if _SHARD.fullmatch(written_as) and written_as != path.stem:
            raise ValueError(f"was written as {written_as}.pth, another shard")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of tensors that the checks below refuse
            try:
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except Exception as error:  # torch's text explains how to run the code in the file
                raise ValueError(
                    "holds something else than tensors, or is damaged: weights_only=True refuses it"
                ) from error
        if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
            raise ValueError(f"must hold a dictionary of tensors by name, got {short_text(content)}")
        content = {name: value for name, value in content.items() if not _BUFFERS.fullmatch(name)}
        for name, value in content.items():
            if type(value) not in OWN_TYPES or value.is_meta or value.layout != torch.strided or value.is_quantized:
                raise ValueError(f"{short_text(name)} must be a dense tensor, got {describe(value)}")
    return content


def _read_config(path: Path, embedding: Tensor | None) -> MegalodonConfig:
    """Read the configuration; without a vocabulary size, use the embedding's."""
    fields = read_json(path).get("model")
    with reading(path):
        if not isinstance(fields, dict):
            raise ValueError(f"must hold an object `model`, got {short_text(fields)}")
        if is_integer_between(fields.get("vocab_size", -1), -1, 0) and embedding is not None and embedding.dim() == 2:
            fields = {**fields, "vocab_size": len(embedding)}
        return MegalodonConfig.from_dict(fields)


def _split_dim(name: str) -> int | None:
    if _SPLIT_DIM_1.fullmatch(name):
        return 1
    return 0 if _SPLIT_DIM_0.fullmatch(name) else None
