"""`timestep_norm`: group norm whose statistics accumulate along time.

`timestep_norm_end_state`: only the statistics after the last position.
"""

import torch
from torch import Tensor

from ..common.arrays import call_with_arrays
from ..common.definition import call, define_op, empty_like, int64_or_none
from ..common.flops import num_tokens
from ..common.spans import as_spans, num_sequences
from ..common.states import TimestepNormState, accumulation_dtype, state_fields
from ..common.checks import check_flag, check_number, check_rank, check_size, check_width


def timestep_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    num_groups: int,
    eps: float = 1e-5,
    state: TimestepNormState | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    lengths: Tensor | None = None,
    starts: Tensor | None = None,
    spans: Tensor | None = None,
) -> Tensor | tuple[Tensor, TimestepNormState]:
    r"""Normalize each position by the mean and the variance of its group over all positions up to and including it.

    .. math:: y_t = (x_t - \mu_t) / \sqrt{\sigma^2_t + \epsilon} \cdot (1 + \mathrm{weight}) + \mathrm{bias}

    Args:
        x: (B, L, D) float32, float64, bfloat16 or float16, arbitrary strides (copied once if not contiguous).
        weight, bias: (D,) float32, or float64 for a float64 `x`. The gain is 1 + weight.
        num_groups: G, divides D; group g holds the D / G neighbouring channels from g * D / G on.
        eps: added to the variance.
        state: statistics of the S sequences before their first position; None: a count of zero.
        return_state: also return the statistics after each sequence's last position.
        cu_seqlens, lengths, starts, spans: sequences as in :func:`cema`.

    Returns:
        y (B, L, D) in x's dtype, zero at tokens in no sequence; with `return_state` also the
        :class:`TimestepNormState`: count (S,), mean and var (S, G), and their rounding residuals.

    Raises:
        ValueError: a shape or a value is wrong. TypeError: a dtype is wrong. Second derivatives are not supported.

    Statistics are float64 inside a call. x, weight, bias and the state's mean and var have gradients. x and three
    numbers for each position and group are kept for the backward, which is deterministic.

    Arrays of other libraries: see :mod:`megalodon_ops.ops.common.arrays`.

    Source: arXiv 2404.08801, section 3.2. The mathematics: :func:`megalodon_ops.reference.timestep_norm`.

    Example:
        >>> import torch, megalodon_ops as mo
        >>> x = torch.tensor([[[1.0, 3.0], [5.0, 7.0]]])  # means so far 2 and 4, variances 1 and 5
        >>> mo.timestep_norm(x, torch.zeros(2), torch.zeros(2), num_groups=1, eps=0.0)
        tensor([[[-1.0000,  1.0000],
                 [ 0.4472,  1.3416]]])
    """
    if not isinstance(x, Tensor):
        return call_with_arrays(timestep_norm, **locals())
    check_rank("timestep_norm", "x", x, "(B, L, D)", 3)
    check_width("timestep_norm", x, weight=weight, bias=bias)
    count, mean, var, residual = state_fields("timestep_norm", state, TimestepNormState)
    num_groups = check_size("timestep_norm", "num_groups", num_groups)
    eps = check_number("timestep_norm", "eps", eps, "a finite number of at least 0", 0.0)
    check_flag("timestep_norm", "return_state", return_state)
    initial_state = (int64_or_none(count), mean, var, residual)
    spans = as_spans("timestep_norm", x, cu_seqlens, lengths, starts, spans)
    flags = (torch.is_grad_enabled(), return_state)
    y, _, *state_out = call(timestep_norm_fwd, x, weight, bias, num_groups, eps, *initial_state, spans, *flags)
    return (y, TimestepNormState(*state_out)) if return_state else y


def timestep_norm_end_state(
    x: Tensor,
    *,
    num_groups: int,
    cu_seqlens: Tensor | None = None,
    lengths: Tensor | None = None,
    starts: Tensor | None = None,
    spans: Tensor | None = None,
) -> TimestepNormState:
    r"""The statistics of :func:`timestep_norm` after each sequence without an initial state; y is not computed.

    .. math:: \mu = \frac{1}{L F} \sum x, \qquad \sigma^2 = \frac{1}{L F} \sum (x - \mu)^2

    over the L positions and the F = D / G channels of a group. The states of neighbouring parts of a sequence can be
    merged, so the parts may be processed separately, also on several devices.

    Args:
        x: (B, L, D) float32, float64, bfloat16 or float16, arbitrary strides (copied once if not contiguous).
        num_groups: G, divides D; group g holds the D / G neighbouring channels from g * D / G on.
        cu_seqlens, lengths, starts, spans: sequences as in :func:`cema`.

    Returns:
        The :class:`TimestepNormState` that ``timestep_norm(..., return_state=True)`` returns: count (S,), mean and var
        (S, G), and their rounding residuals; zeros for an empty sequence.

    Raises:
        ValueError: a shape or a value is wrong. TypeError: a dtype is wrong. Second derivatives are not supported.

    x has a gradient, through mean and var; counts and residuals are constants. x and the state are kept for the
    backward, which is deterministic.

    Arrays of other libraries: see :mod:`megalodon_ops.ops.common.arrays`.

    Source: arXiv 2404.08801, section 3.2. The mathematics: :func:`megalodon_ops.reference.timestep_norm_end_state`.

    Example:
        >>> import torch, megalodon_ops as mo
        >>> x = torch.tensor([[[1.0, 3.0], [5.0, 7.0]]])
        >>> state = mo.timestep_norm_end_state(x, num_groups=1)
        >>> state.count, state.mean, state.var
        (tensor([2]), tensor([[4.]]), tensor([[5.]]))
    """
    if not isinstance(x, Tensor):
        return call_with_arrays(timestep_norm_end_state, **locals())
    check_rank("timestep_norm_end_state", "x", x, "(B, L, D)", 3)
    num_groups = check_size("timestep_norm_end_state", "num_groups", num_groups)
    spans = as_spans("timestep_norm_end_state", x, cu_seqlens, lengths, starts, spans)
    mean, var, residual, count = call(timestep_norm_end_state_fwd, x, num_groups, spans)
    return TimestepNormState(count, mean, var, residual)


def _new_state(x, num_groups, spans, wanted=True):
    """Return mean, var, residual and count after each sequence; without elements unless wanted.

    The count is the last result, because torch's opcheck adds up all results in the dtype of the first.
    """
    S, real = num_sequences(x.shape[0], spans), accumulation_dtype(x.dtype)
    mean = x.new_empty((S, num_groups) if wanted else (0,), dtype=real)
    residual = x.new_empty((S, 2, num_groups) if wanted else (0,), dtype=real)
    count = x.new_empty((S,) if wanted else (0,), dtype=torch.int64)
    return mean, torch.empty_like(mean), residual, count


def _fwd_fake(x, weight, bias, num_groups, eps, count, mean, var, residual, spans, return_stats, return_state):
    shape = (3, *x.shape[:2], num_groups) if return_stats else (0,)
    mean_out, var_out, residual_out, count_out = _new_state(x, num_groups, spans, return_state)
    stats = x.new_empty(shape, dtype=mean_out.dtype)
    return empty_like(x), stats, count_out, mean_out, var_out, residual_out


timestep_norm_bwd = define_op(
    "timestep_norm_bwd(Tensor dy, Tensor? dmean_out, Tensor? dvar_out, Tensor x, Tensor weight, Tensor bias, "
    "int num_groups, float eps, Tensor? count, Tensor? mean, Tensor? var, Tensor? residual, "
    "Tensor? spans, Tensor stats) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dmean, Tensor dvar)",
    flops=lambda x, spans: num_tokens(x, spans) * x.shape[2] * (5 + 4 + 3 + 1),  # sums, dx, dweight, dbias
)
timestep_norm_fwd = define_op(
    "timestep_norm_fwd(Tensor x, Tensor weight, Tensor bias, int num_groups, float eps, Tensor? count, Tensor? mean, "
    "Tensor? var, Tensor? residual, Tensor? spans, bool return_stats, bool return_state) "
    "-> (Tensor y, Tensor stats, Tensor count_out, Tensor mean_out, Tensor var_out, Tensor residual_out)",
    fake=_fwd_fake,
    backward=timestep_norm_bwd,
    flops=lambda x, spans: num_tokens(x, spans) * x.shape[2] * (4 + 4),  # statistics, y
)


timestep_norm_end_state_bwd = define_op(
    "timestep_norm_end_state_bwd(Tensor? dmean_out, Tensor? dvar_out, Tensor x, Tensor mean_out, Tensor residual_out, "
    "int num_groups, Tensor? spans) -> Tensor dx",
    flops=lambda x, spans: 3 * num_tokens(x, spans) * x.shape[2],
)
timestep_norm_end_state_fwd = define_op(
    "timestep_norm_end_state_fwd(Tensor x, int num_groups, Tensor? spans) "
    "-> (Tensor mean_out, Tensor var_out, Tensor residual_out, Tensor count_out)",
    fake=_new_state,
    backward=timestep_norm_end_state_bwd,
    flops=lambda x, spans: 4 * num_tokens(x, spans) * x.shape[2],
)
