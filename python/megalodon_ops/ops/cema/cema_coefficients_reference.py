"""CEMA's coefficients from its parameters (arXiv 2404.08801, section 3.1). With s(x) = 1 / (1 + exp(-x)), for n = 1 ... N:

    p_n = s(alpha_n)                              the input's weight, in (0, 1)
    r_n = 1 - p_n s(delta_n)                      the decay, in (0, 1)
    t_n = s(theta) n / N                          the rotation per position, in turns
    q_n = r_n exp(2 pi i t_n)
    gamma_n = (gamma_n0 + i gamma_n1) / sqrt(N)   the output's weight

dtypes: all real tensors float32 and complex ones complex64, or float64 and complex128.
"""

import math

import torch
from torch import Tensor


def cema_coefficients(
    alpha: Tensor,  # (D, N, 1)
    delta: Tensor,  # (D, N, 1)
    theta: Tensor,  # (D, 1, 1)
    gamma: Tensor,  # (D, N, 2)
) -> tuple[Tensor, Tensor, Tensor]:
    """Return p (D, N), q (D, N) complex and gamma (D, N) complex.

    >>> zeros = torch.zeros(1, 1, 1, dtype=torch.float64)
    >>> p, q, gamma = cema_coefficients(zeros, zeros, zeros, torch.ones(1, 1, 2, dtype=torch.float64))
    >>> p.item(), round(q.real.item(), 15), gamma.item()
    (0.5, -0.75, (1+1j))
    """
    p, radius, phase = _polar(alpha, delta, theta)
    return p, torch.polar(radius, phase), torch.complex(gamma[..., 0], gamma[..., 1]) / math.sqrt(alpha.shape[1])


def cema_coefficients_bwd(
    dp: Tensor,  # (D, N)
    dq: Tensor,  # (D, N) complex
    dscaled: Tensor,  # (D, N) complex, gradient of the last result
    alpha: Tensor,
    delta: Tensor,
    theta: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dalpha, ddelta, dtheta, dgamma. Let a + i b = dq exp(-2 pi i t): a is the part of dq along q, b across q.

        q = r exp(2 pi i t)      ->   dr = a               dt = 2 pi r b
        r = 1 - p s(delta)       ->   dp += -a s(delta)    ddelta = -a p s(delta) (1 - s(delta))
        p = s(alpha)             ->   dalpha = dp p (1 - p)
        t_n = s(theta) n / N     ->   dtheta = s(theta) (1 - s(theta)) sum_n 2 pi r_n b_n n / N
        scaled gamma             ->   dgamma = dscaled / sqrt(N), its real and imaginary parts

    Factors such as p (1 - p) are the derivative of the sigmoid, ds/dx = s (1 - s).
    """
    num_modes = alpha.shape[1]
    p, radius, phase = _polar(alpha, delta, theta)
    rotated_dq = dq * torch.polar(torch.ones_like(phase), -phase)
    a, b = rotated_dq.real, rotated_dq.imag
    s_delta, s_theta = torch.sigmoid(delta[..., 0]), torch.sigmoid(theta[..., 0])
    dalpha = (dp - a * s_delta) * p * (1 - p)
    ddelta = -a * p * s_delta * (1 - s_delta)
    dtheta = (s_theta * (1 - s_theta)) * (2 * math.pi / num_modes) * (b * radius * _modes(alpha)).sum(1, keepdim=True)
    return dalpha[..., None], ddelta[..., None], dtheta[..., None], torch.view_as_real(dscaled) / math.sqrt(num_modes)


def _polar(alpha: Tensor, delta: Tensor, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return p, the decay r and the phase in radians, each (D, N)."""
    p = torch.sigmoid(alpha[..., 0])
    phase = _modes(alpha) * (torch.sigmoid(theta[..., 0]) * (2 * math.pi / alpha.shape[1]))
    return p, 1 - p * torch.sigmoid(delta[..., 0]), phase


def _modes(alpha: Tensor) -> Tensor:
    return torch.arange(1, alpha.shape[1] + 1, dtype=alpha.dtype, device=alpha.device)
