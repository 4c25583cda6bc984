"""Checkpoints of a training run: a model's folder, and the files that a resume needs.

    run/checkpoints/step-00000100/  config.json, model.safetensors, tokenizer.json    read by Megalodon.load
                                    optimizer.safetensors, state.safetensors, random.safetensors, training.json
    run/checkpoints/step-00000200/  config.json, tokenizer.json, training.json        if several processes write
                                    distributed/    each process's part of every tensor (saver.py)
    run/best/                       the same files, without the states of the optimizer and the rows

A folder is complete or absent, whatever happens to the writing process. If its files differ from the sizes and sha256
sums in `training.json`, a resume reads the previous checkpoint instead. Only folders named `step-` and at least eight
digits are checkpoints; everything else belongs to the user.
"""

from __future__ import annotations

import logging
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .record import RECORD, new_record, read_record, write_record
from ..storage.files import FileError, as_path, drafting, reading, remove_drafts, write_atomically, write_safetensors
from ..storage.folder import CONFIG, check_dtype, check_tokenizer, holds_model
from ..storage.folder import read_model, read_model_files, stored_tensors, write_model
from ..model.config import MegalodonConfig
from ..model.encoder import MegalodonEncoderConfig
from ..public_models import Megalodon, MegalodonEncoder, MegalodonState
from ..storage.official import is_official, read_official
from ..storage.state_file import batch_of, check_layout
from ..model.model_state import as_real, complete, from_named, layout, named_tensors
from ..tokenizers import Tokenizer, load_tokenizer
from ..ops.common.checks import as_device, check_integer, describe

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

BEST = "best"
"""Folder of a run's best checkpoint"""
_NAME = re.compile(r"step-([0-9]{8,})")
_log = logging.getLogger("megalodon_ops")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on the disk."""

    folder: Path
    config: MegalodonConfig
    record: dict[str, Any]
    """The content of `training.json`, with the training program's fields"""

    @property
    def step(self) -> int:
        return self.record["step"]

    @property
    def state(self) -> MegalodonState | None:
        """State of all rows before the next batch, on the CPU."""
        return self.state_of(None)

    def state_of(self, mesh: DeviceMesh | None) -> MegalodonState | None:
        """Return the state of this process's rows; the mesh's dimension `data` splits all rows equally."""
        stored = stored_tensors(self.folder, "state")
        if stored is None:
            return None
        parts = mesh["data"].size() if mesh is not None and "data" in mesh.mesh_dim_names else 1
        rows = len(stored.tensors["norm.count"]) // parts
        own = {name: torch.empty((rows, *like.shape[1:]), dtype=like.dtype) for name, like in stored.tensors.items()}
        state = _as_rows(own, mesh)
        stored.fill(state)
        return from_named(MegalodonState, {name: local_tensor(tensor) for name, tensor in state.items()})

    def tokenizer(self) -> Tokenizer | None:
        """Return the checkpoint's tokenizer, or None."""
        return find_tokenizer(self.folder)

    def load_weights(self, model: Megalodon | MegalodonEncoder) -> None:
        """Copy the checkpoint's weights into the model, or into this process's part of a sharded one."""
        if model.config != self.config:
            raise FileError(f"{self.folder / CONFIG}: must be the model's configuration, got another")
        stored_tensors(self.folder).fill(dict(model.named_parameters()))

    def load_optimizer(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        """Load the optimizer's state, or this process's part of it; learning rates and the like keep their values."""
        stored = stored_tensors(self.folder, "optimizer")
        if stored is None:
            optimizer.state.clear()
            return
        if (kind := type(optimizer).__name__) != self.record["optimizer"]:
            raise FileError(f"{stored.path}: is the state of {self.record['optimizer']}, and the optimizer is {kind}")
        parameters = dict(model.named_parameters())
        names = {parameter: name for name, parameter in parameters.items()}
        ordered = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
        values: dict[str, Tensor] = {}
        states: dict[int, dict[str, Tensor]] = {}
        for key, found in stored.tensors.items():
            name, _, entry = key.rpartition("/")
            if name not in ordered:
                raise FileError(f"{stored.path}: holds `{key}`, and the optimizer has no such parameter")
            like = parameters[name] if parameters[name].shape == found.shape else torch.empty(found.shape)
            values[key] = torch.empty_like(like, dtype=found.dtype)
            states.setdefault(ordered.index(name), {})[entry] = values[key]
        stored.fill(values)
        optimizer.load_state_dict({**optimizer.state_dict(), "state": states})

    def restore_random(self, device: torch.device | str = "cpu") -> None:
        """Restore the states of torch's random generators, of the CPU and of `device` if it is a CUDA device.

        If several processes saved the checkpoint, these are the states of one of them.
        """
        device, stored = as_device("restore_random", device), stored_tensors(self.folder, "random")
        torch.set_rng_state(stored.get("cpu"))
        if device.type == "cuda" and "cuda" in stored.tensors:
            torch.cuda.set_rng_state(stored.get("cuda"), device)


def save_checkpoint(
    run: str | os.PathLike,
    step: int,
    model: Megalodon | MegalodonEncoder,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    state: MegalodonState | None = None,
    tokenizer: Any = None,
    record: dict[str, Any] | None = None,
    keep: int = 2,
    best: bool = False,
) -> Path:
    """Write `run/checkpoints/step-<step>/`, and keep the newest `keep` checkpoints up to this step.

    Args:
        best: replace `run/best/` instead, and remove no checkpoint.
        optimizer: must hold tensors for the model's parameters only.
        state: state of the rows before the next batch.
        tokenizer: saved into the same folder, by its method `save(folder)`.
        record: other values that a resume needs, such as the position in the text, as JSON.

    Returns:
        the folder, which also holds the states of torch's random generators.

    Raises:
        ValueError: the model's weights are not finite. TypeError, ValueError: `record` is no JSON. OSError: the folder
        cannot be written; then nothing of it is left.

    Example:
        >>> import tempfile, torch, megalodon_ops as mo
        >>> from megalodon_ops.training import load_checkpoint, save_checkpoint
        >>> config = mo.MegalodonConfig(num_layers=1, model_dim=32, z_dim=16, value_dim=32, ffn_hidden_dim=32, vocab_size=9)
        >>> model = mo.Megalodon(config)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> with tempfile.TemporaryDirectory() as run:
        ...     folder = save_checkpoint(run, 7, model, optimizer=optimizer, record={"position": 3})
        ...     found = load_checkpoint(run)
        ...     found.load_weights(model)
        ...     found.load_optimizer(optimizer, model)
        >>> found.step, found.record["position"]
        (7, 3)
    """
    run = as_path("save_checkpoint", "run", run)
    keep = check_integer("save_checkpoint", "keep", keep, "a positive integer", 1)
    if not (isinstance(model, nn.Module) and hasattr(model, "config")):
        raise TypeError(f"save_checkpoint: `model` must be a Megalodon or a MegalodonEncoder, got {describe(model)}.")
    check_tokenizer("save_checkpoint", tokenizer)
    content, kinds = new_record(step, optimizer, record), training_tensors(model, optimizer, state)
    folder = checkpoint_folder(run, step, best)
    remove_old_drafts(run)
    with write_atomically(folder, folder=True) as draft:
        write_model(model, draft, tokenizer=tokenizer, caller="save_checkpoint")
        for kind, tensors in kinds.items():
            write_safetensors(draft / f"{kind}.safetensors", tensors)
        write_record(draft, content)
    if not best:
        keep_newest(run, folder, keep)
    return folder


def training_tensors(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    state: MegalodonState | None,
    mesh: DeviceMesh | None = None,
) -> dict[str, dict[str, Tensor]]:
    """Return the states of the optimizer, the rows (of this process) and the random generators, by kind and name."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    kinds: dict[str, dict[str, Tensor]] = {"random": {"cpu": torch.get_rng_state()}}
    device = next(model.parameters()).device
    if device.type == "cuda":
        kinds["random"]["cuda"] = torch.cuda.get_rng_state(device)
    has_state = not isinstance(model, MegalodonEncoder)
    if state is not None and not (has_state and isinstance(state, MegalodonState)):
        expected = "a MegalodonState or None" if has_state else "None for an encoder"
        raise TypeError(f"save_checkpoint: `state` must be {expected}, got {describe(state)}.")
    if state is not None:
        rows = {name: as_real(tensor.detach()) for name, tensor in named_tensors(complete(state)).items()}
        try:
            check_layout(rows, layout(model.config, *batch_of(rows)))
        except ValueError as error:
            raise ValueError(f"save_checkpoint: `state` must be of `model`, got another model's: {error}.") from error
        kinds["state"] = _as_rows(rows, mesh)
    for parameter, values in ({} if optimizer is None else optimizer.state).items():
        for key, value in values.items():
            if parameter not in names or not isinstance(value, Tensor):
                raise ValueError(
                    f"save_checkpoint: `optimizer` must have tensors for the model's parameters, got `{key}`."
                )
            kinds.setdefault("optimizer", {})[f"{names[parameter]}/{key}"] = value
    return kinds


def _as_rows(tensors: dict[str, Tensor], mesh: DeviceMesh | None) -> dict[str, Tensor]:
    """Return DTensors of all rows; the given tensors are this process's shards along the mesh's dimension `data`."""
    if mesh is None:
        return tensors
    from torch.distributed.tensor import DTensor, Replicate, Shard  # here: it takes long to load

    placements = [Shard(0) if name == "data" else Replicate() for name in mesh.mesh_dim_names]
    rows = {}
    for name, tensor in tensors.items():
        if tensor.storage_offset() or not tensor.is_contiguous():  # torch cannot copy a DTensor of such a view
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        rows[name] = DTensor.from_local(tensor, mesh, placements, run_check=False)
    return rows


def local_tensor(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def load_checkpoint(path: str | os.PathLike, *, verify: bool = True) -> Checkpoint:
    """Open a checkpoint's folder, or the newest complete checkpoint of a run's folder.

    Damaged checkpoints of a run are skipped, with a warning in the log `megalodon_ops` that names the fault.

    Args:
        verify: compare all files with the sums in `training.json`. In several processes, let one verify, and let
            the others open `folder` of its result with `verify=False`.
    """
    path = as_path("load_checkpoint", "path", path)
    if not os.path.lexists(path):
        raise FileNotFoundError(f"{path}: no such folder")
    if not path.is_dir():
        raise FileError(f"{path}: a file; name its folder")
    if os.path.lexists(path / RECORD):
        return _read(path, verify)
    faults = []
    for folder in reversed(checkpoints_of(path)):
        try:
            checkpoint = _read(folder, verify)
        except (FileError, FileNotFoundError) as fault:
            faults.append(str(fault))
            continue
        for fault in faults:
            _log.warning("passing over %s", fault)
        return checkpoint
    raise FileError("; ".join([f"{path}: no complete checkpoint in this folder", *faults]))


def _read(folder: Path, verify: bool) -> Checkpoint:
    record = read_record(folder, verify=verify)
    kind = MegalodonEncoderConfig if holds_model(folder, MegalodonEncoderConfig.model_type) else MegalodonConfig
    return Checkpoint(folder, read_model_files(folder, kind=kind)[0], record)


def checkpoint_folder(run: Path, step: int, best: bool) -> Path:
    return run / BEST if best else run / "checkpoints" / f"step-{step:08d}"


def remove_old_drafts(run: Path) -> None:
    """Remove drafts of checkpoints that killed processes left in the run's folder."""
    remove_drafts(run / "checkpoints", "step-*")
    remove_drafts(run, BEST)


def checkpoints_of(run: Path) -> list[Path]:
    """Return the run's checkpoints, complete or damaged, ordered by step."""
    folders = [path for path in (run / "checkpoints").glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(folders, key=_step)


def keep_newest(run: Path, written: Path, keep: int) -> None:
    """Remove all but the newest `keep` of the checkpoints up to the one just written."""
    for old in [path for path in checkpoints_of(run) if _step(path) <= _step(written)][:-keep]:
        with drafting(old) as draft, suppress(FileNotFoundError):  # another process removes it
            old.rename(draft)


def _step(folder: Path) -> int:
    return int(_NAME.fullmatch(folder.name)[1])


def load_any(
    path: str | os.PathLike, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> tuple[Megalodon, Tokenizer | None, dict[str, Any] | None]:
    """Load a model, its tokenizer and, for a training run, the content of `training.json`, from a folder of any format.

    Args:
        path: a folder: a run's, a checkpoint's, of `Megalodon.save`, of transformers, or in the released format.
        dtype: dtype of linear layers and embedding; None: the folder's, or float32 for the released format.

    Returns:
        the model in evaluation mode; its tokenizer, or None; the record, or None.
    """
    path, device = as_path("load_any", "path", path), as_device("load_any", device)
    check_dtype("load_any", dtype)
    if not path.is_dir() or any(os.path.lexists(path / name) for name in (RECORD, "checkpoints")):
        checkpoint = load_checkpoint(path)
        return read_model(Megalodon, checkpoint.folder, dtype, device), checkpoint.tokenizer(), checkpoint.record
    if is_official(path):
        with reading(path):
            return read_official(Megalodon, path, dtype or torch.float32, device), find_tokenizer(path), None
    if os.path.lexists(path / CONFIG):
        return read_model(Megalodon, path, dtype, device), find_tokenizer(path), None
    raise FileNotFoundError(f"{path}: no model in this folder: neither a run's checkpoints/, nor {CONFIG} and weights")


def find_tokenizer(folder: Path) -> Tokenizer | None:
    if not any(os.path.lexists(folder / name) for name in ("tokenizer.json", "tokenizer.model")):
        return None
    return load_tokenizer(folder)
