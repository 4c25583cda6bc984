"""Names, dtypes and shapes of the tensors of a :class:`MegalodonState`, in memory and in files, and their checks."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .config import MegalodonConfig
from .gecko_block import MemoryBlockState, block_state_type
from ..ops.common.checks import short_text
from ..ops.common.definition import accumulation_dtype
from ..ops.common.memory import is_finite
from ..ops.common.quantized_rows import SCALE_BYTES, scales_of_rows

ACTIVATIONS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""Dtypes that a model's activations can have"""
Layout = Iterator[tuple[str, torch.dtype, tuple[int, ...]]]
"""Name, dtype and shape of each tensor; complex tensors as pairs of reals"""


def check_cache_dtype(function: str, cache_dtype: object, activations: torch.dtype, has_memory: bool) -> None:
    """Raise a ValueError unless `cache_dtype` is int8 and the activations' dtype and the model allow it."""
    if cache_dtype != torch.int8:
        raise ValueError(f"{function}: `cache_dtype` must be torch.int8 or None, got {short_text(cache_dtype)}.")
    if activations == torch.float64 or has_memory:
        what = "a working memory, which reads exact values" if has_memory else "float64 activations"
        raise ValueError(f"{function}: keys and values must not have 8 bits beside {what}, got torch.int8.")


def layout(config: MegalodonConfig, rows: int, cache_dtype: torch.dtype) -> Layout:
    """Yield name, dtype and shape of the tensors of a state of `rows` sequences."""
    real, heads = accumulation_dtype(cache_dtype), config.num_heads
    scale_bytes = SCALE_BYTES if cache_dtype == torch.int8 else 0

    def norm(prefix: str, groups: int, real: torch.dtype) -> Layout:
        has_group_counts = prefix == "inputs." and config.missing_values
        yield f"{prefix}count", torch.int64, (rows, groups) if has_group_counts else (rows,)
        yield f"{prefix}mean", real, (rows, groups)
        yield f"{prefix}var", real, (rows, groups)
        yield f"{prefix}residual", real, (rows, 2, groups)

    for layer in range(config.num_layers):
        prefix = f"layers.{layer}."
        yield from norm(f"{prefix}norm.", config.norm_num_groups, real)
        yield f"{prefix}cema", real, (rows, config.model_dim, config.cema_ndim, 2)
        for name, dim in (("k", config.z_dim), ("v", config.value_dim)):
            shape = (rows, config.num_cached_positions, heads, dim // heads + scale_bytes)
            yield f"{prefix}attention.{name}", cache_dtype, shape
        yield f"{prefix}attention.position", torch.int64, (rows,)
        if block_state_type(config) is MemoryBlockState:
            K, V = config.z_dim // heads, config.value_dim // heads
            yield f"{prefix}memory", real, (rows, heads, K, V)
            yield f"{prefix}memory_mass", real, (rows, heads, K)
            yield f"{prefix}memory_k", cache_dtype, (rows, config.num_cached_positions, heads, K)
    yield from norm("norm.", config.norm_num_groups, real)
    if scales_inputs(config):
        yield from norm("inputs.", config.num_features, torch.float64)


def scales_inputs(config: MegalodonConfig) -> bool:
    """Return True if a state has the running statistics of the inputs."""
    return config.num_features is not None and config.scale_inputs


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
