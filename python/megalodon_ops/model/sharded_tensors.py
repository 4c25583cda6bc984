"""Tensors that several processes write together, by torch.distributed.checkpoint, and any number of processes reads.

    distributed/  .metadata, __0_0.distcp, __1_0.distcp, ...     tensors under names `<kind>/<name>`

A process writes what it holds of a DTensor, and its share of the tensors that are alike on all. Reading asks for no
other process: each reads the parts that it holds. Nothing in a file is run: `.metadata` is unpickled with the classes
of torch's metadata alone, and tensors with `weights_only=True`.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, FileSystemWriter, Metadata

from ..files import file_size, opened, reading
from .weights import StoredTensors
from ..ops.common.checks import shown


class Archive(StoredTensors):
    """The tensors of one kind in a folder that several processes have written; `tensors` have no values."""

    def __init__(self, folder: Path, kind: str) -> None:
        super().__init__(place=folder)
        self._prefix = f"{kind}/"
        with opened(folder / ".metadata") as file:
            self._metadata = _Unpickler(file).load()
            for name, found in self._metadata.state_dict_metadata.items():
                if name.startswith(self._prefix):
                    tensor = torch.empty(found.size, dtype=found.properties.dtype, device="meta")
                    self.tensors[name.removeprefix(self._prefix)] = tensor

    def _read(self, name: str) -> Tensor:
        tensor = torch.empty_like(self.tensors[name], device="cpu")
        self.fill({name: tensor})
        return tensor

    def fill(self, tensors: dict[str, Tensor]) -> None:
        planner, reader = DefaultLoadPlanner(), FileSystemReader(self.place)
        named = {self._prefix + name: tensor.detach() for name, tensor in tensors.items()}
        for name in {info.relative_path for info in self._metadata.storage_data.values()}:
            file_size(self.place / name)
        with reading(self.place):
            planner.set_up_planner(named, self._metadata, True)
            reader.set_up_storage_reader(self._metadata, True)
            (plan,) = planner.create_global_plan([reader.prepare_local_plan(planner.create_local_plan())])
            (plan,) = reader.prepare_global_plan([plan])
            reader.read_data(planner.finish_plan(plan), planner).wait()


class ArchiveWriter(FileSystemWriter):
    """Writes such a folder; the first process calls `begin` before, and `finish` when all have written their files."""

    def __init__(self, folder: Path, begin: Callable[[], object], finish: Callable[[], object]) -> None:
        super().__init__(folder)
        self._begin, self._finish = begin, finish

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        super().set_up_storage_writer(is_coordinator, *args, **kwargs)
        if is_coordinator:
            self._begin()

    def finish(self, metadata: Metadata, results: list) -> None:
        super().finish(metadata, results)
        self._finish()


_CLASSES = {
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},
}
"""What `.metadata` is made of, by module: classes that describe tensors and where they are, and a look-up of a name"""


class _Unpickler(pickle.Unpickler):
    """Makes objects of these classes and of no others."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):  # by which Python 3.11.2 pickles a member of an enumeration
            return lambda kind, member: kind.__members__[member]
        if name not in _CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"{shown(f'{module}.{name}')} does not belong here")
        return super().find_class(module, name)
