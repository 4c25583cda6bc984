"""`training.json` of a checkpoint: the training program's fields, and sha256 sums of this file and the others."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import torch

from .. import _C
from ..storage.files import FileError, file_sha256, file_size, read_json, reading
from ..ops.common.checks import check_integer

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

FORMAT = 4
"""Version of the files' content; checkpoints of other versions are not read"""
RECORD = "training.json"
CHANGED = "was changed after it was written: its checksum does not match"


class Record(msgspec.Struct):
    """The fields of every `training.json`; a training program may add others."""

    format: Annotated[int, msgspec.Meta(ge=FORMAT, le=FORMAT)]
    step: Annotated[int, msgspec.Meta(ge=0)]
    megalodon_ops: str
    torch: str
    optimizer: str | None
    """Name of the optimizer's class"""
    files: dict[str, dict[str, Any]]
    """`bytes` and `sha256` of each file, by its path in the folder"""
    checksum: str
    """sha256 of the other fields, independent of the file's layout"""
    mesh: dict[str, Annotated[int, msgspec.Meta(ge=1)]] = {}
    """Size by dimension, if several processes wrote the folder"""


def new_record(
    step: int, optimizer: torch.optim.Optimizer | None, program: dict[str, Any] | None, mesh: DeviceMesh | None = None
) -> dict[str, Any]:
    """Return the content of `training.json` without the sums of files; raise if `program` is no JSON."""
    own = {
        "format": FORMAT,
        "step": check_integer("save_checkpoint", "step", step, "an integer of at least 0, below 2^63", 0),
        "megalodon_ops": _C.build_info()["version"],
        "torch": torch.__version__,
        "optimizer": None if optimizer is None else type(optimizer).__name__,
        "mesh": {} if mesh is None else dict(zip(mesh.mesh_dim_names, mesh.shape, strict=True)),
    }
    program = json.loads(json.dumps(program or {}, allow_nan=False))
    if taken := set(program) & set(Record.__struct_fields__):
        raise ValueError(f"save_checkpoint: `record` must not contain {', '.join(sorted(taken))}, got them.")
    return own | program


def write_record(folder: Path, content: dict[str, Any]) -> None:
    """Write `training.json` beside the other files of the folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {str(path.relative_to(folder)): _facts(path) for path in paths}
    content = {**content, "files": files}
    (folder / RECORD).write_text(json.dumps({**content, "checksum": _checksum(content)}, indent=1) + "\n")


def read_record(folder: Path, *, verify: bool) -> dict[str, Any]:
    """Return the content of `training.json` after checking its fields and checksum; `verify` checks all files, too."""
    content = read_json(folder / RECORD)
    with reading(folder / RECORD):
        record = msgspec.convert(content, Record)
        if record.checksum != _checksum(content):
            raise ValueError(CHANGED)
    for name, facts in record.files.items() if verify else ():
        path = folder / name
        if file_size(path) != facts.get("bytes") or _facts(path) != facts:
            raise FileError(f"{path}: {CHANGED}")
    return content


def _checksum(content: dict[str, Any]) -> str:
    others = {name: value for name, value in content.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()


def _facts(path: Path) -> dict[str, Any]:
    return {"bytes": file_size(path), "sha256": file_sha256(path)}
