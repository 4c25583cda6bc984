"""MEGALODON (arXiv 2404.08801), the whole model in plain PyTorch: real arithmetic, no kernels, no custom ops.

Letters: B batch, L length, D model dim, N CEMA modes of a channel, G norm groups, H heads, K and V head dims of keys and
values, C chunk size. A complex number is a pair of tensors, its real and imaginary part. Every gain is 1 + its parameter."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Complex = tuple[Tensor, Tensor]
_BLOCK = 64
"""T, positions that CEMA computes by one matrix product"""


class TimestepNorm(nn.Module):
    """Group norm with cumulative statistics (section 3.2): position t uses mean and variance of positions 1 .. t."""

    def __init__(self, dim: int, num_groups: int, eps: float) -> None:
        super().__init__()
        self.num_groups, self.eps = num_groups, eps
        self.weight, self.bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, n: Tensor, mean0: Tensor, var0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalize x (B, L, D); n (B, L, 1): positions so far; mean0 and var0 (B, G): statistics before x, float64."""
        groups = x.to(_wide(x)).unflatten(-1, (self.num_groups, -1))
        gm = groups.mean(-1)  # mean and variance of each group at one position
        gv = (groups - gm[..., None]).square().mean(-1)
        sums = (lambda s: s) if x.shape[1] == 1 else (lambda s: s.cumsum(1))  # of one position: no operation
        mean = mean0[:, None] + sums(gm - mean0[:, None]) / n
        # n var_n = (n - 1) var_(n-1) + gv + (gm - mean_n)(gm - mean_(n-1)), and gm - mean_n = 0 for n = 1
        added = gv + (gm - mean).square() * (n / (n - 1).clamp(min=1))
        var = ((n[:, :1] - 1) * var0[:, None] + sums(added)) / n
        y = ((groups - mean[..., None]) * (var + self.eps).rsqrt()[..., None]).flatten(-2).to(_real(x))
        return (y * (1 + self.weight) + self.bias).to(x.dtype), mean[:, -1], var[:, -1]


class CEMA(nn.Module):
    """Complex exponential moving average (section 3.1): N modes a channel, which decay and rotate.

    h_t = q h_(t-1) + p x_t,    y_t = Re(sum_n gamma_n h_t[n]) + omega x_t,    q = r exp(i phi)"""

    def __init__(self, dim: int, ndim: int, longest: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.randn(dim, ndim, 1))
        self.delta = nn.Parameter(torch.randn(dim, ndim, 1))
        self.theta = nn.Parameter(torch.randn(dim, 1, 1))
        self.gamma = nn.Parameter(torch.randn(dim, ndim, 2))
        self.omega = nn.Parameter(torch.randn(dim, 1))
        self.longest = longest  # most positions of a scan

    def forward(self, x: Tensor, h: Complex, matrices: tuple) -> tuple[Tensor, Complex]:
        """Map x (B, L, D) to y, and h (B, D, N) before x to h after it."""
        y, h = self.scan(x.to(self.alpha.dtype), h, *matrices)
        return (y + self.omega.squeeze(-1) * x).to(x.dtype), h

    def matrices(self, length: int) -> tuple:
        """Return p, gamma and powers of q (D, N), and for more than one position the blocks' matrices:

        within (D, T, T): from a block's x to its y
        into (D, T, 2 N): from a block's x to its part of h after the block
        out (D, 2 N, T): from h before a block to its y
        leaps: factors q^(T reach) of h over `reach` = 1, 2, 4, ... blocks
        """
        N, T = self.alpha.shape[1], _BLOCK
        p = self.alpha.sigmoid().squeeze(-1)
        phi = self.theta.sigmoid().squeeze(-1) * torch.arange(1, N + 1, device=p.device) * (2 * math.pi / N)
        q = torch.log1p(-p * self.delta.sigmoid().squeeze(-1))[..., None], phi[..., None]  # log r and phi
        gamma = (self.gamma / math.sqrt(N)).unbind(-1)
        t = torch.arange(2 if length == 1 else T + 1, device=p.device)
        powers = _power(q, t)  # (D, N, T + 1), q^0 .. q^T
        if length == 1:
            return p, gamma, powers
        real, imag = _product([g[..., None] for g in gamma], powers)
        lags = F.pad((p[..., None] * real).sum(1)[:, :T], (T - 1, 0))  # (D, 2 T - 1), zero where to < from
        within = lags[:, t[:T] - t[:T, None] + T - 1]  # (D, from, to)
        into = torch.cat([(p[..., None] * power[..., :T].flip(-1)).mT for power in powers], -1)
        out = torch.cat((real, -imag), 1)[..., 1:]
        leaps = [(2**i, _power(q, t[-1] * 2**i)) for i in range((self.longest // T + 1).bit_length())]
        return p, gamma, powers, within, into, out, leaps

    def scan(self, x: Tensor, h: Complex, p: Tensor, gamma: Complex, powers: Complex, *blocks: Any) -> tuple:
        """Return the sum over modes (B, L, D), and h after x; of several positions by `blocks`, the blocks' matrices.

        With h before a block, y_i = Re(gamma q^(i+1) h) + sum_(j <= i) Re(gamma p q^(i-j)) x_j, and the next block has
        q^T h + sum_j q^(T-1-j) p x_j: a sum over M blocks, in log2(M) steps of twice the reach. The last block has r
        positions.
        """
        B, L, D = x.shape
        if L == 1:
            real, imag = _product([power[..., 1] for power in powers], h)
            h = real + p * x.mT, imag
            return _product(gamma, h)[0].sum(-1)[:, None], h
        within, into, out, leaps = blocks
        T = within.shape[1]
        M, last, r = -(-L // T) + 1, L // T, L % T  # one block more, as torch.export wants M > 1
        rows = F.pad(x, (0, 0, 0, M * T - L)).reshape(B, M, T, D).permute(3, 0, 1, 2).contiguous()  # (D, B, M, T)
        added = (rows.flatten(1, 2) @ into).unflatten(1, (B, M)).permute(1, 0, 3, 2).chunk(2, 2)  # (B, D, N, M)
        # h before each block: first that before x, then each block's own part, to which the loop adds the earlier ones
        h = [torch.cat((s[..., None], a[..., :-1]), -1) for s, a in zip(h, added, strict=True)]
        for reach, power in leaps:
            h = [s + e for s, e in zip(h, _product(power, [F.pad(s, (reach, 0))[..., :M] for s in h]), strict=True)]
        y = rows.flatten(1, 2) @ within + torch.cat(h, 2).permute(1, 0, 3, 2).flatten(1, 2) @ out
        # h after x, from h before the last block and the last block's r positions
        t, at = torch.arange(T, device=x.device), torch.full((1,), last, device=x.device)
        added = rows.index_select(2, at).squeeze(2) @ F.pad(into, (0, 0, 0, T))[:, T - r + t]  # (D, B, 2 N)
        decayed = _product([e[..., r + t[:1]] for e in powers], [s.index_select(-1, at) for s in h])
        h = [d[..., 0] + a for d, a in zip(decayed, added.transpose(0, 1).chunk(2, -1), strict=True)]
        return y.reshape(D, B, -1)[..., :L].permute(1, 2, 0), h


def _product(a: Complex, b: Complex) -> Complex:
    return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]


def _power(q: Complex, exponent: Tensor) -> Complex:
    """q^exponent of q = (log r, phi); angles are reduced in float64, so that phases do not drift."""
    angle = (q[1].to(_wide(q[1])) * exponent).remainder(2 * math.pi).to(q[1].dtype)
    return (q[0] * exponent).exp() * angle.cos(), (q[0] * exponent).exp() * angle.sin()


class Norm(nn.Module):
    """RMS norm or, centered, layer norm."""

    def __init__(self, config: Any, *, centered: bool) -> None:
        super().__init__()
        self.eps, self.centered = config.norm_eps, centered
        D, affine = config.model_dim, config.norm_affine
        self.weight = nn.Parameter(torch.zeros(D)) if affine else None
        self.bias = nn.Parameter(torch.zeros(D)) if affine and centered else None

    def forward(self, x: Tensor) -> Tensor:
        gain = None if self.weight is None else 1 + self.weight
        if self.centered:
            return F.layer_norm(x.to(_real(x)), x.shape[-1:], gain, self.bias, self.eps).to(x.dtype)
        return F.rms_norm(x.to(_real(x)), x.shape[-1:], gain, self.eps).to(x.dtype)


class Attention(nn.Module):
    """First half of a block: normalized gated attention to the output of CEMA (sections 3.3 and 3.4)."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        D, z_dim, value_dim = config.model_dim, config.z_dim, config.value_dim
        self.timenorm = TimestepNorm(D, config.norm_num_groups, config.norm_eps)
        self.cema = CEMA(D, config.cema_ndim, config.chunk_size)
        self.rmsnorm = Norm(config, centered=False)
        self.wv = nn.Linear(D, value_dim)
        self.wz = nn.Linear(D, z_dim)
        self.wr = nn.Linear(D, value_dim)
        self.wh1 = nn.Linear(D, D)
        self.wh2 = nn.Linear(value_dim, D, bias=False)
        self.gamma = nn.Parameter(torch.zeros(2, z_dim))
        self.beta = nn.Parameter(torch.zeros(2, z_dim))

    def forward(self, x: Tensor, n: Tensor, angle: Tensor, cema: tuple, state: tuple, fresh: bool) -> tuple:
        """Map x (B, L, D) to y; state: mean, var, h's two parts, keys (B, H, C, K), values (B, H, C, V)."""
        mean, var, *h, keys, values = state
        t, mean, var = self.timenorm(x, n, mean, var)
        c, h = self.cema(t, h, cema)
        m = self.rmsnorm(c)
        q, k, v = self.heads(m, t, angle)
        a = self._attend(q, k, v, n, None if fresh else (keys, values)).transpose(1, 2).flatten(-2)
        y = x + self.wh1(m) + self.wh2(a * F.silu(self.wr(m)))
        row = ((n - 1).long() % self.config.chunk_size)[:, None]  # of each position in the cached keys and values
        cache = (old.scatter(2, row.expand_as(s), s) for old, s in ((keys, k), (values, v)))
        return y, (mean, var, *h, *cache)

    def heads(self, m: Tensor, t: Tensor, angle: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries and keys (B, H, L, K), values (B, H, L, V)."""
        H = self.config.num_heads
        z, v = (s.unflatten(-1, (H, -1)).transpose(1, 2) for s in (self.wz(m), F.silu(self.wv(t))))
        z = F.rms_norm(z.to(_real(z)), z.shape[-1:], eps=self.config.norm_eps)
        gain = ((1 + self.gamma) / math.sqrt(z.shape[-1])).unflatten(-1, (H, 1, -1))  # (2, H, 1, K)
        shift = self.beta.unflatten(-1, (H, 1, -1))
        q, k = _rotated(z[:, None] * gain + shift, angle[:, None]).to(v.dtype).unbind(1)
        return q, k, v

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, n: Tensor, cache: tuple[Tensor, Tensor] | None) -> Tensor:
        """Softmax attention of L <= C positions to those of their chunk in the call and the cache, (B, H, L, V)."""
        C = self.config.chunk_size
        row = ((n[:, :1] - 1).long() % C + torch.arange(n.shape[1], device=q.device)[:, None])[:, None]  # (B, 1, L, 1)
        scores, seen = q @ k.mT, (row.mT <= row) & (row.mT // C == row // C)
        if cache is not None:
            scores = torch.cat((q @ cache[0].mT, scores), -1)
            seen = torch.cat(((torch.arange(C, device=q.device) < row[:, :, :1]) & (row < C), seen), -1)
        P = scores.to(_real(scores)).masked_fill(~seen, -1e30).softmax(-1).to(v.dtype)
        return P @ v if cache is None else P[..., :C] @ cache[1] + P[..., C:] @ v


class NFFN(nn.Module):
    """Second half of a block, without its residual (section 3.4): fc2(silu(fc1 n) [* fc3 n]), n = layer_norm(y)."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        D, hidden = config.model_dim, config.ffn_hidden_dim
        self.norm = Norm(config, centered=True)
        self.fc1 = nn.Linear(D, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, D, bias=False)
        self.fc3 = nn.Linear(D, hidden, bias=False) if config.swiglu else None
        self.register_parameter("alpha", nn.Parameter(torch.ones(D)) if config.rescale_nffn else None)

    def forward(self, y: Tensor) -> Tensor:
        n = self.norm(y)
        f = self.fc2(F.silu(self.fc1(n)) if self.fc3 is None else F.silu(self.fc1(n)) * self.fc3(n))
        return f if self.alpha is None else (self.alpha * f).to(f.dtype)


class Megalodon(nn.Module):
    """The language model of a :class:`MegalodonConfig` without `num_features`, `working_memory` and `visible_chunks`.

    It loads the parameters of :class:`megalodon_ops.Megalodon`, has no dropout, and runs wherever PyTorch runs.

    Example:
        >>> import torch, megalodon_ops as mo
        >>> config = mo.MegalodonConfig(num_layers=1, model_dim=32, z_dim=16, value_dim=32, ffn_hidden_dim=32, vocab_size=9)
        >>> model, reference, tokens = mo.Megalodon(config), mo.reference.Megalodon(config), torch.randint(9, (2, 20))
        >>> _, (_, state) = reference.load_state_dict(model.state_dict()), reference(tokens[:, :13])
        >>> torch.allclose(reference(tokens[:, 13:], state)[0], model(tokens)[:, 13:], atol=1e-4)
        True
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        for field, value in dict(causal=True, working_memory=False, visible_chunks=1, num_features=None).items():
            if (got := getattr(config, field)) != value:
                raise ValueError(f"reference.Megalodon: `{field}` must be {value}, got {got}; use mo.Megalodon.")
        D = config.model_dim
        self.config = config
        self.scale = D**0.5 if config.scale_emb else 1.0
        self.embed = nn.Embedding(config.vocab_size, D)
        blocks = (dict(mega=Attention(config), nffn=NFFN(config)) for _ in range(config.num_layers))
        self.layers = nn.ModuleList(map(nn.ModuleDict, blocks))
        norm = TimestepNorm(D, config.norm_num_groups, config.norm_eps)
        output = nn.Linear(D, config.num_outputs, bias=False)
        self.output = nn.ModuleDict(dict(final_norm=norm, output=output))
        if config.share_emb:
            output.weight = self.embed.weight

    def fresh(self, num_sequences: int) -> tuple[Tensor, ...]:
        """Return the state of B new sequences: count (B,); of each layer mean, var (B, G), h's parts (B, D, N), keys,
        values (B, H, C, K or V); mean and var."""
        config, B, like = self.config, num_sequences, self.layers[0]["mega"].gamma
        norm = [like.new_zeros(B, config.norm_num_groups, dtype=_wide(like))] * 2
        h = [like.new_zeros(B, config.model_dim, config.cema_ndim, dtype=_real(like))] * 2
        H = config.num_heads
        cache = like.new_zeros(B, H, config.chunk_size, 1, dtype=self.embed.weight.dtype)
        layer = [*norm, *h, *(cache.repeat(1, 1, 1, dim // H) for dim in (config.z_dim, config.value_dim))]
        return (torch.zeros(B, dtype=torch.int64, device=like.device), *layer * config.num_layers, *norm)

    def forward(self, tokens: Tensor, state: tuple[Tensor, ...] | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the logits (B, L, outputs) of tokens (B, L), L >= 1, and the state after them."""
        x, C = self.embed(tokens) * self.scale, self.config.chunk_size
        fresh = state is None
        state = self.fresh(x.shape[0]) if fresh else state
        logits = []
        cema = [layer["mega"].cema.matrices(x.shape[1]) for layer in self.layers]
        for piece in x.split(C, 1) if x.shape[1] > C else (x,):
            y, state = self._piece(piece, cema, state, fresh)
            logits.append(y)
        state = tuple(
            s.detach() if s.dim() == 4 else s for s in state
        )  # of four dimensions: keys and values, constants
        return torch.cat(logits, 1) if len(logits) > 1 else logits[0], state

    def _piece(self, x: Tensor, cema: list[tuple], state: tuple[Tensor, ...], fresh: bool) -> tuple[Tensor, tuple]:
        """Return the logits of at most C positions and the state after them. cema: each layer's matrices."""
        count, *parts = state
        n = (count[:, None] + torch.arange(1, x.shape[1] + 1, device=x.device))[..., None]  # (B, L, 1)
        angle = _angle(n - 1, x, self.config)
        n = n.to(_wide(x))
        new = []
        for index, layer in enumerate(self.layers):
            y, layer_state = layer["mega"](x, n, angle, cema[index], parts[6 * index : 6 * index + 6], fresh)
            x = x + layer["nffn"](y)
            new += layer_state
        x, *norm = self.output["final_norm"](x, n, *parts[-2:])
        return self.output["output"](x).to(_real(x)), (count + x.shape[1], *new, *norm)


def _angle(position: Tensor, x: Tensor, config: Any) -> Tensor:
    """Return the rotary angles (B, 1, L, K / 2) of positions (B, L, 1)."""
    K = config.z_dim // config.num_heads
    frequencies = (config.rope_base or 10000.0) ** (torch.arange(0, K, 2, dtype=_real(x), device=x.device) / -K)
    return ((position % config.chunk_size) * frequencies)[:, None]


def _rotated(x: Tensor, angle: Tensor) -> Tensor:
    """Rotate each pair of neighbours (a, b) of x (..., K) to (a cos - b sin, b cos + a sin)."""
    one = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    cos, sin = angle.cos(), angle.sin()
    turned = x @ torch.stack((-one[:, 1::2], one[:, ::2]), -1).flatten(-2)  # of pairs (a, b): (-b, a)
    return x * cos.repeat_interleave(2, -1) + turned * sin.repeat_interleave(2, -1)


def _real(x: Tensor) -> torch.dtype:
    """Return the dtype of norms, CEMA, scores and logits."""
    return torch.promote_types(x.dtype, torch.float32)


def _wide(x: Tensor) -> torch.dtype:
    """Return the dtype of the timestep norms' statistics and of phases."""
    return torch.float32 if x.is_mps else torch.float64  # Apple's GPUs have no float64
