"""Files of weights: `model.safetensors`, or shards of it and an index, in the layout of Hugging Face's hub.

Every fault is a ValueError of one line that begins with the file's path, or a FileNotFoundError.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import extras
from .files import file_size, one_line, read_json, write_safetensors
from .state_layout import DTYPES
from ..ops.library import OWN_TYPES
from ..ops.memory import is_finite
from ..ops.values import shown

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DISTRIBUTED = "distributed"
"""The folder inside a folder, of files that several processes have written together"""
WEIGHT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_SHOWN = 4  # most names of tensors in an error

Shapes = Iterable[tuple[str, tuple[int, ...]]]


def is_weight_file(name: str) -> bool:
    """Whether a file of this name holds weights, or says where weights are."""
    return name in (WHOLE, INDEX) or _SHARD.fullmatch(name) is not None


def write_weights(folder: Path, tensors: dict[str, Tensor], max_bytes: int) -> None:
    """Writes the tensors, in their order, to one file or to shards of at most `max_bytes` (or one tensor) each."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        write_safetensors(folder / WHOLE, tensors)
        return
    weight_map = {}
    for i, shard in enumerate(shards):
        name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / name, shard)
        weight_map |= dict.fromkeys(shard, name)
    total = {"total_size": sum(tensor.nbytes for tensor in tensors.values())}
    (folder / INDEX).write_text(json.dumps({"metadata": total, "weight_map": weight_map}, indent=1) + "\n")


class StoredTensors:
    """Tensors on the disk: their names, dtypes and shapes, and on demand their values."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[torch.dtype | None, tuple[int, ...]]] = {}
        """Dtype and shape by name; a dtype that no weight has is None"""
        self.where: dict[str, Path] = {}

    def check(self, wanted: Shapes, *, of: str) -> None:
        """Raises unless the tensors are those wanted and no other; a wanted list may be endless, so few are looked for.

        `of` says in the error what wants them.
        """
        known, missing = set(), []
        for name, shape in wanted:
            known.add(name)
            if name not in self.found:
                missing.append(name)
                if len(missing) > _SHOWN:
                    break
                continue
            self.check_one(name, shape)
        unknown = sorted(self.found.keys() - known)
        for names, problem in ((missing, "are missing"), (unknown, "are none of them")):
            if names:
                listed = ", ".join(shown(name) for name in names[:_SHOWN]) + ", ..." * (len(names) > _SHOWN)
                raise ValueError(f"{self._place(names[0])}: must hold the parameters {of}; {listed} {problem}")

    def check_one(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises unless a tensor, which is there, is one of weights and has this shape."""
        dtype, found = self.found[name]
        if dtype not in WEIGHT_DTYPES:
            raise ValueError(f"{self.where[name]}: `{name}` must be float32, bfloat16, float16 or float64")
        if found != shape:
            raise ValueError(f"{self.where[name]}: `{name}` must have shape {shape}, got {found}")

    def get(self, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor, finite in the dtype asked for."""
        raise NotImplementedError

    def get_as_it_is(self, name: str) -> Tensor:
        """A tensor as it is on the disk; its values are not looked at."""
        raise NotImplementedError

    def fill(self, tensors: dict[str, Tensor]) -> None:
        """Gives tensors the values that are on the disk under their names; of a DTensor, the part of this process."""
        raise NotImplementedError

    def _place(self, name: str) -> Path:
        raise NotImplementedError


class WeightFiles(StoredTensors):
    """The tensors of one file of safetensors or of several."""

    def __init__(self, paths: Iterable[Path]) -> None:
        super().__init__()
        self._files: dict[Path, Any] = {}
        for path in paths:
            with reading(path):
                file = self._open(path)
                for name in file.keys():  # noqa: SIM118
                    if name in self.where:
                        raise ValueError(f"{shown(name)} is in {self.where[name].name}, too")
                    tensor = file.get_slice(name)
                    self.found[name] = DTYPES.get(tensor.get_dtype()), tuple(tensor.get_shape())
                    self.where[name] = path
                self._files[path] = file

    @classmethod
    def of_folder(cls, folder: Path) -> WeightFiles:
        """The weights in a folder, whose index, if there is one, must agree with its files."""
        has_whole, has_index = (os.path.lexists(folder / name) for name in (WHOLE, INDEX))
        if has_whole and has_index:
            raise ValueError(f"{folder}: holds both {WHOLE} and {INDEX}; one of them must go")
        if not has_index:
            return cls([folder / WHOLE])
        index = read_json(folder / INDEX).get("weight_map")
        if not isinstance(index, dict) or not index:
            raise ValueError(f"{folder / INDEX}: must hold an object `weight_map`, got {shown(index)}")
        for file in index.values():
            if not isinstance(file, str) or not _SHARD.fullmatch(file):
                raise ValueError(
                    f"{folder / INDEX}: files must be named as model-00001-of-00002.safetensors, got {shown(file)}"
                )
        files = cls(folder / file for file in sorted(set(index.values())))
        for name, file in index.items():
            if name not in files.where or files.where[name].name != file:
                raise ValueError(f"{folder / file}: does not hold {shown(name)}, which {INDEX} says")
        if unknown := [name for name in files.where if name not in index]:
            raise ValueError(f"{files.where[unknown[0]]}: holds {shown(unknown[0])}, which {INDEX} does not name")
        return files

    def get(self, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor, finite in the dtype asked for; as it is on the disk, it is memory-mapped and changes privately."""
        path = self.where[name]
        with reading(path):
            if self.found[name][0] == dtype and device.type == "cpu":
                tensor = self._files[path].get_tensor(name)
            else:  # another mapping, which ends here, so that pages that were read do not stay resident
                tensor = self._open(path).get_tensor(name).to(device=device, dtype=dtype)
            if not is_finite(tensor):
                raise ValueError(f"`{name}` must be finite as {dtype}, got NaN or infinity")
        return tensor

    def get_as_it_is(self, name: str) -> Tensor:
        """A tensor as it is on the disk, memory-mapped; its values are not looked at."""
        path = self.where[name]
        with reading(path):
            return self._files[path].get_tensor(name)

    @torch.no_grad()
    def fill(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            value = self.get(name, tensor.dtype, torch.device("cpu"))
            if type(tensor) not in OWN_TYPES:  # a DTensor; its module takes long to load
                from ..distributed.fsdp import local_part

                tensor, value = tensor.to_local(), local_part(value, tensor)
            tensor.copy_(value)

    def _place(self, name: str) -> Path:
        paths = list(self._files)
        return self.where.get(name) or (paths[0] if len(paths) == 1 else paths[0].parent)

    @staticmethod
    def _open(path: Path) -> Any:
        file_size(path)
        return extras.load("safetensors", "train").safe_open(path, "pt")


def stored_weights(folder: Path) -> StoredTensors:
    """The weights in a folder, in files of safetensors or in the files of the processes that wrote them together."""
    if not os.path.lexists(folder / DISTRIBUTED):
        return WeightFiles.of_folder(folder)
    for name in (WHOLE, INDEX):
        if os.path.lexists(folder / name):
            raise ValueError(f"{folder}: holds both {name} and {DISTRIBUTED}/; one of them must go")
    from ..distributed.checkpoint import Archive  # here: torch.distributed.checkpoint takes long to load

    return Archive(folder).part("model")


class reading:
    """Turns whatever the reader of a file raises into a ValueError that names the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, (FileNotFoundError, ModuleNotFoundError, MemoryError)):
            return
        panic = type(error).__name__ == "PanicException"  # of Rust, which safetensors is written in
        if not (isinstance(error, Exception) or panic):
            return
        text = one_line(error)
        raise ValueError(text if text.startswith(str(self.path)) else f"{self.path}: {text}") from error


def plain_tensors(model: nn.Module, wanted: Shapes, caller: str) -> dict[str, Tensor]:
    """The model's parameters by the names wanted, once they are what a file can hold."""
    by_name = dict(model.named_parameters(remove_duplicate=False))
    tensors = {}
    for name, shape in wanted:
        tensor = by_name.get(name)
        if tensor is None:
            raise ValueError(
                f"{caller}: `model` must have the parameters of its configuration, got no `{name}`; merge adapters, "
                "and undo what wraps its layers"
            )
        if type(tensor) not in OWN_TYPES or tensor.dtype not in WEIGHT_DTYPES or tensor.is_meta:
            got = "a meta tensor" if tensor.is_meta else f"{type(tensor).__name__} of {tensor.dtype}"
            raise ValueError(f"{caller}: `{name}` must be a tensor of floating-point numbers with values, got {got}.")
        if tensor.shape != shape:
            raise ValueError(f"{caller}: `{name}` must have shape {shape}, got {tuple(tensor.shape)}.")
        if not is_finite(tensor):
            raise ValueError(f"{caller}: `{name}` must be finite, got NaN or infinity.")
        tensors[name] = tensor
    return tensors


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
