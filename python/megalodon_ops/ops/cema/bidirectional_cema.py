"""`bidirectional_cema`: CEMA in both directions of time, for encoders."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.arrays import call_with_arrays
from .cema import cema
from ..common.checks import check_rank, check_tensor, renamed
from ..common.spans import as_spans, num_sequences, pairs_of, token_sequences


def bidirectional_cema(
    x: Tensor,
    p: Tensor,
    q: Tensor,
    gamma: Tensor,
    omega: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    lengths: Tensor | None = None,
    starts: Tensor | None = None,
    spans: Tensor | None = None,
) -> Tensor:
    r"""Complex exponential moving averages of `x` in both directions of time.

    .. math::

        y_t = \mathrm{Re} \sum_n \Bigl( \gamma^1_n \sum_{s \le t} p^1_n (q^1_n)^{t - s} x_s
              + \gamma^2_n \sum_{s > t} p^2_n (q^2_n)^{s - t - 1} x_s \Bigr) + \omega x_t

    Args:
        x: (B, L, D) float32, float64, bfloat16 or float16, arbitrary strides (copied once if not contiguous).
        p: (2 D, N) float32, or float64 for a float64 `x`. The first D rows are for the positions up to t, the
            others for those after t.
        q, gamma: (2 D, N) complex64, or complex128 for a float64 `x`.
        omega: (D,) as `p`.
        cu_seqlens, lengths, starts, spans: sequences as in :func:`cema`.

    Returns:
        y (B, L, D) in x's dtype, zero at tokens in no sequence.

    Raises:
        ValueError: a shape or a value is wrong. TypeError: a dtype is wrong. Second derivatives are not supported.

    The function calls :func:`cema` twice, the second time with each sequence reversed. Each direction is rounded to x's
    dtype. x and the reversed x are kept for the backward, which is deterministic.

    Arrays of other libraries: see :mod:`megalodon_ops.ops.common.arrays`.

    Source: the encoders of arXiv 2404.08801, section 4.5, and their original code, whose backward direction starts at
    the next position. The mathematics: :func:`megalodon_ops.reference.bidirectional_cema`.

    Example:
        >>> import torch, megalodon_ops as mo
        >>> x, p = torch.tensor([0.0, 1.0, 0.0, 0.0]).view(1, 4, 1), torch.ones(2, 1)
        >>> q, gamma = torch.tensor([[0.5 + 0j], [0.25 + 0j]]), torch.ones(2, 1, dtype=torch.complex64)
        >>> mo.bidirectional_cema(x, p, q, gamma, torch.zeros(1)).flatten()
        tensor([1.0000, 1.0000, 0.5000, 0.2500])
    """
    if not isinstance(x, Tensor):
        return call_with_arrays(bidirectional_cema, **locals())
    check_rank("bidirectional_cema", "x", x, "(B, L, D)", 3)
    check_tensor("bidirectional_cema", "omega", omega)
    D = x.shape[-1]
    for name, tensor in (("p", p), ("q", q), ("gamma", gamma)):
        check_rank("bidirectional_cema", name, tensor, "(2 D, N)", 2)
        if len(tensor) != 2 * D:
            raise ValueError(
                f"bidirectional_cema: `{name}` must have 2 D = {2 * D} rows, as `x` has {D} channels, got {len(tensor)}."
            )
    spans = as_spans("bidirectional_cema", x, cu_seqlens, lengths, starts, spans)
    try:
        y = cema(x, p[:D], q[:D], gamma[:D], omega, spans=spans)
        order = mirrored_tokens(x, spans)
        z = cema(_reorder(x, order), p[D:], q[D:], gamma[D:], torch.zeros_like(omega), spans=spans)
    except (TypeError, ValueError) as error:
        raise renamed(error, "bidirectional_cema") from error
    after = _reorder(z, order)[:, 1:]  # z includes the position itself
    if spans is not None and spans.dim() != 3:  # a row may hold several sequences
        order = order.view(x.shape[:2])
        after = after.masked_fill((order[:, 1:] != order[:, :-1] - 1)[..., None], 0)  # where a sequence ends
    return y + torch.cat((after, torch.zeros_like(z[:, :1])), 1)  # torch 2.5's pad refuses tensors without elements


def _reorder(x: Tensor, order: Tensor) -> Tensor:
    return x.flatten(0, 1).index_select(0, order).view(x.shape)


def mirrored_tokens(x: Tensor, spans: Tensor | None) -> Tensor:
    """Return the index of each token in the reversed sequences, (B L,) int64; tokens in no sequence keep their index.

    Example:
        >>> import torch
        >>> from megalodon_ops.ops.cema.bidirectional_cema import mirrored_tokens
        >>> mirrored_tokens(torch.zeros(2, 3, 1), torch.tensor([[0, 2], [3, 6]]))
        tensor([1, 0, 2, 5, 4, 3])
    """
    B, L = x.shape[:2]
    token = torch.arange(B * L, device=x.device)
    if spans is None:
        return token + L - 1 - 2 * (token % max(L, 1))
    sequence = token_sequences(x, spans).flatten()
    first_plus_last = F.pad(pairs_of(spans).sum(-1) - 1, (0, 1))[sequence]  # of the token's sequence
    return torch.where(sequence < num_sequences(B, spans), first_plus_last - token, token).clamp(0, max(B * L - 1, 0))
