"""Checkpoints of a training run: a model's folder, and beside it what training needs to go on.

    run/checkpoints/step-00000100/  config.json, model.safetensors, tokenizer.json    what Megalodon.load reads
                                    optimizer.safetensors, state.safetensors, random.safetensors
                                    training.json
    run/checkpoints/step-00000200/  config.json, tokenizer.json                       where several processes write
                                    distributed/    of all the tensors what each process holds (saver.py)
                                    training.json

A folder is complete or not there, whatever happens to the process that writes it. `training.json` holds the step, what
the training program adds, the sizes and sha256 sums of the other files and a sum of its own content. A folder that does
not agree with its `training.json` is passed over in favour of the one before.

Every fault of a file is a FileError of one line, or a FileNotFoundError.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .parts import (
    LazyTensors, check_generator, check_optimizer_layout, check_random, check_squares, optimizer_tensors,
    random_states, read_optimizer, read_random, seed_of_reader,
)  # fmt: skip
from .run_folder import checkpoint_folder, in_order, keep_newest
from .record import OLD_RECORD, RECORD, check_file, new_record, read_record, write_record
from ..errors import FileError
from ..model.checkpoint import (
    CONFIG, TOKENIZER_FILES, as_device, as_path, check_dtype, check_tokenizer, is_own, load_weights, read_model,
    read_model_files, write_model,
)  # fmt: skip
from ..model.config import MegalodonConfig
from ..model.files import remove_drafts, write_folder_atomically, write_safetensors
from ..model.model import Megalodon
from ..model.official import is_official, read_official
from ..model.state_layout import batch_of, check_layout, check_values, layout
from ..model.states import MegalodonState, from_named
from ..model.weights import DISTRIBUTED, StoredTensors, WeightFiles, is_weight_file, reading
from ..ops.values import check_integer

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from .team import Team
    from ..tokenizers import Tokenizer

_OPTIMIZER, _STATE, _RANDOM = "optimizer.safetensors", "state.safetensors", "random.safetensors"
_log = logging.getLogger("megalodon_ops")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on the disk, every file of which has been compared with `training.json`."""

    folder: Path
    config: MegalodonConfig
    record: dict[str, Any]
    """The content of `training.json`, the training program's fields among it"""
    optimizer: Mapping[str, Tensor] = field(repr=False)
    """The optimizer's state, memory-mapped or read on demand, under `<parameter>/<what>`; empty where none was saved"""
    random: Mapping[str, Tensor] = field(repr=False)
    """States of torch's generators; of several processes, under names such as `1/cpu`"""
    _moments: StoredTensors | None = field(repr=False)
    _state: MegalodonState | StoredTensors | None = field(repr=False)

    @property
    def step(self) -> int:
        return self.record["step"]

    @property
    def num_rows(self) -> int:
        """Of how many rows the state was saved."""
        if isinstance(self._state, StoredTensors):
            return batch_of(self._state.found)[0]
        return 0 if self._state is None else self._state.num_sequences

    @property
    def state(self) -> MegalodonState | None:
        """The state that the next batch goes on from, of all rows, on the CPU."""
        return self.state_of(None)

    def state_of(self, mesh: DeviceMesh | None) -> MegalodonState | None:
        """The state of the rows that this process has where the mesh's dimension `data` splits them equally."""
        state = self._state
        if isinstance(state, StoredTensors):
            return _state_of(state, self.config, mesh)
        if state is None or mesh is None or "data" not in (mesh.mesh_dim_names or ()):
            return state
        share = state.num_sequences // mesh["data"].size()
        first = mesh.get_local_rank("data") * share
        return state[first : first + share]

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer that was saved along, or None."""
        return find_tokenizer(self.folder)

    def load_weights(self, model: Megalodon) -> None:
        """Copies the checkpoint's weights into the model, which must be of the checkpoint's configuration."""
        with _faults():
            load_weights(model, self.folder)

    def load_optimizer(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        """Gives the optimizer of the model the state that was saved; its learning rates and the like stay.

        Of a model that is split over processes, each takes its own part.
        """
        with _faults(), reading(self._place_of_moments):
            if (kind := type(optimizer).__name__) != self.record["optimizer"] and self.optimizer:
                raise ValueError(f"is the state of {self.record['optimizer']}, and the optimizer is {kind}")
            amsgrad = any(group.get("amsgrad") for group in optimizer.param_groups)
            if self.optimizer and amsgrad != any(key.endswith("/max_exp_avg_sq") for key in self.optimizer):
                raise ValueError("must be of an optimizer with the same `amsgrad`")
            parameters = dict(model.named_parameters())
            names = {parameter: name for name, parameter in parameters.items()}
            ordered = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
            values: dict[str, Tensor] = {}
            states: dict[int, dict[str, Tensor]] = {}
            for key, (dtype, shape) in ({} if self._moments is None else self._moments.found).items():
                name, _, what = key.rpartition("/")
                if name not in ordered:
                    raise ValueError(f"holds `{key}`, and the optimizer has no such parameter")
                like = parameters[name]
                values[key] = (
                    torch.empty_like(like, dtype=dtype) if like.shape == shape else torch.empty(shape, dtype=dtype)
                )
                states.setdefault(ordered.index(name), {})[what] = values[key]
            if self._moments is not None:
                self._moments.fill(values)
            for key, value in values.items():
                check_squares(key, _local(value))
            optimizer.load_state_dict({**optimizer.state_dict(), "state": states})

    @property
    def _place_of_moments(self) -> Path:
        return self.folder / (DISTRIBUTED if "mesh" in self.record else _OPTIMIZER)

    def restore_random(self, device: torch.device | str = "cpu", *, reader: int = 0, readers: int = 1) -> None:
        """Sets torch's random generators, the CPU's and a CUDA device's, to what they were.

        Each of several processes has generators of its own. Where other processes go on than those that saved, as
        `reader` of `readers` parts of a batch, their generators are seeded anew from the state of the first.
        """
        device = as_device("restore_random", device)
        before = readers_of(self.record)
        prefix = f"{reader}/" if "mesh" in self.record else ""
        if before != readers:
            torch.manual_seed(seed_of_reader(self.random["0/cpu" if "mesh" in self.record else "cpu"], reader, readers))
            return
        state = self.random[f"{prefix}cpu"]
        with _faults(), reading(self.folder):
            check_generator(f"{prefix}cpu", state)
        torch.set_rng_state(state)
        if device.type == "cuda" and f"{prefix}cuda" in self.random:
            torch.cuda.set_rng_state(self.random[f"{prefix}cuda"], device)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def readers_of(record: dict[str, Any]) -> int:
    """In how many parts, each by a process with generators of its own, the run that saved a checkpoint read a batch."""
    mesh = record.get("mesh", {})
    return mesh.get("data", 1) * mesh.get("chunk", 1)


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
    content = new_record(step, optimizer, record)
    tensors = {} if optimizer is None else optimizer_tensors(optimizer, model)
    remove_drafts(root, "step-*")
    folder = checkpoint_folder(root.parent, step)
    with write_folder_atomically(folder) as draft:
        write_model(model, draft, tokenizer=tokenizer, caller="save_checkpoint")
        if tensors:
            write_safetensors(draft / _OPTIMIZER, tensors)
        if state is not None:
            state.save(draft / _STATE, model.config)
        write_safetensors(draft / _RANDOM, random_states(model))
        write_record(draft, content)
    keep_newest(root, folder, keep)
    return folder


def load_checkpoint(
    path: str | os.PathLike, *, check: Callable[[Checkpoint], None] | None = None, team: Team | None = None
) -> Checkpoint:
    """The newest complete checkpoint of a run's folder, or the checkpoint that the folder is.

    Args:
        check: raises a ValueError where the training program's own fields are not what they must be. A checkpoint of a run
            for which it does is passed over, as a damaged one is, with a warning in the log `megalodon_ops`.
        team: several processes that all call this function and find the same: each looks for damage in its share of the
            files.
    """
    path = as_path("load_checkpoint", "path", path)
    with _faults():
        if not path.is_dir():
            if os.path.lexists(path):
                raise ValueError(f"{path}: a file; name its folder")
            raise FileNotFoundError(f"{path}: no such folder")
        if any(os.path.lexists(path / name) for name in (RECORD, OLD_RECORD)):
            return _read(path, check, None)
        faults = []
        for folder in reversed(in_order(path / "checkpoints")):
            found = fault = None
            try:
                found = _read(folder, check, team)
            except (OSError, ValueError) as error:
                fault = str(error)
            fault = next(filter(None, [fault] if team is None else team.gather(fault)), None)
            if found is None or fault is not None:
                faults.append(fault)
                continue
            for fault in faults:
                _log.warning("passing over %s", fault)
            return found
        raise ValueError("; ".join([f"{path}: no complete checkpoint in this folder", *map(str, faults)]))


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
        if not path.is_dir() or any(os.path.lexists(path / name) for name in (RECORD, OLD_RECORD, "checkpoints")):
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


def _read(folder: Path, check: Callable[[Checkpoint], None] | None, team: Team | None) -> Checkpoint:
    """The checkpoint in a folder, each file of which has been compared with what it must be; each by one process."""
    record = read_record(folder)
    files = record["files"]
    is_archive = "mesh" in record
    parts = [f"{DISTRIBUTED}/.metadata"] if is_archive else [_RANDOM]
    names = list(dict.fromkeys([CONFIG, *parts, *files]))
    for name in names if team is None else names[team.rank :: team.size]:
        check_file(folder / name, files.get(name))
    for file in sorted(folder.iterdir()):
        name = file.name
        known = name in (_OPTIMIZER, _STATE, *TOKENIZER_FILES) or is_weight_file(name)
        if name not in files and (known or (name == DISTRIBUTED and not is_archive)):
            raise ValueError(f"{file}: is not one of the files that {RECORD} lists")
    config, _, _ = read_model_files(folder)
    if is_archive:
        found = _from_archive(folder, config, record)
    else:
        stored = WeightFiles([folder / _OPTIMIZER]) if _OPTIMIZER in files else None
        optimizer = {} if stored is None else read_optimizer(folder / _OPTIMIZER, stored, config, record["optimizer"])
        state = MegalodonState.load(folder / _STATE, config) if _STATE in files else None
        found = Checkpoint(folder, config, record, optimizer, read_random(folder / _RANDOM), stored, state)
    if check is not None:
        with reading(folder / RECORD):
            check(found)
    return found


def _from_archive(folder: Path, config: MegalodonConfig, record: dict[str, Any]) -> Checkpoint:
    from ..distributed.checkpoint import Archive  # here: torch.distributed.checkpoint takes long to load

    archive = Archive(folder)
    for name in archive.files:
        if f"{DISTRIBUTED}/{name}" not in record["files"]:
            raise ValueError(f"{archive.path / name}: is not one of the files that {RECORD} lists")
    stored, state, random = (archive.part(name) for name in ("optimizer", "state", "random"))
    with reading(archive.path):
        check_optimizer_layout(stored.found, config, record["optimizer"])
        if state.found:
            check_layout(state.found, layout(config, *batch_of(state.found)))
        check_random(random.found, [f"{reader}/" for reader in range(readers_of(record))])
    return Checkpoint(
        folder, config, record, LazyTensors(stored), LazyTensors(random), stored, state if state.found else None
    )


def _state_of(stored: StoredTensors, config: MegalodonConfig, mesh: DeviceMesh | None) -> MegalodonState:
    """The state of all rows, or of this process's, where the mesh's dimension `data` splits them."""
    from ..distributed.checkpoint import as_rows, local

    rows = batch_of(stored.found)[0]
    share = rows // mesh["data"].size() if mesh is not None and "data" in (mesh.mesh_dim_names or ()) else rows
    tensors = {name: torch.empty((share, *shape[1:]), dtype=dtype) for name, (dtype, shape) in stored.found.items()}
    parts = tensors if mesh is None else {name: as_rows(tensor, mesh) for name, tensor in tensors.items()}
    with _faults(), reading(stored.where["norm.count"]):
        stored.fill(parts)
        tensors = {name: local(tensor) for name, tensor in parts.items()}
        check_values(tensors, config)
    return from_named(tensors, config)
