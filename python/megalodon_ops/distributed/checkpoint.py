"""Tensors that several processes write together, by torch.distributed.checkpoint, and any number of processes reads.

    step-00000100/distributed/  .metadata, __0_0.distcp, __1_0.distcp, ...     tensors under names `<part>/<name>`

A process writes what it holds of a DTensor, and its share of the tensors that are alike on all. Reading asks for no
other process: each reads the parts that it holds. Nothing in a file is run: `.metadata` is unpickled with the classes of
torch's metadata alone, and tensors with `weights_only=True`.

Every fault of a file is a ValueError of one line that begins with the file's path, or a FileNotFoundError.
"""

from __future__ import annotations

import dataclasses
import enum
import pathlib
import pickle
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint import filesystem as torch_filesystem
from torch.distributed.checkpoint import metadata as torch_metadata
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from ..model.files import file_facts, file_size
from ..model.weights import DISTRIBUTED, StoredTensors, reading
from ..ops.memory import is_finite
from ..ops.values import shown

METADATA = ".metadata"
_FILE_NAME = re.compile(r"__\d+_\d+\.distcp")


class Archive:
    """The files in a checkpoint's folder `distributed/`: names, dtypes and shapes, and on demand values."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / DISTRIBUTED
        self._metadata = _read_metadata(self.path / METADATA)
        self.files = {info.relative_path for info in self._metadata.storage_data.values()}
        """Names of the files that hold the tensors"""
        for name in self.files:
            if not isinstance(name, str) or not _FILE_NAME.fullmatch(name):
                raise ValueError(f"{self.path / METADATA}: files must be named as __0_0.distcp, got {shown(name)}")

    def part(self, name: str) -> ArchivePart:
        """The tensors under `<name>/`."""
        return ArchivePart(self, name)

    def tensors(self) -> Iterable[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Name, dtype and shape of every tensor."""
        for name, found in self._metadata.state_dict_metadata.items():
            if not isinstance(found, torch_metadata.TensorStorageMetadata):
                raise ValueError(f"{self.path / METADATA}: {shown(name)} must be a tensor")
            yield name, found.properties.dtype, tuple(found.size)

    def fill(self, tensors: dict[str, Tensor]) -> None:
        """Gives tensors the values that are on the disk under their names; of a DTensor, this process's part."""
        planner, reader = DefaultLoadPlanner(), FileSystemReader(self.path)
        with reading(self.path):
            planner.set_up_planner(dict(tensors), self._metadata, True)
            reader.set_up_storage_reader(self._metadata, True)
            (plan,) = planner.create_global_plan([reader.prepare_local_plan(planner.create_local_plan())])
            (plan,) = reader.prepare_global_plan([plan])
            reader.read_data(planner.finish_plan(plan), planner).wait()


class ArchivePart(StoredTensors):
    """The tensors of an archive under `<part>/`, by the names without it."""

    def __init__(self, archive: Archive, part: str) -> None:
        super().__init__()
        self._archive, self._prefix = archive, f"{part}/"
        for name, dtype, shape in archive.tensors():
            if name.startswith(self._prefix):
                self.found[name.removeprefix(self._prefix)] = dtype, shape
                self.where[name.removeprefix(self._prefix)] = archive.path

    def get(self, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        tensor = self.get_as_it_is(name).to(device=device, dtype=dtype)
        self._check_finite(name, tensor)
        return tensor

    def get_as_it_is(self, name: str) -> Tensor:
        dtype, shape = self.found[name]
        tensor = torch.empty(shape, dtype=dtype)
        self._archive.fill({self._prefix + name: tensor})
        return tensor

    @torch.no_grad()
    def fill(self, tensors: dict[str, Tensor]) -> None:
        self._archive.fill({self._prefix + name: tensor.detach() for name, tensor in tensors.items()})
        for name, tensor in tensors.items():
            self._check_finite(name, local(tensor))

    def _check_finite(self, name: str, tensor: Tensor) -> None:
        if tensor.is_floating_point() and not is_finite(tensor):
            raise ValueError(f"{self._archive.path}: `{name}` must be finite as {tensor.dtype}, got NaN or infinity")

    def _place(self, name: str) -> Path:
        return self._archive.path


class ArchiveWriter(FileSystemWriter):
    """Writes an archive, and knows then the sizes and sha256 sums of its files: each process reads its own for this."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / DISTRIBUTED)
        self.facts: dict[str, dict[str, Any]] = {}
        """Bytes and sha256 sum of each file, in the process that coordinates the others, when all is written"""

    def write_data(self, plan: Any, planner: Any) -> torch.futures.Future[list[WriteResult]]:
        results = super().write_data(plan, planner).wait()
        names = {result.storage_data.relative_path for result in results}
        facts = {name: file_facts(Path(self.path, name)) for name in names}
        with_facts = [
            _WriteResult(
                result.index, result.size_in_bytes, result.storage_data, facts[result.storage_data.relative_path]
            )
            for result in results
        ]
        future: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        future.set_result(with_facts)
        return future

    def finish(self, metadata: torch_metadata.Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        for result in (result for of_rank in results for result in of_rank):
            self.facts[result.storage_data.relative_path] = result.facts
        self.facts[METADATA] = file_facts(Path(self.path, METADATA))


@dataclasses.dataclass(frozen=True)
class _WriteResult(WriteResult):
    facts: dict[str, Any]
    """Bytes and sha256 sum of the file that holds the tensor"""


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its elements in every process, each of which calls this function."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def as_rows(tensor: Tensor, mesh: DeviceMesh) -> DTensor:
    """A tensor whose rows, dim 0, are split over the mesh's dimension `data`, made of this process's equal share."""
    placements = [Shard(0) if name == "data" else Replicate() for name in mesh.mesh_dim_names or ()]
    if tensor.storage_offset() or not tensor.is_contiguous():  # torch cannot copy a DTensor of such a view
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    return DTensor.from_local(tensor, mesh, placements, run_check=False)


def _read_metadata(path: Path) -> torch_metadata.Metadata:
    file_size(path)
    with reading(path), open(path, "rb") as file:
        metadata = _Unpickler(file).load()
        if not isinstance(metadata, torch_metadata.Metadata) or not isinstance(metadata.storage_data, dict):
            raise ValueError("must hold the metadata of torch.distributed.checkpoint")
    return metadata


class _Unpickler(pickle.Unpickler):
    """Makes objects of the classes that describe tensors and where they are, and of no others."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch":
            found = getattr(torch, name, None)
            if found is torch.Size or isinstance(found, (torch.dtype, torch.layout)):
                return found
        home = {torch_metadata.__name__: torch_metadata, torch_filesystem.__name__: torch_filesystem}.get(module)
        if home is not None:
            found = getattr(home, name, None)
            if dataclasses.is_dataclass(found) or (isinstance(found, type) and issubclass(found, enum.Enum)):
                return found
        if module in ("pathlib", "pathlib._local") and name in ("PosixPath", "PurePosixPath"):
            return pathlib.PurePosixPath
        if (module, name) == ("torch.serialization", "_get_layout"):
            return _layout
        raise pickle.UnpicklingError(f"{shown(f'{module}.{name}')} does not belong here")


def _layout(name: str) -> torch.layout:
    found = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(found, torch.layout):
        raise pickle.UnpicklingError(f"{shown(name)} is no layout")
    return found
