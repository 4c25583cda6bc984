"""`cema_coefficients`: the coefficients for :func:`megalodon_ops.cema`, from the trained parameters."""

import math

import torch
from torch import Tensor

from ..common.definition import call, define_op, empty_like, has_cpu_kernel
from ..common.checks import check_device, check_tensor


def cema_coefficients(alpha: Tensor, delta: Tensor, theta: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Input weights, decays and output weights of a complex EMA.

    .. math:: p = \sigma(\alpha), \qquad q_n = (1 - p_n \sigma(\delta_n)) e^{2 \pi i \sigma(\theta) n / N}, \qquad
              \gamma_n = (\gamma_{n,0} + i \gamma_{n,1}) / \sqrt{N}, \qquad n = 1, ..., N

    On the CPU, forward and backward are one kernel each. On other devices torch computes the coefficients.

    Args:
        alpha, delta: (D, N, 1) float32 or float64.
        theta: (D, 1, 1), dtype of `alpha`.
        gamma: (D, N, 2), dtype of `alpha`, real and imaginary parts.

    Returns:
        p (D, N), dtype of `alpha`; q and gamma (D, N) complex64, or complex128 for a float64 `alpha`.

    Raises:
        ValueError: a shape is wrong. TypeError: a dtype is wrong. NotImplementedError: second derivatives are not
        supported on the CPU.

    alpha, delta and theta are kept for the backward.

    Source: arXiv 2404.08801, section 3.1, and the released code, whose parameters have these shapes. The mathematics:
    :func:`megalodon_ops.reference.cema_coefficients`.

    Example:
        >>> import torch, megalodon_ops as mo
        >>> zeros, angle = torch.zeros(1, 2, 1), torch.zeros(1, 1, 1)
        >>> p, q, gamma = mo.cema_coefficients(zeros, zeros, angle, torch.ones(1, 2, 2))
        >>> p, q.abs(), q.angle()
        (tensor([[0.5000, 0.5000]]), tensor([[0.7500, 0.7500]]), tensor([[ 1.5708, -3.1416]]))
    """
    for name, value in ("alpha", alpha), ("delta", delta), ("theta", theta), ("gamma", gamma):
        check_tensor("cema_coefficients", name, value)
    if alpha.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"cema_coefficients: `alpha` must be float32 or float64, got {alpha.dtype}; convert it.")
    if has_cpu_kernel(alpha):
        return call(cema_coefficients_fwd, alpha, delta, theta, gamma)
    for name, value in ("delta", delta), ("theta", theta), ("gamma", gamma):
        check_device("cema_coefficients", name, value, alpha)
    N = alpha.shape[1]
    p = torch.sigmoid(alpha[..., 0])
    modes = torch.arange(1, N + 1, dtype=alpha.dtype, device=alpha.device)
    phase = modes * (torch.sigmoid(theta[..., 0]) * (2 * math.pi / N))
    q = torch.polar(1 - p * torch.sigmoid(delta[..., 0]), phase)
    return p, q, torch.complex(gamma[..., 0], gamma[..., 1]) / math.sqrt(N)


def _fwd_fake(alpha, delta, theta, gamma):
    shape, dtype = alpha.shape[:2], alpha.dtype.to_complex()
    return alpha.new_empty(shape), alpha.new_empty(shape, dtype=dtype), alpha.new_empty(shape, dtype=dtype)


def _bwd_fake(dp, dq, dscaled, alpha, delta, theta):
    return *map(empty_like, (alpha, delta, theta)), alpha.new_empty((*alpha.shape[:2], 2))


cema_coefficients_bwd = define_op(
    "cema_coefficients_bwd(Tensor dp, Tensor dq, Tensor dscaled, Tensor alpha, Tensor delta, Tensor theta) "
    "-> (Tensor dalpha, Tensor ddelta, Tensor dtheta, Tensor dgamma)",
    fake=_bwd_fake,
    # sigmoids, radius, angle, a and b, dalpha, ddelta, dtheta, dgamma
    flops=lambda alpha: alpha.numel() * (6 + 2 + 1 + 8 + 5 + 4 + 3 + 2),
)
cema_coefficients_fwd = define_op(
    "cema_coefficients_fwd(Tensor alpha, Tensor delta, Tensor theta, Tensor gamma) -> (Tensor p, Tensor q, Tensor scaled)",
    fake=_fwd_fake,
    backward=cema_coefficients_bwd,
    flops=lambda alpha: alpha.numel() * (6 + 2 + 1 + 4 + 2),  # sigmoids, radius, angle, q, scaled
)
