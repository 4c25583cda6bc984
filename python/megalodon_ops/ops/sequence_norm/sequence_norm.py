"""`sequence_norm`: group norm with the statistics of a whole sequence, for encoders."""

import torch
from torch import Tensor

from ..common.arrays import call_with_arrays
from ..common.checks import check_rank, renamed
from ..common.spans import as_spans
from ..common.states import TimestepNormState
from ..timestep_norm.timestep_norm import timestep_norm, timestep_norm_end_state

_COUNT = 2**62
"""count of a state so large that further positions do not change its statistics, not even in the last bit of float64"""


def sequence_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    num_groups: int,
    eps: float = 1e-5,
    cu_seqlens: Tensor | None = None,
    lengths: Tensor | None = None,
    starts: Tensor | None = None,
    spans: Tensor | None = None,
) -> Tensor:
    r"""Normalize each position by the mean and the variance of its group over all positions of its sequence.

    .. math:: y_t = (x_t - \mu) / \sqrt{\sigma^2 + \epsilon} \cdot (1 + \mathrm{weight}) + \mathrm{bias}

    Args:
        x: (B, L, D) float32, float64, bfloat16 or float16, arbitrary strides (copied once if not contiguous).
        weight, bias: (D,) float32, or float64 for a float64 `x`. The gain is 1 + weight.
        num_groups: G, divides D; group g holds the D / G neighbouring channels from g * D / G on. With G = D each
            channel has its own mean and variance.
        eps: added to the variance.
        cu_seqlens, lengths, starts, spans: sequences as in :func:`cema`. Padding does not enter the statistics.

    Returns:
        y (B, L, D) in x's dtype, zero at tokens in no sequence.

    Raises:
        ValueError: a shape or a value is wrong. TypeError: a dtype is wrong. Second derivatives are not supported.

    The function calls :func:`timestep_norm_end_state` for the statistics, then :func:`timestep_norm` with a state whose
    count is so large that its statistics do not change. Statistics are float64; x and three numbers for each position
    and group are kept for the backward, which is deterministic.

    Arrays of other libraries: see :mod:`megalodon_ops.ops.common.arrays`.

    Source: the "group normalization" of the encoders in arXiv 2404.08801, section 4.5. The mathematics:
    :func:`megalodon_ops.reference.sequence_norm`.

    Example:
        >>> import torch, megalodon_ops as mo
        >>> x = torch.tensor([[[1.0, 3.0], [5.0, 7.0]]])  # mean 4, variance 5
        >>> mo.sequence_norm(x, torch.zeros(2), torch.zeros(2), num_groups=1, eps=0.0)
        tensor([[[-1.3416, -0.4472],
                 [ 0.4472,  1.3416]]])
    """
    if not isinstance(x, Tensor):
        return call_with_arrays(sequence_norm, **locals())
    check_rank("sequence_norm", "x", x, "(B, L, D)", 3)
    spans = as_spans("sequence_norm", x, cu_seqlens, lengths, starts, spans)
    try:
        state = timestep_norm_end_state(x, num_groups=num_groups, spans=spans)
        count = torch.full_like(state.count, _COUNT)
        state = TimestepNormState(count, state.mean, state.var, state.residual)
        return timestep_norm(x, weight, bias, num_groups=num_groups, eps=eps, state=state, spans=spans)
    except (TypeError, ValueError) as error:
        raise renamed(error, "sequence_norm") from error
