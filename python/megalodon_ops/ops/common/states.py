"""States, which a call of an op passes to the next call: tuples of tensors with one row per sequence."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import _register_namedtuple

from .checks import check_tensor, describe

_NESTED_STATES = ("norm", "attention")  # fields of a block's state that are states themselves


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums and states: float64 for float64, float32 for other dtypes."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def state_fields(op: str, state: tuple | None, kind: type[tuple]) -> tuple:
    """Return the fields of a state: None for a field that is missing, and for every field if `state` is None."""
    fields, defaults = kind._fields, kind._field_defaults
    if state is None:
        return (None,) * len(fields)
    if not isinstance(state, tuple) or not len(fields) - len(defaults) <= len(state) <= len(fields):
        got = f"a tuple of {len(state)}" if isinstance(state, tuple) else describe(state)
        raise TypeError(f"{op}: `state` must be a {kind.__name__} ({', '.join(fields)}) or None, got {got}.")
    for name, part in zip(fields, state):
        if part is None and name not in defaults:
            raise ValueError(f"{op}: `state.{name}` must be a tensor, got None; pass state=None for a fresh state.")
        if part is not None and not (name in _NESTED_STATES and isinstance(part, tuple)):
            check_tensor(op, f"state.{name}", part)
    return (*state, *(None,) * (len(fields) - len(state)))


def named_in_programs(kind: type[tuple]) -> type[tuple]:
    """Register a class of states by name, so that torch.export.save can write programs with them. Return the class."""
    _register_namedtuple(kind, serialized_type_name=f"megalodon_ops.{kind.__name__}")
    return kind


@named_in_programs
class TimestepNormState(NamedTuple):
    """Running statistics of S sequences in G groups.

    A value and its residual together have about twice the digits of the dtype, so a million short calls do not drift.

    Example:
        >>> import torch, megalodon_ops as mo
        >>> _, state = mo.timestep_norm(torch.ones(2, 5, 8), *torch.zeros(2, 8), num_groups=4, return_state=True)
        >>> state.count, state.mean.shape
        (tensor([5, 5]), torch.Size([2, 4]))
    """

    count: Tensor
    """(S,) int64, number of positions so far"""
    mean: Tensor
    """(S, G) float32, or float64 for float64 input"""
    var: Tensor
    """(S, G), biased variance"""
    residual: Tensor | None = None
    """(S, 2, G), the low-order parts of mean and var; None for zeros"""


@named_in_programs
class AttentionState(NamedTuple):
    """Keys and values of each sequence's unfinished chunk of C positions; rows [0, position) are valid.

    If attention sees two chunks, k and v have 2 C rows: those of the last complete chunk, if there is one, come first.
    Keys and values of 8 bits are int8 of shape (S, C, H, K + 4) and (S, C, H, V + 4): the integers of a row, then the
    bytes of its float32 scale, the row's largest absolute value / 127.

    Example:
        >>> import torch, megalodon_ops as mo
        >>> q = k = v = torch.zeros(1, 5, 2, 8)
        >>> _, state = mo.chunked_attention(q, k, v, chunk_size=4, return_state=True)
        >>> state.position, state.k.shape
        (tensor([1]), torch.Size([1, 4, 2, 8]))
    """

    k: Tensor
    """(S, C, H, K), after rotary"""
    v: Tensor
    """(S, C, H, V)"""
    position: Tensor
    """(S,) int64, number of valid rows, below the number of rows"""


@named_in_programs
class WorkingMemoryState(NamedTuple):
    """The memory of each sequence's complete chunks, and keys and values of the unfinished chunk of C positions.

    If attention sees two chunks, the memory does not contain the last complete chunk yet: k and v have 2 C rows, as in
    :class:`AttentionState`.

    Example:
        >>> import torch, megalodon_ops as mo
        >>> q = k = v = torch.zeros(1, 5, 2, 8)
        >>> _, state = mo.adaptive_working_memory(q, k, v, chunk_size=4, return_state=True)
        >>> state.position, state.memory.shape
        (tensor([5]), torch.Size([1, 2, 8, 8]))
    """

    memory: Tensor
    """(S, H, K, V) float32, or float64 for float64 input"""
    mass: Tensor
    """(S, H, K), logarithm of the total weight written to each row of the memory; 0 before the first complete chunk"""
    k: Tensor
    """(S, C, H, K)"""
    position: Tensor
    """(S,) int64, number of positions so far; the unfinished chunk has position % C of them"""
    v: Tensor
    """(S, C, H, V)"""
