"""Checkpoints on disk: safetensors and JSON, each folder complete or not there.

    run/checkpoints/step-00000100/model.safetensors, optimizer.safetensors, ..., checkpoint.json

A folder is written under another name, flushed to the disk and renamed, so a process killed at any moment leaves the
newest complete checkpoint as it was; a folder that cannot be finished, on a full disk, is removed. `checkpoint.json`
holds the sizes of the other files, and a folder that does not agree with it is passed over.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from megalodon_ops.cli.errors import CommandError

FORMAT = 2
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
    for leftover in root.glob(".*"):  # of a process that was killed here
        shutil.rmtree(leftover)

    folder = root / f"step-{step:08d}"
    draft = root / f".{folder.name}"
    with _drafting(draft):
        draft.mkdir()
        sizes = {}
        for part, tensors in parts.items():
            file = draft / f"{part}.safetensors"
            save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, file)
            _flush(file)
            sizes[part] = file.stat().st_size
        file = draft / "checkpoint.json"
        file.write_text(json.dumps({"format": FORMAT, "step": step, **record, "sizes": sizes}, indent=1) + "\n")
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
    """The newest complete checkpoint of a run's folder, or the one the folder is; `flag` is what errors name."""
    if not path.is_dir():
        raise CommandError(f"{flag} {path}: no such folder")
    one = (path / "checkpoint.json").exists()
    folders = [path] if one else sorted((path / "checkpoints").glob("step-*"), reverse=True)
    for folder in folders:
        try:
            return _read(folder)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            print(f"megalodon_ops: passing over {folder}: {error}", file=sys.stderr)
    raise CommandError(f"{flag} {path}: no complete checkpoint in this folder")


def exists(run: Path) -> bool:
    return any((run / "checkpoints").glob("step-*"))


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters())


def load_model(model: nn.Module, checkpoint: Checkpoint) -> None:
    tensors = checkpoint.parts["model"]
    parameters = dict(model.named_parameters())
    if {n: p.shape for n, p in parameters.items()} != {n: t.shape for n, t in tensors.items()}:
        raise CommandError(f"{checkpoint.folder}: its tensors are not those of its config")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


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
    """Replace a file by its new content or, if this process is killed meanwhile, by nothing."""
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


def _read(folder: Path) -> Checkpoint:
    record = json.loads((folder / "checkpoint.json").read_text())
    if record["format"] != FORMAT:
        raise ValueError(f"its format is {record['format']}, and this version reads {FORMAT}")
    for part, size in record["sizes"].items():
        if (found := (folder / f"{part}.safetensors").stat().st_size) != size:
            raise ValueError(f"{part}.safetensors has {found} bytes instead of {size}")
    return Checkpoint(folder, record, {part: load_file(folder / f"{part}.safetensors") for part in record["sizes"]})


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
