"""`quantized_linear` in plain torch.

A weight of 8 bits is w_oi = s_o q_oi, with q in [-127, 127]. A weight of 4 bits is w_oi = s_og q_oi, with q in [-8, 7]
and a scale for each group g of 32 inputs. A row has blocks of 128 inputs, each of 32 words of 16 bits: bits 4 j to
4 j + 3 of word i are input 32 j + i, in two's complement.
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


def quantized_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""Compute :func:`megalodon_ops.quantized_linear` with sums in float64.

    .. math:: y_{to} = \sum_i x_{ti} \, s_{og} q_{oi} + b_o

    Example:
        >>> import torch, megalodon_ops as mo
        >>> weight, scale = torch.tensor([[1, 2]], dtype=torch.int8), torch.tensor([0.5])
        >>> mo.reference.quantized_linear(torch.tensor([[3.0, 1.0]]), weight, scale)
        tensor([[2.5000]])
    """
    y = x.double() @ dequantize(weight, scale, x.shape[-1]).t()
    return (y if bias is None else y + bias.double()).to(x.dtype)
