"""`cema`: the complex exponential moving average, a recurrence in time with N complex states per channel.

`cema_end_state`: the final state of the recurrence, without its output.
"""

from torch import Tensor

from ..common.arrays import call_with_arrays
from ..common.checks import check_flag, check_rank, check_width
from ..common.definition import call, define_op, empty_like
from ..common.flops import num_tokens
from ..common.spans import as_spans, num_sequences


def cema(
    x: Tensor,
    p: Tensor,
    q: Tensor,
    gamma: Tensor,
    omega: Tensor,
    *,
    state: Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    lengths: Tensor | None = None,
    starts: Tensor | None = None,
    spans: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Complex exponential moving average of `x` along time.

    .. math:: h_t = q\, h_{t-1} + p\, x_t, \qquad y_t = \mathrm{Re} \sum_n \gamma_n h_{t,n} + \omega x_t

    Args:
        x: (B, L, D) float32, float64, bfloat16 or float16, arbitrary strides (copied once if not contiguous).
        p: (D, N) float32, or float64 for a float64 `x`.
        q, gamma: (D, N) complex64, or complex128 for a float64 `x`; \|q\| <= 1 for a stable recurrence.
        omega: (D,) as `p`.
        state: (S, D, N) complex, h before the first position; None: zeros. S is B, or the number of sequences.
        return_state: also return h after each sequence's last position.
        cu_seqlens: (S + 1,) int64 or int32 offsets of sequences packed into one row (B = 1).
        lengths: (B,) int64 or int32, number of positions in each right-padded row.
        starts: (B,) int64 or int32, first position of each left-padded row; with `lengths`, rows have padding on both
            sides.
        spans: (S, 2) int64 or int32, first and last-plus-one position of each sequence in the flattened batch (B * L),
            in order, disjoint, each within one row. Also (B, 1, 2), one in each row, from the row's first position; or
            (S + 1,), offsets as `cu_seqlens`, in one or several rows.

    Returns:
        y (B, L, D) in x's dtype, zero at tokens in no sequence; with `return_state` also the state (S, D, N). States
        and sums are float32 (float64 for float64).

    Raises:
        ValueError: a shape or a value is wrong. TypeError: a dtype is wrong. Second derivatives are not supported.

    Every tensor has a gradient, `state` included; complex gradients follow torch's convention. Only the inputs are kept
    for the backward, which is deterministic for every number of threads.

    Arrays of other libraries: see :mod:`megalodon_ops.ops.common.arrays`.

    Source: arXiv 2404.08801, section 3.1. The mathematics: :func:`megalodon_ops.reference.cema`.

    Example:
        >>> import torch, megalodon_ops as mo
        >>> x, p = torch.ones(1, 3, 1), torch.ones(1, 1)
        >>> q, gamma, omega = torch.tensor([[0.5 + 0j]]), torch.tensor([[1 + 0j]]), torch.zeros(1)
        >>> mo.cema(x, p, q, gamma, omega).flatten()
        tensor([1.0000, 1.5000, 1.7500])
    """
    if not isinstance(x, Tensor):
        return call_with_arrays(cema, **locals())
    check_rank("cema", "x", x, "(B, L, D)", 3)
    check_width("cema", x, p=p, q=q)
    check_flag("cema", "return_state", return_state)
    spans = as_spans("cema", x, cu_seqlens, lengths, starts, spans)
    y, state_out = call(cema_fwd, x, p, q, gamma, omega, state, spans, return_state)
    return (y, state_out) if return_state else y


def cema_end_state(
    x: Tensor,
    p: Tensor,
    q: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    lengths: Tensor | None = None,
    starts: Tensor | None = None,
    spans: Tensor | None = None,
) -> Tensor:
    r"""The state of :func:`cema` after each sequence that starts from zeros; y is not computed.

    .. math:: h_L = \sum_{t=1}^{L} q^{L-t}\, p\, x_t

    c positions map a state h to :math:`q^c h` plus their own end state. So parts of a sequence can be scanned
    separately, also on several devices, and their states merged.

    Args:
        x: (B, L, D) float32, float64, bfloat16 or float16, arbitrary strides (copied once if not contiguous).
        p: (D, N) float32, or float64 for a float64 `x`.
        q: (D, N) complex64, or complex128 for a float64 `x`.
        cu_seqlens, lengths, starts, spans: sequences as in :func:`cema`.

    Returns:
        (S, D, N) complex as `q`, the state of ``cema(..., return_state=True)``; zero for an empty sequence.

    Raises:
        ValueError: a shape or a value is wrong. TypeError: a dtype is wrong. Second derivatives are not supported.

    x, p and q have gradients, in torch's convention. Only the inputs are kept for the backward, which is deterministic
    for every number of threads.

    Arrays of other libraries: see :mod:`megalodon_ops.ops.common.arrays`.

    Source: arXiv 2404.08801, section 3.1. The mathematics: :func:`megalodon_ops.reference.cema_end_state`.

    Example:
        >>> import torch, megalodon_ops as mo
        >>> x, p, q = torch.ones(1, 3, 1), torch.ones(1, 1), torch.tensor([[0.5 + 0j]])
        >>> mo.cema_end_state(x, p, q)
        tensor([[[1.7500+0.j]]])
    """
    if not isinstance(x, Tensor):
        return call_with_arrays(cema_end_state, **locals())
    check_rank("cema_end_state", "x", x, "(B, L, D)", 3)
    check_width("cema_end_state", x, p=p, q=q)
    return call(cema_end_state_fwd, x, p, q, as_spans("cema_end_state", x, cu_seqlens, lengths, starts, spans))


def _fwd_fake(x, p, q, gamma, omega, state, spans, return_state):
    """Return y and the state; without `return_state` it has no elements, as torch's schemas have no optional results."""
    shape = (num_sequences(x.shape[0], spans), *q.shape) if return_state else (0,)
    return empty_like(x), q.new_empty(shape)


cema_bwd = define_op(
    "cema_bwd(Tensor dy, Tensor? dstate_out, Tensor x, Tensor p, Tensor q, Tensor gamma, Tensor omega, Tensor? state, "
    "Tensor? spans) -> (Tensor dx, Tensor dp, Tensor dq, Tensor dgamma, Tensor domega, Tensor dstate)",
    # of a mode: h 8, g 10, dx 2, dp 2, dq 8, dgamma 4
    flops=lambda x, p, spans: num_tokens(x, spans) * len(p) * (34 * p.shape[1] + 4),
)
cema_fwd = define_op(
    "cema_fwd(Tensor x, Tensor p, Tensor q, Tensor gamma, Tensor omega, Tensor? state, "
    "Tensor? spans, bool return_state) -> (Tensor y, Tensor state_out)",
    fake=_fwd_fake,
    backward=cema_bwd,
    flops=lambda x, p, spans: num_tokens(x, spans) * len(p) * (12 * p.shape[1] + 2),
)


cema_end_state_bwd = define_op(
    "cema_end_state_bwd(Tensor dstate_out, Tensor x, Tensor p, Tensor q, Tensor? spans) "
    "-> (Tensor dx, Tensor dp, Tensor dq)",
    flops=lambda x, p, spans: num_tokens(x, spans) * p.numel() * (8 + 6 + 2 + 2 + 8),  # h, g, dx, dp, dq
)
cema_end_state_fwd = define_op(
    "cema_end_state_fwd(Tensor x, Tensor p, Tensor q, Tensor? spans) -> Tensor state_out",
    fake=lambda x, p, q, spans: q.new_empty((num_sequences(x.shape[0], spans), *q.shape)),
    backward=cema_end_state_bwd,
    flops=lambda x, p, spans: num_tokens(x, spans) * p.numel() * 8,
)
