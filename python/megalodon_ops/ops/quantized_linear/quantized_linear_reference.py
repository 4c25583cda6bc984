"""`quantized_linear` in plain torch.

A weight of 8 bits is w_oi = s_o q_oi, with q in [-127, 127]. A weight of 4 bits is w_oi = s_og q_oi, with q in [-8, 7]
and a scale for each group g of 32 inputs. A row has blocks of 128 inputs, each of 32 words of 16 bits: bits 4 j to
4 j + 3 of word i are input 32 j + i, in two's complement.

With activations of 8 bits, x_ti is a_t p_ti with p = round(x_ti / a_t), ties to even, and a_t = max_i |x_ti| / 127. Then
weights of 4 bits are rounded to 8, and the sums of p q are exact.
"""

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


def int4_to_int8(weight: Tensor, scale: Tensor, inputs: int) -> tuple[Tensor, Tensor]:
    """Round a weight of 4 bits to 8: (O, `inputs`) int8 and scales (O,) float32.

    The scale of a row is s_o = 8 max_g abs(s_og) / 127. The integers are floor((q_oi m_og + 128) / 256), with
    m_og = round(256 s_og / s_o), so that 16 bits hold each step.
    """
    scale = scale.float()
    row_scale = _scale(scale, 127 / 8)
    factors = (256 * (scale / row_scale)).round().nan_to_num(0).repeat_interleave(32, 1)
    integers = dequantize(weight, torch.ones_like(scale), factors.shape[1])
    rounded = ((integers * factors + 128) / 256).floor()
    return rounded[:, :inputs].to(torch.int8), row_scale[:, 0]


def round_activations(x: Tensor) -> Tensor:
    """Round x (T, I) to 8 bits with a scale for each row; return it in float64. A row that is not finite becomes NaN."""
    scale = _scale(x.float(), 127)
    return (x.float() / scale).round().double() * scale.double()


def _scale(rows: Tensor, divisor: float) -> Tensor:
    if rows.shape[1] == 0:
        return rows.new_ones(len(rows), 1)
    scale = rows.abs().amax(1, keepdim=True) / divisor
    return scale.clamp(min=torch.finfo(torch.float32).tiny).where(scale.isfinite(), torch.nan)


def quantized_linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, *, activations: str | None = None
) -> Tensor:
    r"""Compute :func:`megalodon_ops.quantized_linear` with sums in float64.

    .. math:: y_{to} = \sum_i x_{ti} \, s_{og} q_{oi} + b_o

    With `activations="int8"`, x and weights of 4 bits are rounded to 8 bits for any number of rows.

    Example:
        >>> import torch, megalodon_ops as mo
        >>> weight, scale = torch.tensor([[1, 2]], dtype=torch.int8), torch.tensor([0.5])
        >>> mo.reference.quantized_linear(torch.tensor([[3.0, 1.0]]), weight, scale)
        tensor([[2.5000]])
    """
    factor = round_activations(x) if activations == "int8" else x.double()
    if activations == "int8" and weight.dtype == torch.uint8:
        weight, scale = int4_to_int8(weight, scale, x.shape[-1])
    y = factor @ dequantize(weight, scale, x.shape[-1]).t()
    return (y if bias is None else y + bias.double()).to(x.dtype)
