"""What a checkpoint of a run holds beside the model: the optimizer's state, and the states of random generators.

Every fault of a file is a ValueError that names the file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..model.checkpoint import CONFIG
from ..model.config import MegalodonConfig
from ..model.weights import WEIGHT_DTYPES, StoredTensors, WeightFiles, reading
from ..ops.memory import is_finite
from ..ops.values import described, shown

_SQUARES = ("/exp_avg_sq", "/max_exp_avg_sq", "/step")


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state under `<parameter>/<what>`."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    tensors = {}
    for parameter, state in optimizer.state.items():
        if parameter not in names:
            raise ValueError("save_checkpoint: `optimizer` must be of parameters of the model, got another's.")
        for key, value in state.items():
            if not isinstance(value, Tensor):
                raise ValueError(
                    f"save_checkpoint: `optimizer` must have a state of tensors, got `{key}` as {described(value)}."
                )
            tensors[f"{names[parameter]}/{key}"] = value
    return tensors


def read_optimizer(path: Path, files: StoredTensors, config: MegalodonConfig, kind: str | None) -> dict[str, Tensor]:
    """The optimizer's state by name, with the layout of Adam's where the optimizer is one of that family."""
    with reading(path):
        check_optimizer_layout(files.found, config, kind)
        tensors = {key: files.get_as_it_is(key) for key in files.found}
        for key, tensor in tensors.items():
            if tensor.dtype in WEIGHT_DTYPES and not is_finite(tensor):
                raise ValueError(f"`{key}` must be finite, got NaN or infinity")
            check_squares(key, tensor)
    return tensors


def check_optimizer_layout(
    found: Mapping[str, tuple[torch.dtype | None, tuple[int, ...]]], config: MegalodonConfig, kind: str | None
) -> None:
    """Raises unless the tensors are the state of an optimizer of this kind, of parameters of the configuration."""
    of_parameter: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, (dtype, shape) in found.items():
        if dtype is None:
            raise ValueError(f"{shown(key)} must be of floating-point numbers or integers")
        of_parameter.setdefault(key.rpartition("/")[0], {})[key.rpartition("/")[2]] = shape
    left = set(of_parameter)
    for name, shape in config.parameter_shapes():
        if name in left:
            _check_moments(name, of_parameter[name], shape, kind)
            left.remove(name)
            if not left:
                break
    if left:
        raise ValueError(f"holds {shown(min(left))}, which is no parameter of {CONFIG}")


def check_squares(key: str, tensor: Tensor) -> None:
    """Raises where a tensor of an optimizer's state holds squares, or counts, below 0."""
    if key.endswith(_SQUARES) and tensor.numel() and tensor.min() < 0:
        raise ValueError(f"`{key}` must be at least 0, got {tensor.min().item():g}")


def _check_moments(name: str, found: dict[str, tuple[int, ...]], shape: tuple[int, ...], kind: str | None) -> None:
    if kind not in ("Adam", "AdamW", "Muon"):
        return
    if kind == "Muon" and found == {"momentum_buffer": shape}:
        return
    wanted = {"step": (), "exp_avg": shape, "exp_avg_sq": shape}
    if "max_exp_avg_sq" in found:
        wanted["max_exp_avg_sq"] = shape
    if found != wanted:
        raise ValueError(f"the state of `{name}` must be {wanted}, got {found}")


def random_states(model: nn.Module) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    device = next(model.parameters()).device
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def read_random(path: Path) -> dict[str, Tensor]:
    files = WeightFiles([path])
    with reading(path):
        check_random(files.found)
        tensors = {name: files.get_as_it_is(name).clone() for name in files.found}
        check_generator("cpu", tensors["cpu"])
    return tensors


def check_random(
    found: Mapping[str, tuple[torch.dtype | None, tuple[int, ...]]], prefixes: Iterable[str] = ("",)
) -> None:
    """Raises unless the tensors are states of generators, under each of the prefixes one of the CPU's."""
    prefixes = list(prefixes)
    wanted = {"cpu": tuple(torch.get_rng_state().shape), "cuda": (16,)}
    allowed = {prefix + name: shape for prefix in prefixes for name, shape in wanted.items()}
    for name, (dtype, shape) in found.items():
        if dtype != torch.uint8 or allowed.get(name) != shape:
            raise ValueError(f"{shown(name)} must be a state of torch's generator")
    for prefix in prefixes:
        if f"{prefix}cpu" not in found:
            raise ValueError(f"`{prefix}cpu` is missing")


def check_generator(name: str, state: Tensor) -> None:
    """Raises unless torch's generator of the CPU takes the state."""
    try:
        torch.Generator().set_state(state)
    except RuntimeError as error:
        raise ValueError(f"`{name}` must be a state of torch's generator") from error


def seed_of_reader(state: Tensor, reader: int, readers: int) -> int:
    """A seed for one of several processes, of a generator's state: equal states give equal seeds, anywhere."""
    digest = hashlib.sha256(state.numpy().tobytes() + f"{reader}/{readers}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class LazyTensors(Mapping[str, Tensor]):
    """Tensors on the disk, each of which is read when it is looked at."""

    def __init__(self, files: StoredTensors):
        self._files = files

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._files.found:
            raise KeyError(name)
        return self._files.get_as_it_is(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files.found)

    def __len__(self) -> int:
        return len(self._files.found)
