"""The file of a :class:`MegalodonState`: safetensors, with the model's configuration in its metadata."""

import json
import math
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from .. import _C
from .files import file_size, reading, write_atomically, write_safetensors
from ..model.config import MegalodonConfig
from ..model.model_state import ACTIVATIONS, Layout, MegalodonStateBase, State
from ..model.model_state import as_real, complete, from_named, layout, named_tensors
from ..ops.common.checks import short_text
from ..ops.common.memory import check_fits, is_finite
from ..ops.common.quantized_rows import scales_of_rows

FILE_FORMAT = "megalodon_ops.state"
FILE_VERSION = "1"
"""Version of a state's file; files of another version are not read"""


def save_state(state: MegalodonStateBase, path: Path, config: MegalodonConfig) -> None:
    """Write a state atomically; see :meth:`MegalodonState.save`."""
    tensors = {name: as_real(tensor.detach()) for name, tensor in named_tensors(complete(state)).items()}
    try:
        check_layout(tensors, layout(config, state.num_sequences, state.cache_dtype))
        check_values(tensors, config)
    except ValueError as error:
        raise ValueError(f"MegalodonState.save: the state is not one of `config`: {error}.") from error
    metadata = {
        "format": FILE_FORMAT,
        "version": FILE_VERSION,
        "config": json.dumps(config.meaning()),
        "megalodon_ops": _C.build_info()["version"],
    }
    with write_atomically(path) as draft:
        write_safetensors(draft, tensors, metadata)


def load_state(kind: type[State], path: Path, config: MegalodonConfig) -> State:
    """Return a state on the CPU; see :meth:`MegalodonState.load`."""
    with reading(path):
        check_fits(file_size(path), "the state")
        with safe_open(path, "pt") as file:
            _check_metadata(file.metadata() or {}, config)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        check_layout(tensors, layout(config, *batch_of(tensors)))
        check_values(tensors, config)
    return from_named(kind, tensors)


def check_layout(tensors: dict[str, Tensor], wanted: Layout) -> None:
    """Raise a ValueError for the first tensor that is missing, unexpected, or of another dtype or shape."""
    expected = {name: (dtype, shape) for name, dtype, shape in wanted}
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    for name in [*expected, *found]:
        if (got := found.get(name)) != (want := expected.get(name)):
            raise ValueError(f"its tensors are not those of its config: {short_text(name)} must be {want}, got {got}")


def check_values(tensors: dict[str, Tensor], config: MegalodonConfig) -> None:
    """Raise a ValueError if a tensor of :func:`layout` has values that no model returns."""
    for name, tensor in tensors.items():
        numbers = scales_of_rows(tensor) if tensor.dtype == torch.int8 else tensor
        if numbers.is_floating_point() and not is_finite(numbers):
            raise ValueError(f"`{name}` must be finite, got NaN or infinity")
        if tensor.numel() and name.endswith((".count", ".position", ".var")):
            smallest, largest = (bound.item() for bound in torch.aminmax(tensor))
            limit = config.num_cached_positions if name.endswith(".position") else math.inf
            if smallest < 0 or largest >= limit:
                raise ValueError(f"`{name}` must be in [0, {limit}), got values from {smallest} to {largest}")


def batch_of(tensors: dict[str, Tensor]) -> tuple[int, torch.dtype]:
    """Return the number of sequences and the dtype of keys and values of a file's tensors."""
    count, keys = tensors.get("norm.count"), tensors.get("layers.0.attention.k")
    if count is None or count.dim() != 1 or keys is None or keys.dtype not in (*ACTIVATIONS, torch.int8):
        raise ValueError("its tensors are not those of a state")
    return len(count), keys.dtype


def _check_metadata(metadata: dict[str, str], config: MegalodonConfig) -> None:
    if metadata.get("format") != FILE_FORMAT:
        raise ValueError("must be a file of MegalodonState.save")
    if (version := metadata.get("version")) != FILE_VERSION:
        raise ValueError(f"its version is {short_text(version)}, and this megalodon_ops reads {FILE_VERSION}")
    saved = json.loads(metadata.get("config", "{}"))
    for name, value in config.meaning().items():
        if saved.get(name) != value:
            raise ValueError(
                f"is the state of another configuration: its `{name}` is {short_text(saved.get(name))}, "
                f"the model's {short_text(value)}"
            )
