"""Timestep norm: group norm with cumulative statistics along time (arXiv 2404.08801, section 3.2).

The D channels form G groups of F = D/G neighbours. Position t is normalized by the mean and the biased variance of its
group over all positions up to and including t. Let n be the number of positions before t, and gm and gv the mean and
the biased variance of x_t inside a group. Then

    n' = n + 1     c2 = 1 / n'     c1 = 1 - c2
    mean' = mean + c2 (gm - mean)
    var'  = c1 var + c2 gv + c1 c2 (gm - mean)^2
    y_t   = (x_t - mean') rstd (1 + weight) + bias          rstd = 1 / sqrt(var' + eps)

This is Welford's update. Unlike E[x^2] - mean^2, it does not cancel when |mean| >> std. A fresh state has n = 0 and so
c1 = 0: its mean and var are not used. Two parts with statistics (n_a, mean_a, var_a) and (n_b, mean_b, var_b) merge
associatively by the same formula, with n' = n_a + n_b and c2 = n_b / n'. So parts of a sequence can be scanned in
parallel.

A variance that overflows the state's dtype, beyond 3e38 for float32, gives NaN.

dtypes: x and y float32, float64, bfloat16 or float16; weight, bias and the state float32, or float64 for float64 x.
Inside a call, statistics are float64. A state stores mean and var as value + residual, which have about twice the digits
of the dtype: a mean in one float32 would stop changing once c2 (gm - mean) is below half a unit in its last place.
"""

import torch
from torch import Tensor

from megalodon_ops.ops.common.reference_helpers import sequences
from megalodon_ops.ops.common.spans import as_spans
from megalodon_ops.ops.common.states import TimestepNormState, accumulation_dtype


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
    starts: Tensor | None = None,  # (B,)
    spans: Tensor | None = None,  # (S, 2)
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
    slices = sequences(x, as_spans("timestep_norm", x, cu_seqlens, lengths, starts, spans))
    initial_states = _initial(state, len(slices), num_groups, x.device)
    y = torch.zeros_like(x)
    counts, means, variances = [], [], []  # after each sequence
    for (row, tokens), (n, mean, var) in zip(slices, initial_states, strict=True):
        x_s = x[row, tokens].double().unflatten(-1, (num_groups, -1))  # (l, G, F)
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
    spans: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Walk back through time with the gradients of mean and var. Returns dx, dweight, dbias, dmean, dvar.

    Let w = 1 + weight and r = rstd_t. Let U and V be the gradients of mean_t and var_t from position t + 1 or, at the
    end, from the returned state. y_t also depends on mean_t and var_t. With sums over the channels of a group,

        y = (x - mean') r w + bias          ->   du = U - r sum dy w
        r = (var' + eps)^(-1/2)             ->   dv = V - r^3 / 2  sum dy w (x - mean')         as dr/dvar' = -r^3 / 2

    where du and dv are the total gradients of mean' and var'. The update propagates them: with
    k = 2 c1 c2 (gm - mean) dv,

        mean' = c1 mean + c2 gm             ->   dgm = c2 du + k       U <- c1 du - k
        var'  = c1 var + c2 gv              ->   dgv = c2 dv           V <- c1 dv
                + c1 c2 (gm - mean)^2

    Since gm = sum x / F and gv = sum (x - gm)^2 / F, where gv has no gradient through gm because sum (x - gm) = 0,

        dx = dy r w + [ dgm + 2 dgv (x - gm) ] / F
        dweight = sum_t dy (x - mean') r    dbias = sum_t dy

    The kernels use u = U / n and v = V / n, which need no c1 and no c2. Since mean' - mean = c2 (gm - mean),

        v' = v - r^3 / (2 n') sum dy w (x - mean')      p = u - r / n' sum dy w      u <- p - 2 v' (mean' - mean)
        dx = dy r w + [ p + 2 v' (x - mean') ] / F                                   v <- v'

    U and V before the first position are the gradients of the given state, zeros for a fresh state, where c1 = 0. The
    count and the residual have no gradient.
    """
    real = accumulation_dtype(x.dtype)
    w = (1 + weight.double()).unflatten(0, (num_groups, -1))  # (G, F)
    dx, dw, db = torch.zeros_like(x), torch.zeros_like(w), torch.zeros_like(w)
    slices = sequences(x, spans)
    zero = torch.zeros(len(slices), num_groups, dtype=torch.float64, device=x.device)
    U = zero.clone() if dmean is None else dmean.double()
    V = zero.clone() if dvar is None else dvar.double()
    dmeans, dvars = torch.zeros_like(U), torch.zeros_like(V)
    for s, (n, mean, var) in enumerate(_initial(state, len(slices), num_groups, x.device)):
        row, tokens = slices[s]
        x_s = x[row, tokens].double().unflatten(-1, (num_groups, -1))  # (l, G, F)
        dy_s = dy[row, tokens].double().unflatten(-1, (num_groups, -1))
        _, mean, var, gm = _statistics(x_s, n, mean, var)
        r = _rstd(var, eps, real)
        centred = x_s - mean[1:, :, None]
        dw += (dy_s * centred * r[1:, :, None]).sum(0)
        db += dy_s.sum(0)
        dx_s = dy_s * r[1:, :, None] * w
        U_t, V_t = U[s], V[s]
        for t in reversed(range(len(x_s))):
            c2 = 1 / (n + t + 1)
            c1 = 1 - c2
            du = U_t - r[t + 1] * (dy_s[t] * w).sum(-1)
            dv = V_t - r[t + 1] ** 3 / 2 * (dy_s[t] * w * centred[t]).sum(-1)
            k = 2 * c1 * c2 * (gm[t] - mean[t]) * dv
            dx_s[t] += ((c2 * du + k)[:, None] + 2 * c2 * dv[:, None] * (x_s[t] - gm[t, :, None])) / x_s.shape[-1]
            U_t, V_t = c1 * du - k, c1 * dv
        dx[row, tokens] = dx_s.flatten(-2).to(x.dtype)
        if n:  # a fresh state's mean and variance are not used, so they have no gradient, also for an empty sequence
            dmeans[s], dvars[s] = U_t, V_t
    return dx, dw.flatten().to(real), db.flatten().to(real), dmeans.to(real), dvars.to(real)


def timestep_norm_end_state(
    x: Tensor,  # (B, L, D)
    *,
    num_groups: int,
    cu_seqlens: Tensor | None = None,  # (S + 1,)
    lengths: Tensor | None = None,  # (B,)
    starts: Tensor | None = None,  # (B,)
    spans: Tensor | None = None,  # (S, 2)
) -> TimestepNormState:
    """Return the statistics after the last position of each sequence without an initial state.

    >>> state = timestep_norm_end_state(torch.tensor([[[1.0, 3.0], [2.0, 2.0]]]), num_groups=1)
    >>> state.count.item(), state.mean.item(), state.var.item()
    (2, 2.0, 0.5)
    """
    zeros = torch.zeros(x.shape[-1], dtype=accumulation_dtype(x.dtype), device=x.device)
    spans = as_spans("timestep_norm_end_state", x, cu_seqlens, lengths, starts, spans)
    return timestep_norm(x, zeros, zeros, num_groups=num_groups, return_state=True, spans=spans)[1]


def timestep_norm_end_state_bwd(
    dmean: Tensor | None,  # (S, G)
    dvar: Tensor | None,  # (S, G)
    x: Tensor,
    *,
    num_groups: int,
    spans: Tensor | None = None,
) -> Tensor:
    """Return dx. Over the l positions of a sequence and the F channels of a group,

        mean = sum x / (l F)               ->   dx = dmean / (l F)
        var  = sum (x - mean)^2 / (l F)    ->   dx = ... + 2 dvar (x - mean) / (l F)

    var has no gradient through the mean, because the sum of x - mean is 0.
    """
    dx = torch.zeros_like(x)
    for s, (row, tokens) in enumerate(sequences(x, spans)):
        x_s = x[row, tokens].double().unflatten(-1, (num_groups, -1))  # (l, G, F)
        centred = x_s - x_s.mean((0, 2), keepdim=True)
        total = len(x_s) * x_s.shape[-1]
        dmean_s, dvar_s = (0.0 if d is None else d[s].double()[:, None] / max(total, 1) for d in (dmean, dvar))
        dx[row, tokens] = (dmean_s + 2 * dvar_s * centred).flatten(-2).to(x.dtype)
    return dx


def _rstd(var: Tensor, eps: float, real: torch.dtype) -> Tensor:
    """Return 1 / sqrt(var + eps), or NaN if the variance overflows this dtype."""
    return (var + eps).rsqrt() + 0 * (var + eps).to(real)


def _initial(
    state: TimestepNormState | None, num_sequences: int, num_groups: int, device: torch.device
) -> list[tuple[int, Tensor, Tensor]]:
    """Return n, mean (G,) and var (G,) of each of `num_sequences` initial states, in float64; zeros if n is 0."""
    if state is None:
        zero = torch.zeros(num_groups, dtype=torch.float64, device=device)
        return [(0, zero, zero)] * num_sequences
    mean, var = state.mean.double(), state.var.double()
    if state.residual is not None:
        mean_residual, var_residual = state.residual.detach().double().unbind(1)
        mean, var = mean + mean_residual, var + var_residual
    fresh = (state.count == 0)[:, None]
    mean, var = torch.where(fresh, 0, mean), torch.where(fresh, 0, var)
    return [(n, mean[s], var[s]) for s, n in enumerate(state.count.tolist())]


def _statistics(x: Tensor, n: int, mean: Tensor, var: Tensor) -> tuple[int, Tensor, Tensor, Tensor]:
    """Return n after x (l, G, F), mean and var (l + 1, G) before each position and after the last, and gm (l, G)."""
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
