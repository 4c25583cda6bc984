"""Timestep norm: group norm with cumulative statistics along time (arXiv 2404.08801, section 3.2).

The D channels form G groups of D/G neighbours. Position t is normalized by the mean and the biased variance of its
group over all positions up to and including t. With n positions so far, and with the mean gm and the biased variance gv
of x_t inside a group,

    n' = n + 1     c2 = 1 / n'     c1 = 1 - c2
    mean' = mean + c2 (gm - mean)
    var'  = c1 var + c2 gv + c1 c2 (gm - mean)^2
    y_t   = (x_t - mean') rstd (1 + weight) + bias          rstd = 1 / sqrt(var' + eps)

This is Welford's update. Unlike E[x^2] - mean^2, it does not cancel when |mean| >> std. A fresh state has n = 0, hence
c1 = 0: its mean and var do not matter. Two spans with statistics (n_a, mean_a, var_a) and (n_b, mean_b, var_b) merge
associatively by the same formula, with n' = n_a + n_b and c2 = n_b / n'. So a sequence can be cut into spans that are
scanned in parallel.

A variance that overflows the state's dtype, beyond 3e38 for float32, gives NaN.

dtypes: x and y float32, float64, bfloat16 or float16; weight, bias and the state float32, or float64 for float64 x. A
state stores mean and var as value + residual, about twice the digits of its dtype: a mean rounded to one float32 stops
changing once c2 (gm - mean) is below half a unit in its last place. Statistics are float64 here, and split on return.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megalodon_ops.ops.common.reference_helpers import accumulation_dtype, sequences
from megalodon_ops.ops.common.states import TimestepNormState


def timestep_norm(
    x: Tensor,  # (B, L, D)
    weight: Tensor,  # (D,)
    bias: Tensor,  # (D,)
    *,
    num_groups: int,
    eps: float = 1e-5,
    state: TimestepNormState | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,  # (S + 1,)
    lengths: Tensor | None = None,  # (B,)
) -> Tensor | tuple[Tensor, TimestepNormState]:
    """Normalize by the statistics of positions 1 .. t: y_t = (x_t - mean_t) / sqrt(var_t + eps) (1 + weight) + bias.

    Returns y (B, L, D) and, with `return_state`, each sequence's count (S,), mean, var (S, G) and residual (S, 2, G).

    >>> x = torch.tensor([[[1.0, 3.0], [2.0, 2.0]]])
    >>> y, state = timestep_norm(x, torch.zeros(2), torch.zeros(2), num_groups=1, eps=0.0, return_state=True)
    >>> y[0, 0].tolist(), state.count.item(), state.mean.item(), state.var.item()
    ([-1.0, 1.0], 2, 2.0, 0.5)
    """
    real = accumulation_dtype(x.dtype)
    gain, bias = 1 + weight.to(real), bias.to(real)
    spans = sequences(x, cu_seqlens, lengths)
    y, counts, means, variances = torch.zeros_like(x), [], [], []
    for (row, tokens), (n, mean, var) in zip(spans, _initial(state, len(spans), num_groups, x.device), strict=True):
        x_s = x[row, tokens].double().unflatten(-1, (num_groups, -1))  # (n, G, D/G)
        count, mean, var, _ = _statistics(x_s, n, mean, var)
        normalized = (x_s - mean[1:, :, None]) * _rstd(var[1:, :, None], eps, real)
        y[row, tokens] = (normalized.flatten(-2).to(real) * gain + bias).to(x.dtype)
        counts.append(count)
        means.append(mean[-1])
        variances.append(var[-1])
    if not return_state:
        return y
    empty = torch.zeros(0, num_groups, dtype=torch.float64, device=x.device)
    mean, var = (torch.stack(a) if a else empty for a in (means, variances))  # (S, G)
    residual = torch.stack([(a - a.to(real)).to(real) for a in (mean.detach(), var.detach())], 1)
    count = torch.tensor(counts, dtype=torch.int64, device=x.device)
    return y, TimestepNormState(count, mean.to(real), var.to(real), residual)


def timestep_norm_bwd(
    dy: Tensor,  # (B, L, D)
    dmean: Tensor | None,  # (S, G), gradient of the returned mean
    dvar: Tensor | None,  # (S, G), gradient of the returned var
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    num_groups: int,
    eps: float = 1e-5,
    state: TimestepNormState | None = None,
    cu_seqlens: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Walk back through time with the gradients of mean and var. Returns dx, dweight, dbias, dmean, dvar.

    Let w = 1 + weight, r = rstd_t, and let U and V be the gradients of mean_t and var_t from position t + 1 (at the
    end, from the returned state). y_t also depends on mean_t and var_t. With sums over the channels of a group,

        y = (x - mean') r w + bias          ->   du = U - r sum dy w
        r = (var' + eps)^(-1/2)             ->   dv = V - r^3 / 2  sum dy w (x - mean')         as dr/dvar' = -r^3 / 2

    where du and dv are the total gradients of mean' and var', which the update propagates. With
    k = 2 c1 c2 (gm - mean) dv,

        mean' = c1 mean + c2 gm             ->   dgm = c2 du + k       U <- c1 du - k
        var'  = c1 var + c2 gv              ->   dgv = c2 dv           V <- c1 dv
                + c1 c2 (gm - mean)^2

    and gm = sum x / (D/G), gv = sum (x - gm)^2 / (D/G) give, since sum (x - gm) = 0 leaves no path from gv through gm,

        dx = dy r w + [ dgm + 2 dgv (x - gm) ] / (D/G)
        dweight = sum_t dy (x - mean') r    dbias = sum_t dy

    Divided by the count, u = U / n and v = V / n need no c1 and no c2: since mean' - mean = c2 (gm - mean),

        v' = v - r^3 / (2 n') sum dy w (x - mean')      p = u - r / n' sum dy w      u <- p - 2 v' (mean' - mean)
        dx = dy r w + [ p + 2 v' (x - mean') ] / (D/G)                               v <- v'

    which are the formulas of the kernels. U and V before the first position are the gradients of the given state: zero
    for a fresh state, where c1 = 0. No gradient goes to the count or the residual.
    """
    real = accumulation_dtype(x.dtype)
    w = (1 + weight.double()).unflatten(0, (num_groups, -1))  # (G, D/G)
    dx, dw, db = torch.zeros_like(x), torch.zeros_like(w), torch.zeros_like(w)
    spans = sequences(x, cu_seqlens, lengths)
    zero = torch.zeros(len(spans), num_groups, dtype=torch.float64, device=x.device)
    U = zero.clone() if dmean is None else dmean.double()
    V = zero.clone() if dvar is None else dvar.double()
    dmeans, dvars = torch.zeros_like(U), torch.zeros_like(V)
    for s, (n, mean, var) in enumerate(_initial(state, len(spans), num_groups, x.device)):
        row, tokens = spans[s]
        x_s = x[row, tokens].double().unflatten(-1, (num_groups, -1))  # (n, G, D/G)
        dy_s = dy[row, tokens].double().unflatten(-1, (num_groups, -1))
        _, mean, var, gm = _statistics(x_s, n, mean, var)
        r = _rstd(var, eps, real)
        centred = x_s - mean[1:, :, None]
        dw += (dy_s * centred * r[1:, :, None]).sum(0)
        db += dy_s.sum(0)
        dx_s = dy_s * r[1:, :, None] * w
        u, v = U[s], V[s]
        for t in reversed(range(len(x_s))):
            c2 = 1 / (n + t + 1)
            c1 = 1 - c2
            du = u - r[t + 1] * (dy_s[t] * w).sum(-1)
            dv = v - r[t + 1] ** 3 / 2 * (dy_s[t] * w * centred[t]).sum(-1)
            k = 2 * c1 * c2 * (gm[t] - mean[t]) * dv
            dx_s[t] += ((c2 * du + k)[:, None] + 2 * c2 * dv[:, None] * (x_s[t] - gm[t, :, None])) / x_s.shape[-1]
            u, v = c1 * du - k, c1 * dv
        dx[row, tokens] = dx_s.flatten(-2).to(x.dtype)
        if n:  # else the state is fresh: its mean and variance are not read, even for an empty sequence
            dmeans[s], dvars[s] = u, v
    return dx, dw.flatten().to(real), db.flatten().to(real), dmeans.to(real), dvars.to(real)


def timestep_norm_end_state(
    x: Tensor,  # (B, L, D)
    *,
    num_groups: int,
    cu_seqlens: Tensor | None = None,  # (S + 1,)
    lengths: Tensor | None = None,  # (B,)
) -> TimestepNormState:
    """Statistics after the last position of each sequence, from a fresh state.

    >>> state = timestep_norm_end_state(torch.tensor([[[1.0, 3.0], [2.0, 2.0]]]), num_groups=1)
    >>> state.count.item(), state.mean.item(), state.var.item()
    (2, 2.0, 0.5)
    """
    zeros = torch.zeros(x.shape[-1], dtype=accumulation_dtype(x.dtype), device=x.device)
    options = {"num_groups": num_groups, "return_state": True, "cu_seqlens": cu_seqlens, "lengths": lengths}
    return timestep_norm(x, zeros, zeros, **options)[1]


def timestep_norm_end_state_bwd(
    dmean: Tensor | None,  # (S, G)
    dvar: Tensor | None,  # (S, G)
    x: Tensor,
    *,
    num_groups: int,
    cu_seqlens: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """Return dx. Over the n positions of a sequence and the F channels of a group,

        mean = sum x / (n F)               ->   dx = dmean / (n F)
        var  = sum (x - mean)^2 / (n F)    ->   dx = ... + 2 dvar (x - mean) / (n F),

    as the sum of x - mean is 0, so var has no gradient through the mean.
    """
    dx = torch.zeros_like(x)
    for s, (row, tokens) in enumerate(sequences(x, cu_seqlens, lengths)):
        x_s = x[row, tokens].double().unflatten(-1, (num_groups, -1))  # (n, G, F)
        centred, total = x_s - x_s.mean((0, 2), keepdim=True), len(x_s) * x_s.shape[-1]
        dmean_s, dvar_s = (0.0 if d is None else d[s].double()[:, None] / max(total, 1) for d in (dmean, dvar))
        dx[row, tokens] = (dmean_s + 2 * dvar_s * centred).flatten(-2).to(x.dtype)
    return dx


def _rstd(var: Tensor, eps: float, real: torch.dtype) -> Tensor:
    """Return 1 / sqrt(var + eps), or NaN if the variance overflows this dtype."""
    return (var + eps).rsqrt() + 0 * (var + eps).to(real)


def _initial(
    state: TimestepNormState | None, count: int, num_groups: int, device: torch.device
) -> list[tuple[int, Tensor, Tensor]]:
    """Return n, mean (G,) and var (G,) of each sequence, in float64; zeros if n is 0."""
    if state is None:
        zero = torch.zeros(num_groups, dtype=torch.float64, device=device)
        return [(0, zero, zero)] * count
    mean, var = state.mean.double(), state.var.double()
    if state.residual is not None:
        mean_residual, var_residual = state.residual.detach().double().unbind(1)
        mean, var = mean + mean_residual, var + var_residual
    fresh = (state.count == 0)[:, None]
    mean, var = torch.where(fresh, 0, mean), torch.where(fresh, 0, var)
    return [(n, mean[s], var[s]) for s, n in enumerate(state.count.tolist())]


def _statistics(x: Tensor, n: int, mean: Tensor, var: Tensor) -> tuple[int, Tensor, Tensor, Tensor]:
    """x (n, G, D/G) -> count after x, mean and var (n + 1, G) before each position and after the last, gm (n, G)."""
    gm = x.mean(-1)
    gv = (x - gm[..., None]).square().mean(-1)
    means, variances = [mean], [var]
    for gm_t, gv_t in zip(gm, gv, strict=True):
        n += 1
        c2 = 1 / n
        c1 = 1 - c2
        d = gm_t - mean
        mean, var = mean + c2 * d, c1 * var + c2 * gv_t + c1 * c2 * d * d
        means.append(mean)
        variances.append(var)
    return n, torch.stack(means), torch.stack(variances), gm
