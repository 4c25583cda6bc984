"""Files of weights: `model.safetensors`, or shards of it and an index, in the layout of Hugging Face's hub.

A fault raises a FileError of one line that begins with the file's path, or a FileNotFoundError.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..inference.parameters import Shapes, allowed_dtypes
from .files import FileError, file_size, read_json, reading, write_safetensors
from ..ops.common.definition import OWN_TYPES
from ..ops.common.memory import is_finite
from ..ops.common.checks import short_text

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def is_weight_file(name: str) -> bool:
    return name in (WHOLE, INDEX) or _SHARD.fullmatch(name) is not None


def write_weights(folder: Path, tensors: dict[str, Tensor], max_bytes: int) -> None:
    """Write the tensors, in order, to one file, or to shards of at most `max_bytes` (or one tensor) and an index."""
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and tensor.nbytes + sum(other.nbytes for other in shards[-1].values()) > max_bytes:
            shards.append({})
        shards[-1][name] = tensor
    if len(shards) == 1:
        write_safetensors(folder / WHOLE, tensors)
        return
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / file, shard)
        index |= dict.fromkeys(shard, file)
    total = {"total_size": sum(tensor.nbytes for tensor in tensors.values())}
    (folder / INDEX).write_text(json.dumps({"metadata": total, "weight_map": index}, indent=1) + "\n")


class StoredTensors:
    """Memory-mapped tensors of safetensors files, by name. They are read at their first use; changes stay in memory."""

    def __init__(self, *paths: Path, path: Path | None = None) -> None:
        self.path = path or paths[0]  # begins error texts
        self.tensors: dict[str, Tensor] = {}
        for file in paths:
            file_size(file)
            with reading(file):
                self.tensors |= load_file(file)

    @classmethod
    def from_folder(cls, folder: Path) -> StoredTensors:
        """Open the weights in a folder: one file, or all shards that the index names."""
        has_index = os.path.lexists(folder / INDEX)
        if has_index and os.path.lexists(folder / WHOLE):
            raise FileError(f"{folder}: holds both {WHOLE} and {INDEX}; one of them must go")
        if not has_index:
            return cls(folder / WHOLE)
        index = read_json(folder / INDEX).get("weight_map")
        with reading(folder / INDEX):
            if not isinstance(index, dict) or not index:
                raise ValueError(f"must hold an object `weight_map`, got {short_text(index)}")
            for file in index.values():
                if not isinstance(file, str) or not _SHARD.fullmatch(file):
                    raise ValueError(f"files must be named as model-00001-of-00002.safetensors, got {short_text(file)}")
        return cls(*(folder / file for file in sorted(set(index.values()))), path=folder / INDEX)

    def get(self, name: str, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Tensor:
        """Return a tensor; raise unless it is finite in the given dtype."""
        tensor = self._read(name).to(device=device, dtype=dtype)
        if not is_finite(tensor):
            raise FileError(f"{self.path}: `{name}` must be finite as {tensor.dtype}, got NaN or infinity")
        return tensor

    def _read(self, name: str) -> Tensor:
        return self.tensors[name]

    def fill(self, tensors: dict[str, Tensor]) -> None:
        """Copy stored values into the tensors of the same names; into a DTensor, only this process's part."""
        for name, tensor in tensors.items():
            set_whole(tensor, self.get(name, tensor.dtype))

    def check(self, shapes: Shapes, dtypes: Mapping[str, torch.dtype] = {}) -> None:
        """Raise for the first tensor that is missing, unexpected, or of another shape or kind.

        dtypes: required dtypes by name; any other tensor may have any of WEIGHT_DTYPES.
        """
        remaining = dict(self.tensors)
        for name, shape in shapes:
            tensor = remaining.pop(name, None)
            if tensor is None:
                raise FileError(f"{self.path}: must hold the parameters of config.json; {short_text(name)} is missing")
            if tensor.dtype not in allowed_dtypes(name, dtypes) or tensor.shape != shape:
                got, kind = f"{tensor.dtype} {tuple(tensor.shape)}", dtypes.get(name, "floating-point numbers")
                raise FileError(f"{self.path}: `{name}` must be {kind} of shape {shape}, got {got}")
        if remaining:
            raise FileError(
                f"{self.path}: must hold the parameters of config.json; {short_text(min(remaining))} is none of them"
            )


@torch.no_grad()
def set_whole(tensor: Tensor, value: Tensor) -> None:
    """Copy a whole value into a tensor; into a DTensor, only this process's part."""
    if type(tensor) not in OWN_TYPES:  # a DTensor
        from torch.distributed.tensor import distribute_tensor  # here: it takes long to load

        parts = distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)
        tensor, value = tensor.to_local(), parts.to_local()
    tensor.copy_(value)
