"""A call of an op as data, and the description of an op for the shared tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_map_only

from megalodon_ops.ops.common.spans import as_spans, pairs_of

F32 = torch.float32
Tensors = dict[str, Tensor]
SEQUENCES = ("cu_seqlens", "lengths", "starts", "spans")
Sizes = dict[str, Any]
"""Keyword arguments of a function that builds a case"""


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(gen: torch.Generator, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal values, drawn in float64 for every dtype, then rounded."""
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
    terms: float = 0.1  # size of a gradient's terms: where they cancel, their rounding errors remain
    mean_terms: float = 0.0  # size of a mean's terms
    poison: float = torch.nan  # value of padding, in tokens and in incoming gradients

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
        """Tokens (B, L, ...), or gradients of an output, with the case's poison at the padding."""
        spans = self.spans()
        if spans is None:
            return tokens
        begins, ends = pairs_of(spans).T[..., None]
        token = torch.arange(tokens.shape[0] * tokens.shape[1])
        inside = ((begins <= token) & (token < ends)).any(0).view(tokens.shape[:2])
        return tokens.where(inside.view(*inside.shape, *[1] * (tokens.dim() - 2)), self.poison)

    def spans(self) -> Tensor | None:
        """The spans of the case's sequences."""
        where = [self.options.get(name) for name in SEQUENCES]
        return as_spans(self.op, next(iter(self.tensors.values())), *where)

    def below_the_public_function(self) -> Case:
        """The case with spans in place of the other arguments that say where sequences lie."""
        options = {name: value for name, value in self.options.items() if name not in SEQUENCES}
        return replace(self, options=options | {"spans": self.spans()})

    def with_tensors(self, **tensors: Tensor) -> Case:
        return replace(self, tensors=self.tensors | tensors)

    def with_options(self, **options: Any) -> Case:
        return replace(self, options=self.options | options)

    def converted(self, convert: Callable[[Tensor], Any]) -> Case:
        """The case with `convert` applied to each of its tensors, including those of states."""
        tensors, options = tree_map_only(Tensor, convert, (self.tensors, self.options))
        return replace(self, tensors=tensors, options=options)


def sequence_options(**rows: Sequence | None) -> dict[str, Tensor]:
    """Tensors of cu_seqlens, lengths, starts or spans."""
    assert rows.keys() <= {*SEQUENCES}, rows
    options = {name: torch.tensor(v, dtype=torch.int64) for name, v in rows.items() if v is not None}
    if "spans" in options:
        options["spans"] = options["spans"].view(-1, 2)  # also without spans
    return options


def count_sequences(B: int, **rows: Sequence) -> int:
    if "cu_seqlens" in rows:
        return len(rows["cu_seqlens"]) - 1
    return len(rows["spans"]) if "spans" in rows else B


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

    aligned: tuple[Sizes, ...]  # allow the widest accesses; together they reach every kernel
    sanitized: tuple[Sizes, ...]  # below, at and above those of tiles and vectors; dense, padded, packed; with states
    smallest: Sizes  # for very many sequences
    odd: Sizes  # for cu_seqlens, lengths and positions out of range


@dataclass(frozen=True)
class Op:
    """Description of an op for the shared tests: `OP` of tests/ops/<room>/<op>_case.py. Outputs are named.

    `call` runs an implementation, `gradients` the reference's backward on incoming gradients. By default an op takes a
    state, a tensor of the case, and returns y and a state.
    """

    name: str
    case: Callable[..., Case]  # builds one from sizes
    cases: Callable[..., st.SearchStrategy[Case]]  # awkward sizes and hard values
    tokens: tuple[str, ...]  # (B, L, ...)
    parameters: tuple[str, ...]
    without_elements: tuple[Sizes, ...]
    outputs: tuple[str, ...] = ("y",)  # (B, L, ...); empty if the op returns only the end state
    call: Callable[[Callable[..., Any], list[Tensor], Tensors, dict[str, Any]], Tensors] = call_with_state
    gradients: Callable[[Callable[..., Any], Case, list[Tensor], Tensors], Tensors] | None = None
    with_state: Sizes = field(default_factory=dict)  # arguments of `case` that add an initial state
    small: Sizes = field(default_factory=dict)  # further arguments of `case` for cases.SMALL
    threads: dict[str, Sizes] = field(default_factory=dict)  # a case for each way to divide the work among threads
    cuda: CudaSizes | None = None  # None: no CUDA kernels of its own
    constant_state: bool = False  # no gradient flows through the state
    whole: bool = False  # each token depends on its whole sequence: no state, no pieces
