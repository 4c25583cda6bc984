"""A model's state between two batches: picking sequences out of it, and its tensors by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megalodon_ops import AttentionState, BlockState, MegalodonState, TimestepNormState


def select(state: MegalodonState, rows: Tensor) -> MegalodonState:
    """The state of the sequences `rows`; a row of -1 becomes a fresh one."""
    fresh = rows < 0
    source = rows.clamp(min=0)

    def pick(name: str, tensor: Tensor) -> Tensor:
        dim = 1 if name == "residual" else 0  # every other tensor has its sequences first
        return tensor.index_select(dim, source).index_fill_(dim, fresh.nonzero()[:, 0], 0)

    return _map(pick, state)


def to_tensors(state: MegalodonState) -> dict[str, Tensor]:
    """Every tensor of the state under a name such as `layers.0.norm.mean`; complex ones as pairs of reals."""
    tensors = {}

    def note(name: str, tensor: Tensor) -> Tensor:
        tensors[name] = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        return tensor

    _map(note, state, whole_names=True)
    return tensors


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


def _map(function: Callable[[str, Tensor], Tensor], node: Any, name: str = "", whole_names: bool = False) -> Any:
    if node is None:
        return None
    if isinstance(node, Tensor):
        return function(name, node)
    fields = getattr(node, "_fields", range(len(node)))
    prefix = f"{name}." if whole_names and name else ""
    values = (_map(function, child, f"{prefix}{field}", whole_names) for field, child in zip(fields, node, strict=True))
    return type(node)(*values) if hasattr(node, "_fields") else tuple(values)
