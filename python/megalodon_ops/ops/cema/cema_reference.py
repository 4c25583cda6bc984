"""CEMA, the complex exponential moving average (arXiv 2404.08801, section 3.1).

Each channel of x drives N complex states, each a damped rotation; y is the real part of their weighted sum:

    h_t = q h_{t-1} + p x_t                      h (D, N) complex, p (D, N) real, q (D, N) complex
    y_t = Re( sum_n gamma_n h_t[n] ) + omega x_t   gamma (D, N) complex, omega (D)

Unrolled from h_0, this is a convolution with a kernel that decays as |q|^j:

    y_t = sum_{j=0}^{t-1} Re( sum_n gamma_n p_n q_n^j ) x_{t-j} + Re( sum_n gamma_n q_n^t h_0[n] ) + omega x_t

c positions map h to q^c h plus the end state that they give from h = 0. So parts of a sequence can be scanned in
parallel.

dtypes: x and y float32, float64, bfloat16 or float16; p, q, gamma, omega, the state and all sums float32 (complex64),
or float64 (complex128) for float64 x.
"""

import torch
from torch import Tensor

from megalodon_ops.ops.common.reference_helpers import sequences
from megalodon_ops.ops.common.states import accumulation_dtype
from megalodon_ops.ops.common.spans import as_spans


def cema(
    x: Tensor,  # (B, L, D)
    p: Tensor,  # (D, N)
    q: Tensor,  # (D, N) complex
    gamma: Tensor,  # (D, N) complex
    omega: Tensor,  # (D,)
    *,
    state: Tensor | None = None,  # (S, D, N) complex
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,  # (S + 1,)
    lengths: Tensor | None = None,  # (B,)
    starts: Tensor | None = None,  # (B,)
    spans: Tensor | None = None,  # (S, 2)
) -> Tensor | tuple[Tensor, Tensor]:
    """Run the recurrence position by position: h_t = q h_{t-1} + p x_t, y_t = Re(sum_n gamma_n h_t[n]) + omega x_t.

    Returns y (B, L, D) and, with `return_state`, the last h of each sequence (S, D, N). The state includes p, not
    gamma.

    >>> x, one = torch.tensor([[[1.0], [0.0], [0.0]]]), torch.ones(1, 1)
    >>> cema(x, one, 0.5 * one + 0j, one + 0j, torch.zeros(1)).flatten().tolist()
    [1.0, 0.5, 0.25]
    """
    spans = as_spans("cema", x, cu_seqlens, lengths, starts, spans)
    xs, p, q, gamma, omega, state = _widen(x, p, q, gamma, omega, state)
    y, last = torch.zeros_like(x), []
    for s, (row, tokens) in enumerate(sequences(x, spans)):
        x_s = xs[row, tokens]  # (n, D)
        h = _scan(x_s, p, q, None if state is None else state[s])  # (n + 1, D, N)
        y[row, tokens] = ((gamma * h[1:]).real.sum(-1) + omega * x_s).to(x.dtype)
        last.append(h[-1])
    return (y, _stack(last, q)) if return_state else y


def cema_bwd(
    dy: Tensor,  # (B, L, D)
    dstate: Tensor | None,  # (S, D, N) complex, gradient of the last h
    x: Tensor,
    p: Tensor,
    q: Tensor,
    gamma: Tensor,
    omega: Tensor,
    state: Tensor | None = None,
    spans: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Scan backwards in time: the adjoint of `cema`. Returns dx, dp, dq, dgamma, domega, dstate.

    The gradient of a real loss with respect to a complex z is dz = dloss/dRe z + i dloss/dIm z (torch's
    convention), so a small change of z changes the loss by Re(conj(dz) delta z). A product w = a z then gives

        dz = conj(a) dw,    da = conj(z) dw,    with the real part taken where z or a is real.

    Let g_t be the total gradient of h_t. h_t enters y_t with weight gamma and h_{t+1} with weight q; the last one, h_L,
    has no successor but is returned, with gradient `dstate`:

        g_L = conj(gamma) dy_L + dstate
        g_t = conj(gamma) dy_t + conj(q) g_{t+1}        t = L-1 .. 1

    Each line of the forward then gives, by the product rule above:

        h_t = q h_{t-1} + p x_t      ->   dx_t = sum_n p_n Re g_t[n] + ...     dp = sum_t x_t Re g_t
                                          dq = sum_t conj(h_{t-1}) g_t         dh_0 = conj(q) g_1
        y_t = Re(sum gamma h_t)      ->   dgamma = sum_t dy_t conj(h_t)
              + omega x_t            ->   dx_t = ... + omega dy_t              domega = sum_t dy_t x_t

    dp, dq, dgamma and domega are sums over all sequences. An empty sequence returns `dstate` unchanged.
    """
    xs, p, q, gamma, omega, state = _widen(x, p, q, gamma, omega, state)
    dys = dy.to(xs.dtype)
    dx = torch.zeros_like(x)
    dp, dq, dgamma, domega = (torch.zeros_like(a) for a in (p, q, gamma, omega))
    dstates = []
    for s, (row, tokens) in enumerate(sequences(x, spans)):
        x_s, dy_s = xs[row, tokens], dys[row, tokens]  # (n, D)
        h = _scan(x_s, p, q, None if state is None else state[s])  # (n + 1, D, N)
        carry = torch.zeros_like(q) if dstate is None else dstate[s].to(q.dtype)  # (D, N)
        g = torch.empty_like(h[1:])
        for t in reversed(range(len(x_s))):
            g[t] = gamma.conj() * dy_s[t, :, None] + carry
            carry = q.conj() * g[t]
        dx[row, tokens] = ((p * g.real).sum(-1) + omega * dy_s).to(x.dtype)
        dp += (g.real * x_s[..., None]).sum(0)
        dq += (g * h[:-1].conj()).sum(0)
        dgamma += (dy_s[..., None] * h[1:].conj()).sum(0)
        domega += (dy_s * x_s).sum(0)
        dstates.append(carry)
    return dx, dp, dq, dgamma, domega, _stack(dstates, q)


def cema_end_state(
    x: Tensor,  # (B, L, D)
    p: Tensor,  # (D, N)
    q: Tensor,  # (D, N) complex
    *,
    cu_seqlens: Tensor | None = None,  # (S + 1,)
    lengths: Tensor | None = None,  # (B,)
    starts: Tensor | None = None,  # (B,)
    spans: Tensor | None = None,  # (S, 2)
) -> Tensor:
    """Return the last h of each sequence (S, D, N) from h_0 = 0: h_L = sum_t q^(L-t) p x_t.

    >>> cema_end_state(torch.tensor([[[4.0], [2.0], [1.0]]]), torch.ones(1, 1), torch.tensor([[0.5j]])).item()
    1j
    """
    spans = as_spans("cema_end_state", x, cu_seqlens, lengths, starts, spans)
    xs, p, q, *_ = _widen(x, p, q, q, p, None)
    return _stack([_scan(xs[row, tokens], p, q, None)[-1] for row, tokens in sequences(x, spans)], q)


def cema_end_state_bwd(
    dstate: Tensor,  # (S, D, N) complex
    x: Tensor,
    p: Tensor,
    q: Tensor,
    spans: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Apply the adjoint of `cema` to `dstate` alone, with dy = 0. Returns dx, dp, dq.

    g_L = dstate,    g_t = conj(q) g_{t+1}                          t = L-1 .. 1
    dx_t = sum_n p_n Re g_t[n],    dp = sum_t x_t Re g_t,    dq = sum_t conj(h_{t-1}) g_t
    """
    no_gamma, no_omega = torch.zeros_like(q), torch.zeros_like(p[:, 0])
    return cema_bwd(torch.zeros_like(x), dstate, x, p, q, no_gamma, no_omega, None, spans)[:3]


def _scan(x: Tensor, p: Tensor, q: Tensor, h: Tensor | None) -> Tensor:
    """Return h_0 .. h_n (n + 1, D, N) for x (n, D)."""
    h = torch.zeros_like(q) if h is None else h
    states = [h]
    for x_t in x:
        h = q * h + p * x_t[:, None]
        states.append(h)
    return torch.stack(states)


def _stack(states: list[Tensor], like: Tensor) -> Tensor:
    """Stack S tensors (D, N) to (S, D, N), also for S = 0."""
    return torch.stack(states) if states else like.new_zeros(0, *like.shape)


def _widen(
    x: Tensor, p: Tensor, q: Tensor, gamma: Tensor, omega: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    real = accumulation_dtype(x.dtype)
    complex_ = torch.complex128 if real == torch.float64 else torch.complex64
    state = None if state is None else state.to(complex_)
    return x.to(real), p.to(real), q.to(complex_), gamma.to(complex_), omega.to(real), state
