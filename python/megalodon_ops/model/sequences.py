"""`Sequences`: the sequences of a call, and a block's initial states for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.timestep_norm.timestep_norm import timestep_norm_end_state
from ..ops.common.checks import short_text
from ..ops.common.spans import as_spans, num_sequences, pairs_of, read_spans, token_sequences


def pooled(op: str, features: Tensor, pool: str | None, options: dict[str, Any]) -> Tensor:
    """Return features (B, L, D) or, with `pool`, a vector (S, D) of each sequence in the options of a call."""
    if pool is None:
        return features
    where = {name: options.get(name) for name in ("cu_seqlens", "lengths", "starts", "spans")}
    return Sequences.of(op, features, **where).pool(op, features, pool)


@dataclass(frozen=True, eq=False)
class Sequences:
    """Sequences in x (B, L, ...), which a model passes to its layers.

    A block asks this object for the initial states of its ops. For whole sequences these are the caller's; for pieces
    of sequences, a subclass receives them from other ranks (distributed/chunk.py).
    """

    spans: Tensor | None = None
    """int64 in one of the layouts of ops/common/spans.py; None: every row is one sequence"""

    @classmethod
    def of(
        cls,
        op: str,
        x: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        lengths: Tensor | None = None,
        starts: Tensor | None = None,
        spans: Tensor | None = None,
        is_piece: bool = False,
    ) -> Sequences:
        """Return the sequences of x (B, L, ...) from the arguments of `op`.

        Values on the CPU are checked here, so that errors name `op`, unless x is a piece of the sequences.
        """
        result = as_spans(op, x, cu_seqlens, lengths, starts, spans)
        if type(result) is Tensor and result.is_cpu and not (is_piece or torch.compiler.is_compiling()):
            pairs = read_spans(op, x, result)
            if cu_seqlens is not None and pairs and pairs[-1][1] != x.shape[1]:
                got = f"got {pairs[-1][1]} for a row of {x.shape[1]}; `spans` may leave positions out"
                raise ValueError(f"{op}: `cu_seqlens` must end where the row does, {got}.")
        return cls(result)

    def mask(self, x: Tensor) -> Tensor:
        """Return (B, L) bool, True at positions of x (B, L, ...) in a sequence, False at padding."""
        return token_sequences(x, self.spans) < num_sequences(x.shape[0], self.spans)

    def pool(self, op: str, x: Tensor, how: str) -> Tensor:
        """Return the mean, maximum or last vector (S, D) of x (B, L, D) in each sequence, zero for an empty sequence."""
        B, L, D = x.shape
        flat = x.flatten(0, 1)
        if how == "mean":  # the norm's statistics with a group for each channel, summed in float64
            return timestep_norm_end_state(x, num_groups=D, spans=self.spans).mean.to(x.dtype)
        if how == "max":
            S = num_sequences(B, self.spans)
            owner = token_sequences(x, self.spans).flatten()[:, None].expand(-1, D)  # padding owns row S, dropped
            return flat.new_zeros(S + 1, D).scatter_reduce(0, owner, flat, "amax", include_self=False)[:S]
        if how != "last":
            raise ValueError(f'{op}: `pool` must be "mean", "max", "last" or None, got {short_text(how)}.')
        if self.spans is None:
            begins = torch.arange(B, device=x.device) * L
            ends = begins + L
        else:
            begins, ends = pairs_of(self.spans).unbind(1)
        return flat[(ends - 1).clamp(min=0)].where((begins < ends)[:, None], 0)

    def norm_state(self, num_groups: int, x: Tensor, given: Any) -> Any:
        """Return the initial state of a timestep norm over x (B, L, D); `given`: the caller's state."""
        return given

    def send_end(self, cema: nn.Module, t: Tensor, given: Any) -> Any:
        """Send other ranks the end state of `cema` over t (B, L, D); `given`: the caller's block state."""
        return given

    def receive(self, sent: Any) -> Any:
        """Return the initial block state for `cema` and the ops after it; `sent`: the result of :meth:`send_end`."""
        return sent

    def carry(self, op: Callable, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        """Call an op that reads earlier chunks, with their `state` among its options."""
        return op(q, k, v, **options, spans=self.spans)
