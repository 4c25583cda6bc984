"""A model's state between two batches: picking sequences out of it, and its tensors by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from megalodon_ops import AttentionState, BlockState, MegalodonConfig, MegalodonState, TimestepNormState


def select(state: MegalodonState, rows: Tensor) -> MegalodonState:
    """The state of the sequences `rows`; a row of -1 becomes a fresh state. Where all rows go on, nothing is copied."""
    if torch.equal(rows, torch.arange(len(state.norm.count), device=rows.device)):
        return state
    fresh, source = (rows < 0).nonzero()[:, 0], rows.clamp(min=0)
    return tree_map_only(Tensor, lambda tensor: tensor.index_select(0, source).index_fill_(0, fresh, 0), state)


def to_tensors(state: MegalodonState) -> dict[str, Tensor]:
    """Every tensor of the state under a name such as `layers.0.norm.mean`; complex ones as pairs of reals."""
    tensors = {}

    def note(name: str, node: Any) -> None:
        if isinstance(node, Tensor):
            tensors[name] = torch.view_as_real(node) if node.is_complex() else node
        elif node is not None:
            fields = getattr(node, "_fields", range(len(node)))
            for field, child in zip(fields, node, strict=True):
                note(f"{name}.{field}" if name else str(field), child)

    note("", state)
    return tensors


def layout(
    config: MegalodonConfig, rows: int, activations: torch.dtype
) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
    """Name, dtype and shape of every tensor that :func:`to_tensors` gives for the state of so many rows."""

    def norm(prefix: str) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
        groups = config.norm_num_groups
        yield f"{prefix}count", torch.int64, (rows,)
        yield f"{prefix}mean", torch.float32, (rows, groups)
        yield f"{prefix}var", torch.float32, (rows, groups)
        yield f"{prefix}residual", torch.float32, (rows, 2, groups)

    heads = config.num_heads
    for layer in range(config.num_layers):
        prefix = f"layers.{layer}."
        yield from norm(f"{prefix}norm.")
        yield f"{prefix}cema", torch.float32, (rows, config.model_dim, config.cema_ndim, 2)
        for name, dim in (("k", config.z_dim), ("v", config.value_dim)):
            yield f"{prefix}attention.{name}", activations, (rows, config.chunk_size, heads, dim // heads)
        yield f"{prefix}attention.position", torch.int64, (rows,)
    yield from norm("norm.")


def from_tensors(tensors: dict[str, Tensor], num_layers: int) -> MegalodonState:
    def norm(prefix: str) -> TimestepNormState:
        return TimestepNormState(*(tensors[prefix + field] for field in TimestepNormState._fields))

    def block(prefix: str) -> BlockState:
        return BlockState(
            norm=norm(prefix + "norm."),
            cema=torch.view_as_complex(tensors[prefix + "cema"]),
            attention=AttentionState(*(tensors[f"{prefix}attention.{field}"] for field in AttentionState._fields)),
        )

    return MegalodonState(tuple(block(f"layers.{i}.") for i in range(num_layers)), norm("norm."))
