"""Sequence norm: group norm over all positions of a sequence, for encoders.

The D channels form G groups of F = D/G neighbours. For each group, over the n positions of a sequence without padding:

    mean = sum x / (n F)     var = sum (x - mean)^2 / (n F)     y_t = (x_t - mean) rstd (1 + weight) + bias

with rstd = 1 / sqrt(var + eps). arXiv 2404.08801, section 4.5, calls it group normalization and does not
state the number of groups.

dtypes: x and y float32, float64, bfloat16 or float16; weight and bias float32, or float64 for float64 x. Statistics are
float64.
"""

import torch
from torch import Tensor

from megalodon_ops.ops.common.reference_helpers import sequences
from megalodon_ops.ops.common.states import accumulation_dtype
from megalodon_ops.ops.common.spans import as_spans


def sequence_norm(
    x: Tensor,  # (B, L, D)
    weight: Tensor,  # (D,)
    bias: Tensor,  # (D,)
    *,
    num_groups: int,
    eps: float = 1e-5,
    cu_seqlens: Tensor | None = None,  # (S + 1,)
    lengths: Tensor | None = None,  # (B,)
    starts: Tensor | None = None,  # (B,)
    spans: Tensor | None = None,  # (S, 2)
) -> Tensor:
    """Normalize by the statistics of all positions: y_t = (x_t - mean) / sqrt(var + eps) (1 + weight) + bias.

    >>> x = torch.tensor([[[1.0, 3.0], [2.0, 2.0]]])
    >>> sequence_norm(x, torch.zeros(2), torch.zeros(2), num_groups=2, eps=0.0).tolist()
    [[[-1.0, 1.0], [1.0, -1.0]]]
    """
    spans = as_spans("sequence_norm", x, cu_seqlens, lengths, starts, spans)
    real = accumulation_dtype(x.dtype)
    y = torch.zeros_like(x)
    for row, tokens in sequences(x, spans):
        normalized, _ = _normalized(x[row, tokens], num_groups, eps)
        y[row, tokens] = (normalized.flatten(1).to(real) * (1 + weight.to(real)) + bias.to(real)).to(x.dtype)
    return y


def sequence_norm_bwd(
    dy: Tensor,  # (B, L, D)
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    num_groups: int,
    eps: float = 1e-5,
    spans: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate through the statistics. Returns dx, dweight, dbias.

    Let xn_t = (x_t - mean) rstd and g = dy (1 + weight), with means over the positions and channels of a group. As
    d mean / dx = 1 / (n F) and d rstd / dx = -rstd^2 xn_t / (n F),

        dx = rstd (g - mean(g) - xn_t mean(g xn_t))      dweight = sum_t dy xn_t      dbias = sum_t dy
    """
    dx, dweight, dbias = torch.zeros_like(x), torch.zeros_like(weight), torch.zeros_like(bias)
    for row, tokens in sequences(x, spans):
        normalized, rstd = _normalized(x[row, tokens], num_groups, eps)
        dy_s = dy[row, tokens].double()
        g = (dy_s * (1 + weight.double())).unflatten(-1, (num_groups, -1))
        mean_g, projection = (a.mean((0, 2), keepdim=True) for a in (g, g * normalized))
        dx[row, tokens] = (rstd * (g - mean_g - normalized * projection)).flatten(1).to(x.dtype)
        dweight += (dy_s * normalized.flatten(1)).sum(0).to(weight.dtype)
        dbias += dy_s.sum(0).to(bias.dtype)
    return dx, dweight, dbias


def _normalized(x: Tensor, num_groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Return (x - mean) rstd, (n, G, F), and rstd, (1, G, 1), of one sequence (n, D), in float64."""
    x = x.double().unflatten(-1, (num_groups, -1))
    centred = x - x.mean((0, 2), keepdim=True)
    rstd = (centred.square().mean((0, 2), keepdim=True) + eps).rsqrt()
    return centred * rstd, rstd
