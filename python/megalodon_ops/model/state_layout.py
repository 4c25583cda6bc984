"""The tensors of a model's state: their names, dtypes and shapes, and what values they can have."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .config import MegalodonConfig
from ..ops.library import accumulation_dtype
from ..ops.memory import is_finite
from ..ops.values import shown

ACTIVATIONS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""Dtypes that a model's activations can have"""
Layout = Iterator[tuple[str, torch.dtype, tuple[int, ...]]]
"""Name, dtype and shape of each tensor; complex tensors as pairs of reals"""


def layout(config: MegalodonConfig, rows: int, activations: torch.dtype) -> Layout:
    """The tensors of a state of `rows` sequences."""
    real, heads = accumulation_dtype(activations), config.num_heads

    def norm(prefix: str) -> Layout:
        groups = config.norm_num_groups
        yield f"{prefix}count", torch.int64, (rows,)
        yield f"{prefix}mean", real, (rows, groups)
        yield f"{prefix}var", real, (rows, groups)
        yield f"{prefix}residual", real, (rows, 2, groups)

    for layer in range(config.num_layers):
        prefix = f"layers.{layer}."
        yield from norm(f"{prefix}norm.")
        yield f"{prefix}cema", real, (rows, config.model_dim, config.cema_ndim, 2)
        for name, dim in (("k", config.z_dim), ("v", config.value_dim)):
            yield f"{prefix}attention.{name}", activations, (rows, config.chunk_size, heads, dim // heads)
        yield f"{prefix}attention.position", torch.int64, (rows,)
    yield from norm("norm.")


def check_layout(tensors: dict[str, Tensor], wanted: Layout) -> None:
    """Raises a ValueError unless there are the tensors wanted and no other, at the first that differs."""
    expected = {name: (dtype, shape) for name, dtype, shape in wanted}
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    for name in [*expected, *found]:
        if (got := found.get(name)) != (want := expected.get(name)):
            raise ValueError(f"its tensors are not those of its config: {shown(name)} must be {want}, got {got}")


def check_values(tensors: dict[str, Tensor], config: MegalodonConfig) -> None:
    """Raises a ValueError where a tensor of :func:`layout` holds what no call of a model gives."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not is_finite(tensor):
            raise ValueError(f"`{name}` must be finite, got NaN or infinity")
        if tensor.numel() and name.endswith((".count", ".position", ".var")):
            least, most = (bound.item() for bound in torch.aminmax(tensor))
            below = config.chunk_size if name.endswith(".position") else math.inf
            if least < 0 or most >= below:
                raise ValueError(f"`{name}` must be in [0, {below}), got values from {least} to {most}")


def batch_of(tensors: dict[str, Tensor]) -> tuple[int, torch.dtype]:
    """The number of sequences and the dtype of activations that two of a file's tensors say."""
    count, keys = tensors.get("norm.count"), tensors.get("layers.0.attention.k")
    if count is None or count.dim() != 1 or keys is None or keys.dtype not in ACTIVATIONS:
        raise ValueError("its tensors are not those of a state")
    return len(count), keys.dtype
