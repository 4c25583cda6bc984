"""The tensors of a model's state: their names, dtypes and shapes, and what values they can have."""

from __future__ import annotations

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
    """The tensors of a state of `rows` sequences, one by one, as a configuration may name 10^9 layers."""
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


DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64,
    "U8": torch.uint8,
}  # fmt: skip
"""The dtypes in our files, by safetensors' names"""


def check_layout(found: dict[str, tuple[torch.dtype | None, tuple[int, ...]]], wanted: Layout) -> None:
    """Raises a ValueError unless there are the tensors wanted and no other, at the first missing tensor."""
    known = set()
    for name, dtype, shape in wanted:
        known.add(name)
        if name not in found:
            raise ValueError(f"its tensors are not those of its config: `{name}` is missing")
        if found[name] != (dtype, shape):
            raise ValueError(
                f"its tensors are not those of its config: `{name}` must be {dtype} {shape}, "
                f"got {' '.join(map(str, found[name]))}"
            )
    if unknown := [name for name in found if name not in known]:
        raise ValueError(f"its tensors are not those of its config: {shown(unknown[0])} is unknown")


def check_values(tensors: dict[str, Tensor], config: MegalodonConfig) -> None:
    """Raises a ValueError where a tensor of :func:`layout` holds what no call of a model gives."""
    for name, tensor in tensors.items():
        if not tensor.numel():
            continue
        if tensor.is_floating_point() and not is_finite(tensor):
            raise ValueError(f"`{name}` must be finite, got NaN or infinity")
        if name.endswith((".count", ".position", ".var")):
            least, most = (bound.item() for bound in torch.aminmax(tensor))
            below = config.chunk_size if name.endswith(".position") else None
            if least < 0 or (below is not None and most >= below):
                expected = "at least 0" if below is None else f"in [0, {below})"
                raise ValueError(f"`{name}` must be {expected}, got values from {least} to {most}")


def batch_of(found: dict[str, tuple[torch.dtype | None, tuple[int, ...]]]) -> tuple[int, torch.dtype]:
    """The number of sequences and the dtype of activations that two of a file's tensors say."""
    _, count = found.get("norm.count", (None, ()))
    activations, _ = found.get("layers.0.attention.k", (None, ()))
    if len(count) != 1 or activations not in ACTIVATIONS:
        raise ValueError("its tensors are not those of a state")
    return count[0], activations
