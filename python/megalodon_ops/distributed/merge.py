r"""The algebra of chunk parallel: the initial state of a piece, from the end states of the pieces before it.

Each rank runs its piece from a zero state to an end state: h_j of `cema`, (n_j, mean_j, var_j) of `timestep_norm`.
`cema` is linear, so n positions turn a state h into q^n h plus the end state from zero. Statistics of `timestep_norm`
merge as those of two samples do (Chan, Golub and LeVeque). Over the pieces j before a piece,

    h <- q^{n_j} h + h_j
    c = n_j / (n + n_j);  d = mean_j - mean;  n <- n + n_j
    mean <- mean + c d;  var <- (1 - c) var + c var_j + c (1 - c) d^2

which starts from the state before the sequence, or from zero. Powers and sums are complex128 and float64, whatever the
dtype of the states. Gradients flow to end states, poles and the state before the sequence.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops.common.states import TimestepNormState


def merged_cema(
    q: Tensor, ends: Tensor, pieces: Sequence[int], lengths: Sequence[int], start: Tensor | None = None
) -> Tensor:
    """State of `cema` (R, D, N), in the dtype of `q`, after consecutive pieces.

    Args:
        q: (D, N) complex.
        ends: (P, R, D, N) complex, the end state of each of P pieces of R sequences, from zero.
        pieces: indices of the pieces to merge, in order. If there are none, the result is `start`, and still depends on
            `ends` in autograd's graph, as all ranks must take part in the backward.
        lengths: number of positions of each piece to merge, at least 1.
        start: (R, D, N) complex, the state before these pieces; None: zero.
    """
    wide = q.to(torch.complex128)
    powers = {n: wide**n for n in {*lengths}}
    h = ends[:0].sum(0).to(torch.complex128)
    if start is not None:
        h = h + start
    for piece, n in zip(pieces, lengths, strict=True):
        h = powers[n] * h + ends[piece]
    return h.to(q.dtype)


def merged_norm(
    ends: Tensor,
    pieces: Sequence[int],
    lengths: Sequence[int],
    start: Tensor | None = None,
    count: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> TimestepNormState:
    """State of `timestep_norm` after consecutive pieces.

    Args:
        ends: (P, R, 2, G) float64, mean and variance of each of P pieces of R sequences alone.
        pieces, lengths: as in :func:`merged_cema`.
        start: (R, 2, G) float64, mean and variance before these pieces; None: no positions.
        count: (R,) int64, number of positions before these pieces; None: 0.
        dtype: dtype of the returned mean, variance and residual.
    """
    mean, var = ends[:0].sum(0).unbind(-2)
    if count is None:
        count = torch.zeros(mean.shape[0], dtype=torch.int64, device=mean.device)
    if start is not None:
        has_past = (count > 0)[:, None]
        mean, var = (value + torch.where(has_past, past, 0) for value, past in zip((mean, var), start.unbind(-2)))
    for piece, n in zip(pieces, lengths, strict=True):
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
