"""Checkpoints on disk: safetensors and JSON, each folder complete or not there.

    run/checkpoints/step-00000100/model.safetensors, optimizer.safetensors, ..., checkpoint.json

A folder is written under another name, flushed to the disk and renamed, so a process killed at any moment leaves the
newest complete checkpoint as it was; a folder that cannot be finished, on a full disk, is removed. `checkpoint.json`
holds the sizes and sha256 sums of the other files and a sum of its own content. A folder that does not agree with
`checkpoint.json`, or with what a run writes (`schema`), is passed over.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from megalodon_ops import MegalodonConfig
from megalodon_ops.cli import schema
from megalodon_ops.cli.errors import CommandError
from megalodon_ops.model.files import file_size, read_json
from megalodon_ops.model.official import is_official
from megalodon_ops.ops.values import is_whole, shown

FORMAT = 2
"""Counts the changes of the files' content; checkpoints of another format are not read"""
KEPT = 2
"""How many checkpoints of a run stay"""


class Checkpoint(NamedTuple):
    folder: Path
    record: dict[str, Any]
    parts: dict[str, dict[str, Tensor]]
    """Tensors by file, then by name"""


def save(run: Path, step: int, record: dict[str, Any], parts: dict[str, dict[str, Tensor]]) -> Path:
    root = run / "checkpoints"
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob(".*"):  # drafts of a process that was killed
        shutil.rmtree(leftover)

    folder = root / f"step-{step:08d}"
    draft = root / f".{folder.name}"
    with _drafting(draft):
        draft.mkdir()
        files = {}
        for part, tensors in parts.items():
            file = draft / f"{part}.safetensors"
            save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, file)
            _flush(file)
            files[part] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
        file = draft / "checkpoint.json"
        record = {"format": FORMAT, "step": step, **record, "files": files}
        file.write_text(json.dumps({**record, "checksum": _checksum(record)}, indent=1) + "\n")
        _flush(file)
        _flush(draft)
    if folder.exists():
        _remove(folder)
    os.rename(draft, folder)
    _flush(root)
    for old in sorted(root.glob("step-*"))[:-KEPT]:
        _remove(old)
    return folder


def load(path: Path, flag: str) -> Checkpoint:
    """The newest complete checkpoint of a run's folder, or the checkpoint that the folder is; errors name `flag`."""
    if not path.is_dir():
        raise CommandError(f"{flag} {path}: {'a file, name its folder' if path.is_file() else 'no such folder'}")
    if is_official(path):
        raise CommandError(
            f"{flag} {path}: a folder in the format of the released code, whose models read tokens and not bytes; "
            "load it in Python with megalodon_ops.load_official"
        )
    if os.path.lexists(path / "checkpoint.json"):
        try:
            return _read(path)
        except _FAULTS as error:
            raise CommandError(f"{flag} {path}: {_fault(path, error)}") from error
    faults = []
    for folder in sorted((path / "checkpoints").glob("step-*"), reverse=True):
        try:
            found = _read(folder)
        except _FAULTS as error:
            faults.append(f"{folder}: {_fault(folder, error)}")
            continue
        for fault in faults:
            print(f"megalodon_ops: passing over {fault}", file=sys.stderr)
        return found
    raise CommandError("; ".join([f"{flag} {path}: no complete checkpoint in this folder", *faults]))


def exists(run: Path) -> bool:
    return any((run / "checkpoints").glob("step-*"))


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters())


def load_model(model: nn.Module, checkpoint: Checkpoint) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(checkpoint.parts["model"][name])


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state under `<parameter>/<what>`."""
    return {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, checkpoint: Checkpoint) -> None:
    names = {parameter: name for name, parameter in model.named_parameters()}
    ordered = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    states: dict[int, dict[str, Tensor]] = {}
    for key, tensor in checkpoint.parts["optimizer"].items():
        name, what = key.split("/")
        states.setdefault(ordered.index(name), {})[what] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": states})


def write_whole(path: Path, content: bytes) -> None:
    """Replace the content of a file; if this process is killed meanwhile, the old content stays."""
    draft = path.with_name(f".{path.name}")
    with _drafting(draft):
        draft.write_bytes(content)
        _flush(draft)
    os.replace(draft, path)


@contextmanager
def _drafting(draft: Path) -> Iterator[None]:
    """Removes a draft, a file or a folder, that cannot be finished: its remains would keep a full disk full."""
    try:
        yield
    except (OSError, SafetensorError, KeyboardInterrupt) as error:
        shutil.rmtree(draft) if draft.is_dir() else draft.unlink(missing_ok=True)
        if isinstance(error, KeyboardInterrupt):
            raise
        reason = getattr(error, "strerror", None) or error
        raise CommandError(f"{draft.with_name(draft.name[1:])}: could not be written: {reason}") from error


_FAULTS = (OSError, ValueError, SafetensorError)


def _read(folder: Path) -> Checkpoint:
    """The checkpoint in a folder, each file of which has been compared with what it must be."""
    path = folder / "checkpoint.json"
    record = read_json(path)
    try:
        if not is_whole(record.get("format"), FORMAT, FORMAT):
            found = shown(record.get("format"))
            raise ValueError(
                f"its format is {found}, and this version reads {FORMAT}; the version that wrote it reads it"
            )
        config = schema.check_record(record)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    parts = {part: _read_part(folder, part, config, record) for part in schema.PARTS}
    checksum = record.pop("checksum")
    if _checksum(record) != checksum:
        raise ValueError(f"{path}: was changed after it was written: its checksum is another")
    return Checkpoint(folder, schema.complete(record), parts)


def _read_part(folder: Path, part: str, config: MegalodonConfig, record: dict[str, Any]) -> dict[str, Tensor]:
    path, wanted = folder / f"{part}.safetensors", record["files"][part]
    size = file_size(path)
    try:
        if size != wanted["bytes"]:
            raise ValueError(f"has {size} bytes instead of {wanted['bytes']}")
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            found = {name: (_DTYPES.get(s.get_dtype()), tuple(s.get_shape())) for name, s in slices.items()}
        schema.check_layout(found, schema.layout(part, config, record))
        if _sha256(path) != wanted["sha256"]:
            raise ValueError("was changed after it was written: its checksum is another")
        tensors = load_file(path)
        schema.check_values(part, tensors, config)
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:
        raise ValueError(f"{path}: {_one_line(error)}") from error
    return tensors


_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "I64": torch.int64, "U8": torch.uint8}
"""The dtypes in a checkpoint, by safetensors' names"""


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _checksum(record: dict[str, Any]) -> str:
    """The sha256 sum of a record's content, whatever its layout."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _fault(folder: Path, error: Exception) -> str:
    return _one_line(error).removeprefix(f"{folder}{os.sep}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:1000]


def _remove(folder: Path) -> None:
    hidden = folder.with_name(f".{folder.name}.old")
    os.rename(folder, hidden)
    shutil.rmtree(hidden)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
