"""Helpers of the references: sequences of dense, right-padded and packed batches, dtypes of sums, inverse RMS."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_ROWS = 2**20


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float64 for float64, float32 for other dtypes."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def sequences(x: Tensor, cu_seqlens: Tensor | None, lengths: Tensor | None) -> list[tuple[int, slice]]:
    """Return (batch row, tokens) of each of the S sequences in x (B, L, ...), so that x[row, tokens] is one sequence.

    A dense batch is B sequences of L tokens; `lengths` (B,) ends each row early; `cu_seqlens` (S+1,) splits one row.
    """
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        return [(0, slice(start, end)) for start, end in zip(bounds, bounds[1:], strict=False)]
    if x.shape[0] > MAX_ROWS:
        raise ValueError(
            f"megalodon_ops.reference: `B` must be at most {MAX_ROWS}, as Python loops over the rows, got {x.shape[0]}."
        )
    ends = [x.shape[1]] * x.shape[0] if lengths is None else lengths.tolist()
    return [(row, slice(0, end)) for row, end in enumerate(ends)]


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """Return 1 / sqrt(mean(x^2) + eps) over the last dimension; squares are float64, as they may overflow float32."""
    return (x.double().square().mean(-1, keepdim=True) + eps).rsqrt().to(x.dtype)
