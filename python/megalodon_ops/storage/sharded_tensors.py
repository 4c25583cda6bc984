"""Tensors that several processes write with torch.distributed.checkpoint. Any number of processes can read them.

    distributed/  .metadata, __0_0.distcp, __1_0.distcp, ...     tensors under names `<kind>/<name>`

A process writes its part of each DTensor and its share of the replicated tensors. A process reads the parts that it
holds, without communication. No code in a file is run: `.metadata` is unpickled with torch's metadata classes alone,
and tensors with `weights_only=True`.
"""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, FileSystemWriter, Metadata

from .files import file_size, opened, reading
from .weights import StoredTensors
from ..ops.common.checks import short_text


class Archive(StoredTensors):
    """Tensors of one kind in a folder that several processes wrote. `tensors` has their shapes, on `meta`."""

    def __init__(self, folder: Path, kind: str) -> None:
        super().__init__(path=folder)
        self._prefix = f"{kind}/"
        with opened(folder / ".metadata") as file:
            self._metadata = _Unpickler(file).load()
            for name, stored in self._metadata.state_dict_metadata.items():
                if name.startswith(self._prefix):
                    tensor = torch.empty(stored.size, dtype=stored.properties.dtype, device="meta")
                    self.tensors[name.removeprefix(self._prefix)] = tensor

    def _read(self, name: str) -> Tensor:
        tensor = torch.empty_like(self.tensors[name], device="cpu")
        self.fill({name: tensor})
        return tensor

    def fill(self, tensors: dict[str, Tensor]) -> None:
        named = {self._prefix + name: tensor.detach() for name, tensor in tensors.items()}
        for name in {info.relative_path for info in self._metadata.storage_data.values()}:
            file_size(self.path / name)
        with reading(self.path):  # the steps of torch's `load` for one process
            planner, reader = DefaultLoadPlanner(), FileSystemReader(self.path)
            planner.set_up_planner(named, self._metadata, True)
            reader.set_up_storage_reader(self._metadata, True)
            (plan,) = planner.create_global_plan([reader.prepare_local_plan(planner.create_local_plan())])
            (plan,) = reader.prepare_global_plan([plan])
            reader.read_data(planner.finish_plan(plan), planner).wait()


class ArchiveWriter(FileSystemWriter):
    """Writer of an archive; rank 0 calls `on_begin` before and `on_finish` after all ranks write their files."""

    def __init__(self, folder: Path, on_begin: Callable[[], object], on_finish: Callable[[], object]) -> None:
        super().__init__(folder)
        self._on_begin, self._on_finish = on_begin, on_finish

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        super().set_up_storage_writer(is_coordinator, *args, **kwargs)
        if is_coordinator:
            self._on_begin()

    def finish(self, metadata: Metadata, results: list) -> None:
        super().finish(metadata, results)
        self._on_finish()


_ALLOWED_NAMES = {
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
"""Names that `.metadata` may hold, by module: classes that describe tensors and files, and a look-up of a layout"""


class _Unpickler(pickle.Unpickler):
    """Unpickler that refuses all names but those in `_ALLOWED_NAMES`."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):  # Python 3.11.2 pickles a member of an enumeration as a getattr
            return lambda kind, member: kind.__members__[member]
        if name not in _ALLOWED_NAMES.get(module, ()):
            raise pickle.UnpicklingError(f"{short_text(f'{module}.{name}')} does not belong here")
        return super().find_class(module, name)
