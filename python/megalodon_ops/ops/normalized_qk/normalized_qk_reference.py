"""Normalized queries and keys from one shared projection z (arXiv 2404.08801, section 3.3), with rotary positions.

For each token and head of K channels, with j = 0 for the query and j = 1 for the key:

    r  = 1 / sqrt(mean(z^2) + eps)          mean over the head's K channels
    zn = z r
    u_j = zn (1 + gamma_j) / sqrt(K) + beta_j
    q = R(pos) u_0      k = R(pos) u_1

R(pos) rotates each pair of neighbours (2i, 2i + 1) by the angle pos * rope_base^(-2i/K):

    (a, b) -> (a cos - b sin, a sin + b cos)

pos is the index inside the chunk: (position + t) mod C for token t of a sequence that starts at `position`. As q and k
include the factor 1/sqrt(K), attention uses a scale of 1.

dtypes: z, q and k float32, float64, bfloat16 or float16; gamma, beta, the angles and all sums float32, or float64 for
float64 z.
"""

import math

import torch
from torch import Tensor

from megalodon_ops.ops.common.reference_helpers import inverse_rms, sequences
from megalodon_ops.ops.common.states import accumulation_dtype
from megalodon_ops.ops.common.spans import as_spans


def normalized_qk(
    z: Tensor,  # (B, L, H * K)
    gamma: Tensor,  # (2, H * K)
    beta: Tensor,  # (2, H * K)
    *,
    num_heads: int,
    chunk_size: int,
    rope_base: float = 10000.0,
    eps: float = 1e-5,
    position: Tensor | None = None,  # (S,) index inside the chunk of each sequence's first token
    cu_seqlens: Tensor | None = None,  # (S + 1,)
    lengths: Tensor | None = None,  # (B,)
    starts: Tensor | None = None,  # (B,)
    spans: Tensor | None = None,  # (S, 2)
) -> tuple[Tensor, Tensor]:
    """Normalize z per head, scale and shift it into queries and keys, and rotate both. Returns q, k (B, L, H, K).

    >>> z, zeros = torch.tensor([[[3.0, 3.0]]]), torch.zeros(2, 2)
    >>> q, k = normalized_qk(z, zeros, zeros, num_heads=1, chunk_size=4, eps=0.0)
    >>> torch.allclose(q, torch.full((1, 1, 1, 2), 0.5**0.5)), torch.equal(q, k)
    (True, True)
    """
    spans = as_spans("normalized_qk", z, cu_seqlens, lengths, starts, spans)
    real = accumulation_dtype(z.dtype)
    gamma, beta = (a.to(real).unflatten(-1, (num_heads, -1)) for a in (gamma, beta))  # (2, H, K)
    q = torch.zeros_like(z).unflatten(-1, (num_heads, -1))
    k = torch.zeros_like(q)
    for s, (row, tokens) in enumerate(sequences(z, spans)):
        z_s = z[row, tokens].to(real).unflatten(-1, (num_heads, -1))  # (n, H, K)
        zn = z_s * inverse_rms(z_s, eps)
        u = zn * ((1 + gamma) / math.sqrt(zn.shape[-1]))[:, None] + beta[:, None]  # (2, n, H, K)
        angles = _angles(zn, position, s, chunk_size, rope_base)
        q[row, tokens], k[row, tokens] = _rotate(u, angles).to(z.dtype)
    return q, k


def normalized_qk_bwd(
    dq: Tensor,  # (B, L, H, K)
    dk: Tensor,  # (B, L, H, K)
    z: Tensor,
    gamma: Tensor,
    beta: Tensor,
    *,
    num_heads: int,
    chunk_size: int,
    rope_base: float = 10000.0,
    eps: float = 1e-5,
    position: Tensor | None = None,
    spans: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotate the gradients back, then differentiate the affine maps and the RMS norm. Returns dz, dgamma, dbeta.

    A rotation is orthogonal, so its gradient is rotated by the opposite angle; the rest is elementwise except one mean:

        q = R u_0                               ->   du_0 = R^T dq          du_1 = R^T dk
        u_j = zn (1 + gamma_j) / sqrt(K)        ->   dzn = sum_j du_j (1 + gamma_j) / sqrt(K)
              + beta_j                               dgamma_j = sum_t du_j zn / sqrt(K)      dbeta_j = sum_t du_j
        zn = z r                                ->   dz = r dzn + ...           dr = sum dzn z
        r = (mean(z^2) + eps)^(-1/2)            ->   dz = ... - dr r^3 z / K    as dr/dz = -r^3 z / K

    The sums run over the head's K channels, and z = zn / r combines the last two lines: dz = r (dzn - zn mean(dzn zn)).
    """
    real = accumulation_dtype(z.dtype)
    dz = torch.zeros_like(z)
    gain = 1 + gamma.to(real).unflatten(-1, (num_heads, -1))  # (2, H, K)
    dgamma, dbeta = torch.zeros_like(gain), torch.zeros_like(gain)
    for s, (row, tokens) in enumerate(sequences(z, spans)):
        z_s = z[row, tokens].to(real).unflatten(-1, (num_heads, -1))  # (n, H, K)
        r = inverse_rms(z_s, eps)
        zn = z_s * r
        root = math.sqrt(zn.shape[-1])
        angles = _angles(zn, position, s, chunk_size, rope_base)
        du = _rotate(torch.stack([dq[row, tokens], dk[row, tokens]]).to(real), -angles)  # (2, n, H, K)
        dzn = (du * gain[:, None] / root).sum(0)
        dgamma += (du * zn / root).sum(1)
        dbeta += du.sum(1)
        dz[row, tokens] = (r * (dzn - zn * (dzn * zn).mean(-1, keepdim=True))).flatten(-2).to(z.dtype)
    return dz, dgamma.flatten(1), dbeta.flatten(1)


def _angles(zn: Tensor, position: Tensor | None, s: int, chunk_size: int, rope_base: float) -> Tensor:
    """Return pos * rope_base^(-2i/K), (n, 1, K/2), in float64: far into a chunk, float32 angles are off by 1e-4."""
    n, _, K = zn.shape
    start = 0 if position is None else int(position[s])
    pos = (start + torch.arange(n, dtype=torch.float64, device=zn.device)) % chunk_size
    return torch.outer(pos, rope_base ** (-torch.arange(0, K, 2, dtype=torch.float64, device=zn.device) / K))[:, None]


def _rotate(u: Tensor, angles: Tensor) -> Tensor:
    """Rotate the pairs (2i, 2i + 1) of u (..., n, H, K) by angles (n, 1, K/2)."""
    cos, sin = angles.cos().to(u.dtype), angles.sin().to(u.dtype)
    a, b = u[..., 0::2], u[..., 1::2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
