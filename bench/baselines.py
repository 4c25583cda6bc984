"""The ops in plain torch, as fast as we can write them: the baselines of the benches.

Tensor names and letters are those of `megalodon_ops`. Models in plain torch are in plain_models.py.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor


def onednn_linear(x: Tensor, weight: Tensor) -> Tensor:
    """F.linear computed by oneDNN, also where F.linear itself would use another library."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


HAS_ONEDNN_LINEAR = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def cema_loop(x: Tensor, p: Tensor, q: Tensor, gamma: Tensor, omega: Tensor) -> Tensor:
    """The recurrence, position by position, for all rows, channels and states at once."""
    h = q.new_zeros(x.shape[0], *q.shape)  # (B, D, N)
    ys = []
    for x_t in x.unbind(1):
        h = q * h + p * x_t[..., None]
        ys.append((gamma * h).real.sum(-1))
    return torch.stack(ys, 1) + omega * x


def cema_fft(x: Tensor, p: Tensor, q: Tensor, gamma: Tensor, omega: Tensor, block: int = 128) -> Tensor:
    """A convolution with k_j = Re(sum_n gamma p q^j) by FFT over twice the length.

    The kernel comes from two short tables, q^(i + block m) = q^i q^(block m), as a matrix product over n.
    """
    length = x.shape[1]
    fine = _powers(q, torch.arange(block))  # (D, N, block)
    coarse = _powers(q, block * torch.arange(-(-length // block))) * (gamma * p)[..., None]  # (D, N, L / block)
    kernel = _real_product(coarse.mT, fine).flatten(1)[:, :length]  # (D, L)
    n = 2 * length
    wide = x.to(p.dtype).mT  # (B, D, L)
    y = torch.fft.irfft(torch.fft.rfft(wide, n) * torch.fft.rfft(kernel, n), n)[..., :length]
    return (y.mT + omega * wide.mT).to(x.dtype)


def cema_blocks(x: Tensor, p: Tensor, q: Tensor, gamma: Tensor, omega: Tensor, block: int = 64) -> Tensor:
    """Matrix products inside blocks of time, and a loop over the blocks that carries the state.

    y = T x + Re(gamma q^(j+1) h) inside a block, with T the block's Toeplitz matrix and h the state before it.
    """
    B, L, _ = x.shape
    N = q.shape[1]
    blocks = -(-L // block)
    wide = F.pad(x.to(p.dtype), (0, 0, 0, blocks * block - L))
    rows = wide.unflatten(1, (blocks, block)).permute(3, 1, 0, 2).flatten(1, 2)  # (D, blocks B, block)
    power = _powers(q, torch.arange(block + 1))  # (D, N, block + 1)
    kernel = _real_product((gamma * p)[:, None], power[..., :block]).squeeze(1)  # (D, block)
    kernel = torch.cat((kernel[:, :1] + omega[:, None], kernel[:, 1:]), 1)  # omega x_t: lag 0
    t = torch.arange(block)
    toeplitz = F.pad(kernel, (block - 1, 0))[:, t - t[:, None] + block - 1]  # (D, from, to)
    into = _re_im(power[..., :block].flip(-1).mT * p[:, None])  # (D, block, 2 N)
    # What each block adds to the state, (D, blocks, B, N).
    added = torch.view_as_complex((rows @ into).unflatten(-1, (N, 2))).unflatten(1, (blocks, B))
    h = torch.zeros_like(added[:, 0])
    states = []
    for added_m in added.unbind(1):
        states.append(h)
        h = power[:, None, :, block] * h + added_m
    before = _re_im(torch.stack(states, 1).flatten(1, 2))  # (D, blocks B, 2 N)
    out_of = _re_im((gamma[..., None] * power[..., 1:]).conj_physical().mT).mT  # (D, 2 N, block)
    y = torch.baddbmm(rows @ toeplitz, before, out_of)
    return y.unflatten(1, (blocks, B)).permute(2, 1, 3, 0).flatten(1, 2)[:, :L].to(x.dtype)


def bidirectional_cema(x: Tensor, p: Tensor, q: Tensor, gamma: Tensor, omega: Tensor) -> Tensor:
    """cema with the first D coefficients, plus a cema of the later positions (the reversed row, shifted by one)."""
    D = x.shape[-1]
    after = cema_blocks(x.flip(1), p[D:], q[D:], gamma[D:], torch.zeros_like(omega)).flip(1)
    return cema_blocks(x, p[:D], q[:D], gamma[:D], omega) + F.pad(after[:, 1:], (0, 0, 0, 1))


def _powers(q: Tensor, exponents: Tensor) -> Tensor:
    """q^j (D, N, len(exponents))."""
    return torch.exp(torch.log(q)[..., None] * exponents)


def _re_im(z: Tensor) -> Tensor:
    """(..., N) complex -> (..., 2 N), real and imaginary parts in turn."""
    return torch.view_as_real(z.contiguous()).flatten(-2)


def _real_product(a: Tensor, b: Tensor) -> Tensor:
    """Re(a @ b) of complex matrices, in real arithmetic."""
    return a.real @ b.real - a.imag @ b.imag


def timestep_norm(x: Tensor, weight: Tensor, bias: Tensor, *, num_groups: int, eps: float = 1e-5) -> Tensor:
    """Statistics by cumulative sums, in float64, as E[x^2] - mean^2 cancels."""
    groups = x.float().unflatten(-1, (num_groups, -1))  # (B, L, G, D / G)
    var, mean = torch.var_mean(groups, -1, correction=0)  # (B, L, G)
    mean, var = mean.double(), var.double()
    count = torch.arange(1, x.shape[1] + 1)[:, None]
    running = mean.cumsum(1) / count
    rstd = ((var + mean.square()).cumsum(1) / count - running.square() + eps).rsqrt()
    y = (groups - running.float()[..., None]) * rstd.float()[..., None]
    return (y.flatten(-2) * (1 + weight) + bias).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    return F.layer_norm(x.float(), x.shape[-1:], 1 + weight, bias, eps).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    return F.rms_norm(x.float(), x.shape[-1:], 1 + weight, eps).to(x.dtype)


def gated_silu(x: Tensor, value: Tensor | None = None) -> Tensor:
    return F.silu(x) if value is None else F.silu(x) * value


@functools.cache
def rotary(length: int, chunk_size: int, key_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine (L, 1, K / 2) of the angle at each position."""
    position = torch.arange(length, device=device) % chunk_size
    powers = torch.arange(0, key_dim, 2, dtype=torch.float64, device=device) / -key_dim
    angle = position[:, None, None] * 10000.0**powers
    return angle.cos().float(), angle.sin().float()


def normalized_qk(
    z: Tensor, gamma: Tensor, beta: Tensor, *, num_heads: int, rotary: tuple[Tensor, Tensor], eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    heads = z.float().unflatten(-1, (num_heads, -1))  # (B, L, H, K)
    K = heads.shape[-1]
    zn = heads * (heads.square().mean(-1, keepdim=True) + eps).rsqrt()
    gain = ((1 + gamma) * K**-0.5).unflatten(-1, (num_heads, K))  # (2, H, K): of q, of k
    offset = beta.unflatten(-1, (num_heads, K))
    cos, sin = rotary

    def rotated(t: Tensor) -> Tensor:
        even, odd = t.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(z.dtype)

    return rotated(zn * gain[0] + offset[0]), rotated(zn * gain[1] + offset[1])


def attention_masked(q: Tensor, k: Tensor, v: Tensor, *, chunk_size: int) -> Tensor:
    """Matrix product, mask, softmax, matrix product over whole chunks."""
    q, k, v = (_chunks(t, chunk_size) for t in (q, k, v))
    above = torch.ones(chunk_size, chunk_size, dtype=torch.bool).triu(1)
    scores = (q @ k.mT).masked_fill(above, -torch.inf)
    return _unchunks(scores.softmax(-1) @ v)


def attention_row_blocks(q: Tensor, k: Tensor, v: Tensor, *, chunk_size: int, rows: int = 256) -> Tensor:
    """Masked attention, one block of queries at a time, against keys up to the block's end: half the work."""
    q, k, v = (_chunks(t, chunk_size) for t in (q, k, v))
    rows = min(rows, chunk_size)
    above = torch.ones(rows, rows, dtype=torch.bool).triu(1)
    outputs = []
    for start in range(0, chunk_size, rows):
        end = min(start + rows, chunk_size)
        scores = q[:, :, start:end] @ k[:, :, :end].mT
        scores[..., start:].masked_fill_(above[: end - start, : end - start], -torch.inf)
        outputs.append(scores.softmax(-1) @ v[:, :, :end])
    return _unchunks(torch.cat(outputs, 2))


def attention_sdpa(q: Tensor, k: Tensor, v: Tensor, *, chunk_size: int, causal: bool = True) -> Tensor:
    q, k, v = (_chunks(t, chunk_size) for t in (q, k, v))
    return _unchunks(F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=1.0))


def working_memory(q: Tensor, k: Tensor, v: Tensor, *, chunk_size: int) -> Tensor:
    """Loop over chunks, all rows and heads at once; softmaxes and the memory in float32.

    `memory` (B, H, K, V) is a mean of values per key channel, `mass` (B, H, K) the logarithm of its total weight.
    """
    all_queries, all_keys, all_values = (t.transpose(1, 2).split(chunk_size, 2) for t in (q, k, v))  # (B, H, C, ...)
    memory = mass = None
    outputs = []
    for number, (queries, keys, values) in enumerate(zip(all_queries, all_keys, all_values, strict=True)):
        outputs.append(torch.zeros_like(values) if memory is None else queries.float().softmax(-1) @ memory)
        if number == len(all_keys) - 1:
            break  # nothing reads what the last chunk would write
        logits = keys.float()
        written = logits.logsumexp(2)  # (B, H, K)
        values = values.float() if memory is None else values.float() - logits.softmax(-1) @ memory
        news = logits.softmax(2).mT @ values
        total = written if mass is None else torch.logaddexp(mass, written)
        memory = news if memory is None else torch.lerp(memory, news, (written - total).exp()[..., None])
        mass = total
    return torch.cat(outputs, 2).transpose(1, 2).to(v.dtype)


def _chunks(t: Tensor, chunk_size: int) -> Tensor:
    """(1, L, H, K), L a multiple of C -> (L / C, H, C, K)."""
    return t.squeeze(0).unflatten(0, (-1, chunk_size)).transpose(1, 2)


def _unchunks(o: Tensor) -> Tensor:
    """(L / C, H, C, V) -> (1, L, H, V)."""
    return o.transpose(1, 2).flatten(0, 1)[None]
