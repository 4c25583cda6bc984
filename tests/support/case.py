"""A call of an op as data, and what the shared tests know of an op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_map_only

Tensors = dict[str, Tensor]
Sizes = dict[str, Any]
"""What the builder of a case is given"""


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(gen: torch.Generator, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal values, drawn in float64 whatever the dtype, then rounded."""
    if dtype.is_complex:
        return torch.complex(randn(gen, *shape), randn(gen, *shape)).to(dtype)
    return torch.randn(*shape, generator=gen, dtype=torch.float64).to(dtype)


def uniform(gen: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    return low + (high - low) * torch.rand(*shape, generator=gen, dtype=torch.float64)


@dataclass(frozen=True)
class Case:
    """One call: `tensors` take gradients, `options` are the other arguments."""

    op: str
    tensors: Tensors
    options: dict[str, Any]
    dtype: torch.dtype  # of the tokens; incoming gradients are rounded to it
    terms: float = 0.1  # size of the terms whose sums make a gradient: terms that cancel leave their rounding
    mean_terms: float = 0.0  # and of those whose sum makes a mean
    poison: float = torch.nan  # the value of tokens, and of incoming gradients, that are in no sequence

    def double(self) -> Case:
        """The case with its values in float64."""

        def widen(value: Any) -> Any:
            if isinstance(value, tuple):
                return type(value)(*map(widen, value))
            if isinstance(value, Tensor) and (value.is_complex() or value.is_floating_point()):
                return value.to(torch.complex128 if value.is_complex() else torch.float64)
            return value

        tensors = {name: widen(tensor) for name, tensor in self.tensors.items()}
        return replace(self, tensors=tensors, options={name: widen(value) for name, value in self.options.items()})

    def poisoned(self, tokens: Tensor) -> Tensor:
        """The tokens (B, L, ...), or gradients of an output, with the case's poison where no sequence is."""
        if "lengths" in self.options:
            ends = self.options["lengths"]
            begins = torch.zeros_like(ends)
        elif "cu_seqlens" in self.options:
            begins, ends = self.options["cu_seqlens"][:1], self.options["cu_seqlens"][-1:]
        else:
            return tokens
        steps = torch.arange(tokens.shape[1], device=tokens.device)
        inside = (steps >= begins[:, None]) & (steps < ends[:, None])
        return tokens.where(inside.view(*inside.shape, *[1] * (tokens.dim() - 2)), self.poison)

    def with_tensors(self, **tensors: Tensor) -> Case:
        return replace(self, tensors=self.tensors | tensors)

    def with_options(self, **options: Any) -> Case:
        return replace(self, options=self.options | options)

    def converted(self, convert: Callable[[Tensor], Any]) -> Case:
        """The case with something else for each of its tensors, inside states, too."""
        tensors, options = tree_map_only(Tensor, convert, (self.tensors, self.options))
        return replace(self, tensors=tensors, options=options)


def sequence_options(cu_seqlens: Sequence[int] | None, lengths: Sequence[int] | None) -> dict[str, Tensor]:
    named = {"cu_seqlens": cu_seqlens, "lengths": lengths}
    return {name: torch.tensor(values) for name, values in named.items() if values is not None}


def count_sequences(B: int, cu_seqlens: Sequence[int] | None) -> int:
    return B if cu_seqlens is None else len(cu_seqlens) - 1


def call_with_state(
    function: Callable[..., Any], inputs: list[Tensor], tensors: Tensors, options: dict[str, Any]
) -> Tensors:
    y, state = function(*inputs, state=tensors.get("state"), return_state=True, **options)
    return {"y": y, "state": state}


def call_without_state(
    function: Callable[..., Any], inputs: list[Tensor], tensors: Tensors, options: dict[str, Any]
) -> Tensors:
    return {"y": function(*inputs, **options)}


@dataclass(frozen=True)
class CudaSizes:
    """Sizes for the tests of an op's CUDA kernels."""

    aligned: tuple[Sizes, ...]  # allow the widest accesses, and reach every kernel
    sanitized: tuple[Sizes, ...]  # below, at and above those of tiles and vectors; dense, padded, packed; with states
    smallest: Sizes  # for very many sequences
    odd: Sizes  # for offsets that contradict the tensors


@dataclass(frozen=True)
class Op:
    """An op as the shared tests know it: `OP` of tests/ops/<room>/<op>_case.py. Inputs in order, outputs by name.

    `call` runs an implementation, `gradients` the reference's backward on incoming gradients; without them an op returns
    y and a state, and takes a state, which is a tensor of the case.
    """

    name: str
    case: Callable[..., Case]  # builds one from sizes
    cases: Callable[..., st.SearchStrategy[Case]]  # awkward sizes and hard values
    tokens: tuple[str, ...]  # (B, L, ...)
    parameters: tuple[str, ...]
    without_elements: tuple[Sizes, ...]
    outputs: tuple[str, ...] = ("y",)  # (B, L, ...); none where the op returns the end state alone
    call: Callable[[Callable[..., Any], list[Tensor], Tensors, dict[str, Any]], Tensors] = call_with_state
    gradients: Callable[[Callable[..., Any], Case, list[Tensor], Tensors], Tensors] | None = None
    with_state: Sizes = field(default_factory=dict)  # what `case` is given for a state to start from
    small: Sizes = field(default_factory=dict)  # and beside that for the small call that most tests make
    threads: dict[str, Sizes] = field(default_factory=dict)  # each way in which threads share the work
    cuda: CudaSizes | None = None  # None: no CUDA kernels of its own
    constant_state: bool = False  # a cut inside a chunk cuts the gradient, too
    whole: bool = False  # each token sees its whole sequence: no state, no pieces
