"""`quantized_linear` in plain torch.

A weight of 8 bits is w_oi = s_o q_oi, with q in [-127, 127]. A weight of 4 bits is w_oi = s_og q_oi, with q in [-8, 7]
and a scale for each group g of 32 inputs. A row has blocks of 128 inputs, each of 32 words of 16 bits: bits 4 j to
4 j + 3 of word i are input 32 j + i, in two's complement.

With activations of 8 bits, x_ti is a_tg p_ti with p = round(x_ti / a_tg), ties to even, and a_tg = max |x_ti| / 127 over
the inputs i of group g, or over the whole row for a weight of 8 bits. Its sum over a group of p q is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor


def dequantize(weight: Tensor, scale: Tensor, inputs: int) -> Tensor:
    """Return w (O, `inputs`), exact, in float64."""
    if weight.dtype == torch.int8:
        return weight.double() * scale.double()[:, None]
    bytes_of_words = weight.long().unflatten(1, (-1, 32, 2))
    words = bytes_of_words[..., 0] + 256 * bytes_of_words[..., 1]
    integers = torch.stack([words // 16**j % 16 for j in range(4)], dim=2)  # (O, Q, 4, 32)
    integers = torch.where(integers < 8, integers, integers - 16)
    return (integers * scale.double().unflatten(1, (-1, 4))[..., None]).flatten(1)[:, :inputs]


def round_activations(x: Tensor, group: int) -> Tensor:
    """Round x (T, I) to 8 bits with a scale for each row and `group` inputs; return it in float64.

    A group with a number that is not finite becomes NaN.
    """
    groups = torch.nn.functional.pad(x.float(), (0, -x.shape[-1] % group)).unflatten(-1, (-1, group))
    scale = groups.abs().amax(-1, keepdim=True) / 127
    scale = scale.clamp(min=torch.finfo(torch.float32).tiny).where(scale.isfinite(), torch.nan)
    return ((groups / scale).round().double() * scale.double()).flatten(-2)[..., : x.shape[-1]]


def quantized_linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, *, activations: str | None = None
) -> Tensor:
    r"""Compute :func:`megalodon_ops.quantized_linear` with sums in float64.

    .. math:: y_{to} = \sum_i x_{ti} \, s_{og} q_{oi} + b_o

    With `activations="int8"`, x is rounded for any number of rows.

    Example:
        >>> import torch, megalodon_ops as mo
        >>> weight, scale = torch.tensor([[1, 2]], dtype=torch.int8), torch.tensor([0.5])
        >>> mo.reference.quantized_linear(torch.tensor([[3.0, 1.0]]), weight, scale)
        tensor([[2.5000]])
    """
    if activations == "int8":
        factor = round_activations(x, max(1, x.shape[-1]) if weight.dtype == torch.int8 else 32)
    else:
        factor = x.double()
    y = factor @ dequantize(weight, scale, x.shape[-1]).t()
    return (y if bias is None else y + bias.double()).to(x.dtype)
