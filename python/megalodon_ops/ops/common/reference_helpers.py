"""Helpers of the references: sequences of a batch, inverse RMS."""

from torch import Tensor

from .spans import pairs_of

MAX_ROWS = 2**20


def sequences(x: Tensor, spans: Tensor | None) -> list[tuple[int, slice]]:
    """Return (batch row, tokens) of each of the S sequences in x (B, L, ...), so that x[row, tokens] is one sequence.

    Without spans, a batch is B sequences of L tokens.
    """
    B, L = x.shape[:2]
    if spans is not None:
        pairs = pairs_of(spans).tolist()
        rows = [min(begin // max(L, 1), max(B - 1, 0)) for begin, _ in pairs]
        return [(row, slice(begin - row * L, end - row * L)) for row, (begin, end) in zip(rows, pairs, strict=True)]
    if B > MAX_ROWS:
        raise ValueError(
            f"megalodon_ops.reference: `B` must be at most {MAX_ROWS}, as Python loops over the rows, got {B}."
        )
    return [(row, slice(0, L)) for row in range(B)]


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """Return 1 / sqrt(mean(x^2) + eps) over the last dimension; squares are float64, as they may overflow float32."""
    return (x.double().square().mean(-1, keepdim=True) + eps).rsqrt().to(x.dtype)
