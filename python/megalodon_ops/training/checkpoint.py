"""Checkpoints of a training run: a model's folder, and beside it what training needs to go on.

    run/checkpoints/step-00000100/  config.json, model.safetensors, tokenizer.json    what Megalodon.load reads
                                    optimizer.safetensors, state.safetensors, random.safetensors
                                    training.json

A folder is complete or not there, whatever happens to the process that writes it. `training.json` holds the step, what
the training program adds, the sizes and sha256 sums of the other files and a sum of its own content. A folder that does
not agree with its `training.json` is passed over in favour of the one before.

Every fault of a file is a FileError of one line, or a FileNotFoundError.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import schema
from .parts import optimizer_tensors, random_states, read_optimizer, read_random
from .. import _C
from ..errors import FileError
from ..model.checkpoint import (
    CONFIG, TOKENIZER_FILES, as_device, as_path, check_dtype, check_tokenizer, is_own, load_weights, read_model,
    read_model_files, write_model,
)  # fmt: skip
from ..model.config import MegalodonConfig
from ..model.files import file_size, read_json, remove_drafts, write_folder_atomically, write_safetensors
from ..model.model import Megalodon
from ..model.official import is_official, read_official
from ..model.states import MegalodonState
from ..model.weights import is_weight_file, reading
from ..ops.values import check_integer, described, is_whole, shown

if TYPE_CHECKING:
    from ..tokenizers import Tokenizer

FORMAT = 3
"""Counts the changes of the files' content; checkpoints of another format are not read"""
RECORD = "training.json"
_OLD_RECORD = "checkpoint.json"  # of format 2 and before
_OPTIMIZER, _STATE, _RANDOM = "optimizer.safetensors", "state.safetensors", "random.safetensors"
_log = logging.getLogger("megalodon_ops")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on the disk, every file of which has been compared with `training.json`."""

    folder: Path
    config: MegalodonConfig
    record: dict[str, Any]
    """The content of `training.json`, the training program's fields among it"""
    optimizer: dict[str, Tensor] = field(repr=False)
    """The optimizer's state, memory-mapped, under `<parameter>/<what>`; empty where none was saved"""
    state: MegalodonState | None = field(repr=False)
    """The state that the next batch goes on from, on the CPU"""
    random: dict[str, Tensor] = field(repr=False)

    @property
    def step(self) -> int:
        return self.record["step"]

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer that was saved along, or None."""
        return find_tokenizer(self.folder)

    def load_weights(self, model: Megalodon) -> None:
        """Copies the checkpoint's weights into the model, which must be of the checkpoint's configuration."""
        with _faults():
            load_weights(model, self.folder)

    def load_optimizer(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        """Gives the optimizer of the model the state that was saved; its learning rates and the like stay."""
        with _faults(), reading(self.folder / _OPTIMIZER):
            if (kind := type(optimizer).__name__) != self.record["optimizer"] and self.optimizer:
                raise ValueError(f"is the state of {self.record['optimizer']}, and the optimizer is {kind}")
            amsgrad = any(group.get("amsgrad") for group in optimizer.param_groups)
            if self.optimizer and amsgrad != any(key.endswith("/max_exp_avg_sq") for key in self.optimizer):
                raise ValueError("must be of an optimizer with the same `amsgrad`")
            names = {parameter: name for name, parameter in model.named_parameters()}
            ordered = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
            states: dict[int, dict[str, Tensor]] = {}
            for key, tensor in self.optimizer.items():
                name, _, what = key.rpartition("/")
                if name not in ordered:
                    raise ValueError(f"holds `{key}`, and the optimizer has no such parameter")
                states.setdefault(ordered.index(name), {})[what] = tensor.clone()
            optimizer.load_state_dict({**optimizer.state_dict(), "state": states})

    def restore_random(self, device: torch.device | str = "cpu") -> None:
        """Sets torch's random generators, the CPU's and a CUDA device's, to what they were."""
        device = as_device("restore_random", device)
        torch.set_rng_state(self.random["cpu"])
        if device.type == "cuda" and "cuda" in self.random:
            torch.cuda.set_rng_state(self.random["cuda"], device)


def save_checkpoint(
    run: str | os.PathLike,
    step: int,
    model: Megalodon,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    state: MegalodonState | None = None,
    tokenizer: Any = None,
    record: dict[str, Any] | None = None,
    keep: int = 2,
) -> Path:
    """Writes `run/checkpoints/step-<step>/`, and of it and those before removes all but the newest `keep`.

    Args:
        optimizer: one whose state is tensors, of parameters of the model.
        state: the state that the next batch goes on from.
        tokenizer: one with a method `save(folder)`, to go along.
        record: what else the program needs to go on, such as its position in the text, as JSON.

    Returns:
        the folder. Torch's random generators are saved, too.

    Raises:
        ValueError: the model's weights are not finite, or `record` is no JSON. OSError: the folder cannot be written;
        nothing of it is left then.

    Example:
        >>> import tempfile, torch, megalodon_ops as mo
        >>> from megalodon_ops.training.checkpoint import load_checkpoint, save_checkpoint
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
    root = as_path("save_checkpoint", "run", run) / "checkpoints"
    step = check_integer("save_checkpoint", "step", step, "an integer of at least 0, below 2^63", 0)
    keep = check_integer("save_checkpoint", "keep", keep, "a positive integer", 1)
    check_tokenizer("save_checkpoint", tokenizer)
    record = {} if record is None else record
    if not isinstance(record, dict) or schema.OWN.keys() & record.keys():
        got = described(record) if not isinstance(record, dict) else shown(min(schema.OWN.keys() & record.keys()))
        raise ValueError(f"save_checkpoint: `record` must be a dictionary without {', '.join(schema.OWN)}, got {got}.")
    content = {
        "format": FORMAT,
        "step": step,
        "megalodon_ops": _C.build_info()["version"],
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "optimizer": None if optimizer is None else type(optimizer).__name__,
        **_as_json(record),
    }
    tensors = {} if optimizer is None else optimizer_tensors(optimizer, model)
    remove_drafts(root, "step-*")
    folder = root / f"step-{step:08d}"
    with write_folder_atomically(folder) as draft:
        write_model(model, draft, tokenizer=tokenizer, caller="save_checkpoint")
        if tensors:
            write_safetensors(draft / _OPTIMIZER, tensors)
        if state is not None:
            state.save(draft / _STATE, model.config)
        write_safetensors(draft / _RANDOM, random_states(model))
        files = {path.name: _facts(path) for path in sorted(draft.iterdir())}
        content["files"] = files
        (draft / RECORD).write_text(json.dumps({**content, "checksum": _checksum(content)}, indent=1) + "\n")
    for old in [path for path in _in_order(root) if _order(path) <= _order(folder)][:-keep]:
        hidden = old.with_name(f".{old.name}.draft-old")
        os.rename(old, hidden)  # a folder is whole or not there
        shutil.rmtree(hidden)
    return folder


def _order(folder: Path) -> tuple[int, str]:
    """Sorts folders by their steps, of eight digits or more."""
    return len(folder.name), folder.name


def _in_order(root: Path) -> list[Path]:
    return sorted(root.glob("step-*"), key=_order)


def has_checkpoint(run: Path) -> bool:
    """Whether a run's folder holds a checkpoint, complete or damaged."""
    return any((run / "checkpoints").glob("step-*"))


def load_checkpoint(path: str | os.PathLike, *, check: Callable[[Checkpoint], None] | None = None) -> Checkpoint:
    """The newest complete checkpoint of a run's folder, or the checkpoint that the folder is.

    check: raises a ValueError where the training program's own fields are not what they must be. A checkpoint of a run
    for which it does is passed over, as a damaged one is, with a warning in the log `megalodon_ops`.
    """
    path = as_path("load_checkpoint", "path", path)
    with _faults():
        if not path.is_dir():
            if os.path.lexists(path):
                raise ValueError(f"{path}: a file; name its folder")
            raise FileNotFoundError(f"{path}: no such folder")
        if any(os.path.lexists(path / name) for name in (RECORD, _OLD_RECORD)):
            return _read(path, check)
        faults = []
        for folder in reversed(_in_order(path / "checkpoints")):
            try:
                found = _read(folder, check)
            except (OSError, ValueError) as error:
                faults.append(str(error))
                continue
            for fault in faults:
                _log.warning("passing over %s", fault)
            return found
        raise ValueError("; ".join([f"{path}: no complete checkpoint in this folder", *faults]))


def load_any(
    path: str | os.PathLike,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    check: Callable[[Checkpoint], None] | None = None,
) -> tuple[Megalodon, Tokenizer | None, dict[str, Any] | None]:
    """A model, its tokenizer and, of a training run, the content of `training.json`, from any folder with a model.

    Args:
        path: a run's folder, one of its checkpoints, a folder of `Megalodon.save` or of transformers, or one in the format
            of the released code.
        dtype: that of the linear layers and the embedding; None: the folder's, or float32 for the released format.
        check: as in :func:`load_checkpoint`.

    Returns:
        the model in evaluation mode; its tokenizer, or None where the folder has none; the record, or None.
    """
    path, device = as_path("load_any", "path", path), as_device("load_any", device)
    check_dtype("load_any", dtype)
    with _faults():
        if not path.is_dir() or any(os.path.lexists(path / name) for name in (RECORD, _OLD_RECORD, "checkpoints")):
            found = load_checkpoint(path, check=check)
            return read_model(Megalodon, found.folder, dtype, device), found.tokenizer(), found.record
        if is_official(path):
            return read_official(path, dtype or torch.float32, device), find_tokenizer(path), None
        if is_own(path):
            return read_model(Megalodon, path, dtype, device), find_tokenizer(path), None
        raise FileNotFoundError(
            f"{path}: no model in this folder: neither a run's checkpoints/, nor {CONFIG} and weights"
        )


class _faults:
    """Makes a ValueError a FileError, which the command line shows as one line."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ValueError) and not isinstance(error, FileError):
            raise FileError(str(error)) from error


def find_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer in a folder, or None where there is none."""
    if not any(os.path.lexists(folder / name) for name in ("tokenizer.json", "tokenizer.model")):
        return None
    from ..tokenizers import load_tokenizer

    return load_tokenizer(folder)


def _read(folder: Path, check: Callable[[Checkpoint], None] | None) -> Checkpoint:
    """The checkpoint in a folder, each file of which has been compared with what it must be."""
    path = folder / RECORD
    if not os.path.lexists(path) and os.path.lexists(folder / _OLD_RECORD):
        raise ValueError(f"{folder / _OLD_RECORD}: {_of_an_old_version(folder / _OLD_RECORD)}")
    record = read_json(path)
    with reading(path):
        if not is_whole(number := record.get("format"), FORMAT, FORMAT):
            raise ValueError(
                f"its format is {shown(number)}, and this version reads {FORMAT}; the version that wrote it reads it"
            )
        schema.check_own(record)
        content = {name: value for name, value in record.items() if name != "checksum"}
        if _checksum(content) != record["checksum"]:
            raise ValueError("was changed after it was written: its checksum is another")
    files = record["files"]
    for name in (CONFIG, _RANDOM, *files):
        _check_file(folder / name, files.get(name))
    for file in sorted(folder.iterdir()):
        name = file.name
        if name not in files and (name in (_OPTIMIZER, _STATE, *TOKENIZER_FILES) or is_weight_file(name)):
            raise ValueError(f"{file}: is not one of the files that {RECORD} lists")
    config, _, _ = read_model_files(folder)
    optimizer = read_optimizer(folder / _OPTIMIZER, config, record["optimizer"]) if _OPTIMIZER in files else {}
    state = MegalodonState.load(folder / _STATE, config) if _STATE in files else None
    found = Checkpoint(folder, config, record, optimizer, state, read_random(folder / _RANDOM))
    if check is not None:
        with reading(path):
            check(found)
    return found


def _of_an_old_version(path: Path) -> str:
    try:
        record = read_json(path)
    except (OSError, ValueError):
        record = {}
    return (
        f"is a checkpoint of format {shown(record.get('format'))}, of megalodon_ops before checkpoints were folders with "
        f"a {CONFIG}; the commit that wrote it, of version {shown(record.get('megalodon_ops'))}, reads it"
    )


def _check_file(path: Path, wanted: dict[str, Any] | None) -> None:
    if wanted is None:
        raise ValueError(f"{path}: is not one of the files that {RECORD} lists")
    size = file_size(path)
    if size != wanted["bytes"]:
        raise ValueError(f"{path}: has {size} bytes instead of {wanted['bytes']}")
    if _sha256(path) != wanted["sha256"]:
        raise ValueError(f"{path}: was changed after it was written: its checksum is another")


def _facts(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _checksum(record: dict[str, Any]) -> str:
    """The sha256 sum of a record's content, whatever its layout."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _as_json(record: dict[str, Any]) -> dict[str, Any]:
    """The record as reading it back gives it."""
    try:
        return json.loads(json.dumps(record, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"save_checkpoint: `record` must be JSON, got what is none: {error}.") from error
