"""CEMA in both directions of time, for encoders.

The coefficients have 2 D rows: the first D (1) are for the positions up to t, the others (2) for those after t:

    y_t = Re sum_n ( gamma1_n sum_{s <= t} p1_n q1_n^(t - s) x_s + gamma2_n sum_{s > t} p2_n q2_n^(s - t - 1) x_s ) + omega x_t

The second sum is a CEMA of the reversed sequence, shifted by one: its first term is the next position, as in the
original code of the encoders of arXiv 2404.08801, section 4.5. dtypes as in cema.py; each direction is rounded to the
dtype of x.
"""

import torch
from torch import Tensor

from megalodon_ops.ops.cema.cema_reference import cema, cema_bwd
from megalodon_ops.ops.common.reference_helpers import sequences
from megalodon_ops.ops.common.spans import as_spans


def bidirectional_cema(
    x: Tensor,  # (B, L, D)
    p: Tensor,  # (2 D, N)
    q: Tensor,  # (2 D, N) complex
    gamma: Tensor,  # (2 D, N) complex
    omega: Tensor,  # (D,)
    *,
    cu_seqlens: Tensor | None = None,  # (S + 1,)
    lengths: Tensor | None = None,  # (B,)
    starts: Tensor | None = None,  # (B,)
    spans: Tensor | None = None,  # (S, 2)
) -> Tensor:
    """Add the CEMA of the positions up to each position and the CEMA of the positions after it.

    >>> x, p = torch.tensor([0.0, 1.0, 0.0, 0.0]).view(1, 4, 1), torch.ones(2, 1)
    >>> q, gamma = torch.tensor([[0.5 + 0j], [0.25 + 0j]]), torch.ones(2, 1, dtype=torch.complex64)
    >>> bidirectional_cema(x, p, q, gamma, torch.zeros(1)).flatten().tolist()
    [1.0, 1.0, 0.5, 0.25]
    """
    spans = as_spans("bidirectional_cema", x, cu_seqlens, lengths, starts, spans)
    D = x.shape[-1]
    y = cema(x, p[:D], q[:D], gamma[:D], omega, spans=spans)
    for row, tokens in sequences(x, spans):
        z = cema(x[row, tokens].flip(0)[None], p[D:], q[D:], gamma[D:], torch.zeros_like(omega))[0].flip(0)
        y[row, tokens] += torch.cat([z[1:], torch.zeros_like(z[:1])])
    return y


def bidirectional_cema_bwd(
    dy: Tensor,  # (B, L, D)
    x: Tensor,
    p: Tensor,
    q: Tensor,
    gamma: Tensor,
    omega: Tensor,
    *,
    spans: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Add cema_bwd of both directions. Returns dx, dp, dq, dgamma, domega.

    The forward adds the output z_t of the reversed CEMA to y_{t-1}, so dz_t = dy_{t-1}.
    """
    D = x.shape[-1]
    first = p[:D], q[:D], gamma[:D], omega
    dx, *dfirst, domega, _ = cema_bwd(dy, None, x, *first, spans=spans)
    after = p[D:], q[D:], gamma[D:], torch.zeros_like(omega)
    dafter = [torch.zeros_like(a) for a in after[:3]]
    for row, tokens in sequences(x, spans):
        dy_s, x_s = dy[row, tokens], x[row, tokens]
        dz = torch.cat([torch.zeros_like(dy_s[:1]), dy_s[:-1]])
        dx_s, *parts, _, _ = cema_bwd(dz.flip(0)[None], None, x_s.flip(0)[None], *after)
        dx[row, tokens] += dx_s[0].flip(0)
        dafter = [total + part for total, part in zip(dafter, parts, strict=True)]
    return dx, *(torch.cat(parts) for parts in zip(dfirst, dafter, strict=True)), domega
