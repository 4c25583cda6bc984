"""Rows of 8-bit integers with one scale each, for weights and for keys and values of a state."""

import torch
from torch import Tensor

SCALE_BYTES = 4


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return integers from -127 to 127, as int8, and the float32 scale of each row of x (..., E).

    The scale is the row's largest absolute value / 127, or NaN if the row has a number that is not finite.
    """
    x = x.float()
    largest = x.abs().amax(-1) if x.shape[-1] else x.sum(-1)
    scale = (largest / 127).clamp(min=torch.finfo().tiny).where(largest.isfinite(), torch.nan)
    return (x / scale[..., None]).round().nan_to_num(0).to(torch.int8), scale


def pack_rows(x: Tensor) -> Tensor:
    """Round rows (..., E) to int8 (..., E + 4): the integers, then the four bytes of the scale."""
    integers, scale = round_rows(x)
    return torch.cat([integers, scale[..., None].view(torch.int8)], -1)


def scales_of_rows(rows: Tensor) -> Tensor:
    """Return the scales (..., 1) of packed rows."""
    return rows[..., -SCALE_BYTES:].clone(memory_format=torch.contiguous_format).view(torch.float32)


def unpack_rows(rows: Tensor) -> Tensor:
    """Return the float32 values (..., E) of packed rows (..., E + 4)."""
    return rows[..., :-SCALE_BYTES] * scales_of_rows(rows)
