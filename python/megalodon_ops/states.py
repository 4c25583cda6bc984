"""What a call passes on to the next: plain tuples of tensors, one entry for each sequence."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class TimestepNormState(NamedTuple):
    """Running statistics of S sequences in G groups.

    Value plus residual carries about twice the digits of the dtype, so that a million short calls do not drift.
    """

    count: Tensor
    """(S,) int64, timesteps seen"""
    mean: Tensor
    """(S, G) float32, or float64 for float64 input"""
    var: Tensor
    """(S, G), biased"""
    residual: Tensor | None = None
    """(2, S, G), low-order parts of mean and var; None counts as zero"""


class AttentionState(NamedTuple):
    """Keys and values of each sequence's unfinished chunk of C steps; rows [0, position) are valid."""

    k: Tensor
    """(S, C, H, K), after rotary"""
    v: Tensor
    """(S, C, H, V)"""
    position: Tensor
    """(S,) int64, each in [0, C)"""
