"""Layer norm (arXiv 1607.06450) and RMS norm (arXiv 1910.07467) of rows of D channels.

    m  = mean(x)                            RMS norm: 0
    r  = 1 / sqrt(mean((x - m)^2) + eps)
    xn = (x - m) r
    y  = xn (1 + weight) + bias             RMS norm: no bias

Means are over a row. Weights are stored as offsets: zeros give a gain of 1.

dtypes: x and y float32, float64, bfloat16 or float16; the rest float32, or float64 for float64 x.
"""

from torch import Tensor

from megalodon_ops.ops.common.reference_helpers import inverse_rms
from megalodon_ops.ops.common.states import accumulation_dtype


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    """Normalize the rows of x (..., D) to mean 0 and variance 1, then scale by 1 + weight (D,) and add bias (D,).

    >>> import torch
    >>> layer_norm(torch.tensor([1.0, 5.0]), eps=0.0)
    tensor([-1.,  1.])
    """
    xn, _ = _normalized(x, eps, is_rms_norm=False)
    return _affine(xn, weight, bias).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    """Scale the rows of x (..., D) to a mean square of 1, then by 1 + weight (D,).

    >>> import torch
    >>> rms_norm(torch.tensor([1.0, 7.0]), eps=0.0)
    tensor([0.2000, 1.4000])
    """
    xn, _ = _normalized(x, eps, is_rms_norm=True)
    return _affine(xn, weight, None).to(x.dtype)


def layer_norm_bwd(
    dy: Tensor, x: Tensor, weight: Tensor | None = None, *, eps: float = 1e-5, is_rms_norm: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx, dweight, dbias, with e the gradient of xn:

        y = xn (1 + weight) + bias     ->   e = dy (1 + weight)      dweight = sum_rows dy xn      dbias = sum_rows dy
        xn = (x - m) r                 ->   dx = e r + ...           dm = -r sum e                 dr = sum e (x - m)
        r = (mean((x - m)^2) + eps)^(-1/2)   ->   dx = ... - dr r^3 (x - m) / D    no dm, as sum (x - m) = 0
        m = mean(x)                    ->   dx = ... + dm / D

    As x - m = xn / r, this gives dx = r (e - mean(e) - xn mean(e xn)). RMS norm has no m, so mean(e) is missing there.
    """
    xn, r = _normalized(x, eps, is_rms_norm)
    e = dy.to(xn.dtype) if weight is None else dy.to(xn.dtype) * (1 + weight)
    mean = 0 if is_rms_norm else e.mean(-1, keepdim=True)
    dx = r * (e - mean - xn * (e * xn).mean(-1, keepdim=True))
    rows = dy.to(xn.dtype).flatten(0, -2) if dy.dim() > 1 else dy.to(xn.dtype)[None]
    return dx.to(x.dtype), (rows * xn.view_as(rows)).sum(0), rows.sum(0)


def _normalized(x: Tensor, eps: float, is_rms_norm: bool) -> tuple[Tensor, Tensor]:
    """Return xn and r."""
    wide = x.to(accumulation_dtype(x.dtype))
    centred = wide if is_rms_norm else wide - wide.mean(-1, keepdim=True)
    r = inverse_rms(centred, eps)
    return centred * r, r


def _affine(xn: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    y = xn if weight is None else xn * (1 + weight)
    return y if bias is None else y + bias
