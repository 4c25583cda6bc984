r"""The algebra of chunk parallel: what a piece of a sequence begins with, from what every piece before it ends with.

Each rank runs its piece from a zero state, and from a fresh norm, to an end: h_j of `cema`, (n_j, mean_j, var_j) of
`timestep_norm`. `cema` is linear, so that n steps turn a state h into q^n h plus the end from zero; n steps of
`timestep_norm` merge with what came before as two samples do (Chan, Golub and LeVeque). Over pieces j before a piece,

    h <- q^{n_j} h + h_j
    c = n_j / (n + n_j);  d = mean_j - mean;  n <- n + n_j
    mean <- mean + c d;  var <- (1 - c) var + c var_j + c (1 - c) d^2

from the state before the sequence, or from zero. Powers and sums are complex128 and float64, whatever the states'
dtype. All is plain torch on small tensors, so that gradients flow to ends, poles and the state before the sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops.common.states import TimestepNormState


def merged_cema(
    q: Tensor, ends: Tensor, pieces: Sequence[int], steps: Sequence[int], start: Tensor | None = None
) -> Tensor:
    """The state of `cema` (R, D, N), in the dtype of `q`, after some pieces in a row.

    Args:
        q: (D, N) complex.
        ends: (P, R, D, N) complex, the state after each of P pieces of R sequences, begun from zero.
        pieces: which of the P pieces count, in order. Without any, the result is `start`, and depends on `ends` in
            autograd's graph all the same: what differs between ranks is never whether they take part in a backward.
        steps: how many steps each of these has, at least 1.
        start: (R, D, N) complex, the state before them; None: zero.
    """
    wide = q.to(torch.complex128)
    powers = {n: wide**n for n in {*steps}}
    h = ends[:0].sum(0).to(torch.complex128)
    if start is not None:
        h = h + start
    for piece, n in zip(pieces, steps, strict=True):
        h = powers[n] * h + ends[piece]
    return h.to(q.dtype)


def merged_norm(
    ends: Tensor,
    pieces: Sequence[int],
    steps: Sequence[int],
    start: Tensor | None = None,
    count: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> TimestepNormState:
    """The state of `timestep_norm` after some pieces in a row.

    Args:
        ends: (P, R, 2, G) float64, mean and variance of each of P pieces of R sequences by itself.
        pieces, steps: as in :func:`merged_cema`.
        start: (R, 2, G) float64, mean and variance before them, and count: (R,) int64, of how many steps; None: fresh.
        dtype: that of the returned mean, variance and residual.
    """
    mean, var = ends[:0].sum(0).unbind(-2)
    if count is None:
        count = torch.zeros(mean.shape[0], dtype=torch.int64, device=mean.device)
    if start is not None:
        begun = (count > 0)[:, None]
        mean, var = (value + torch.where(begun, given, 0) for value, given in zip((mean, var), start.unbind(-2)))
    for piece, n in zip(pieces, steps, strict=True):
        count = count + n
        share = n / count.double()[:, None]
        end_mean, end_var = ends[piece].unbind(-2)
        difference = end_mean - mean
        mean = mean + share * difference
        var = (1 - share) * var + share * end_var + share * (1 - share) * difference.square()
    residual = torch.stack([(wide - wide.to(dtype)).to(dtype) for wide in (mean.detach(), var.detach())], 1)
    return TimestepNormState(count, mean.to(dtype), var.to(dtype), residual)


def norm_in_float64(state: TimestepNormState) -> Tensor:
    """(S, 2, G) float64: mean and variance with their residuals; gradients flow to the mean and the variance."""
    values = torch.stack([state.mean, state.var], 1).double()
    return values if state.residual is None else values + state.residual.detach()
