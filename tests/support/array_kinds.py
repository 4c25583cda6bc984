"""Arrays of other libraries for the ops' arguments: kinds of them, and cases made of them."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from cases import Case
from torch import Tensor
from torch.utils._pytree import tree_map_only

import megalodon_ops as mo


def function(op: str) -> Callable[..., Any]:
    return getattr(mo, op)


def on_arrays(case: Case, convert: Callable[[Tensor], Any] = Tensor.numpy) -> Case:
    """The case with arrays for tensors, inside states, too."""
    return case.with_tensors(**tree_map_only(Tensor, convert, case.tensors)).with_options(
        **tree_map_only(Tensor, convert, case.options)
    )


def as_tensors(results: dict[str, Any]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.array(getattr(result, "array", result))) for name, result in results.items()}


class Bare:
    """An array with the least that DLPack's protocol asks for."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()


class Named(Bare):
    """An array with a namespace, as the array API standard describes it."""

    def __array_namespace__(self, api_version: str | None = None) -> Any:
        return types.SimpleNamespace(from_dlpack=lambda array: Named(np.from_dlpack(array)))


def read_only(array: np.ndarray) -> np.ndarray:
    array = array[...]
    array.flags.writeable = False
    return array
