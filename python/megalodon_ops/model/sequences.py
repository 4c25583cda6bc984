"""`Sequences`: the sequences of a call, and a block's initial states for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Sequences:
    """Sequences in x (B, L, ...), which a model passes to its layers. With neither field, every row is one sequence.

    A block asks this object for the initial states of its ops. For whole sequences these are the caller's; for pieces
    of sequences, a subclass receives them from other ranks (distributed/chunk.py).
    """

    cu_seqlens: Tensor | None = None
    """(S + 1,), offsets of sequences packed into one row"""
    lengths: Tensor | None = None
    """(B,), positions of each right-padded row"""

    @property
    def keywords(self) -> dict[str, Tensor | None]:
        """Return the fields as keywords of an op."""
        return {"cu_seqlens": self.cu_seqlens, "lengths": self.lengths}

    def contains(self, row: int, position: int) -> bool:
        """Return True if a position belongs to a sequence, False at padding."""
        if self.cu_seqlens is not None:
            return int(self.cu_seqlens[0]) <= position < int(self.cu_seqlens[-1])
        return self.lengths is None or position < int(self.lengths[row])

    def norm_state(self, norm: Any, x: Tensor, given: Any) -> Any:
        """Return the initial state of a norm with `num_groups` over x (B, L, D); `given`: the caller's state."""
        return given

    def send_end(self, cema: nn.Module, t: Tensor, given: Any) -> Any:
        """Send other ranks the end state of `cema` over t (B, L, D); `given`: the caller's block state."""
        return given

    def receive(self, sent: Any) -> Any:
        """Return the initial block state for `cema` and the ops after it; `sent`: the result of :meth:`send_end`."""
        return sent

    def carry(self, op: Callable, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        """Call an op that reads earlier chunks, with their `state` among its options."""
        return op(q, k, v, **options, **self.keywords)
