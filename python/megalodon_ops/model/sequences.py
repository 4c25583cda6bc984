"""`Sequences`: where the sequences of a call lie, and the states that a block begins them with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Sequences:
    """The sequences in x (B, L, ...), as a model hands them to its layers: with neither field, every row is one.

    A block asks its sequences for the states that its ops begin with. Whole sequences give those of the caller; pieces
    of sequences (distributed/chunk.py) ask other ranks.
    """

    cu_seqlens: Tensor | None = None
    """(S + 1,), offsets of sequences packed into one row"""
    lengths: Tensor | None = None
    """(B,), positions of each right-padded row"""

    @property
    def keywords(self) -> dict[str, Tensor | None]:
        """The fields as keywords of an op."""
        return {"cu_seqlens": self.cu_seqlens, "lengths": self.lengths}

    def norm_state(self, norm: nn.Module, x: Tensor, given: Any) -> Any:
        """The state that a timestep norm begins x (B, L, D) with; `given`: the caller's."""
        return given

    def send_end(self, cema: nn.Module, t: Tensor, given: Any) -> Any:
        """Send other ranks the end of `cema` over t (B, L, D), for :meth:`receive`; `given`: the caller's block state."""
        return given

    def receive(self, sent: Any) -> Any:
        """The block state from which `cema` and what follows it begin."""
        return sent

    def carry(self, op: Callable, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        """Call an op that sees chunks before a position's own, with a `state` of them among its options."""
        return op(q, k, v, **options, **self.keywords)
