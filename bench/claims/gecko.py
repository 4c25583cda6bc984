"""The parts that Gecko (arXiv 2601.06463) adds to MEGALODON, in plain torch; a model may have each without the others.

    two visible chunks    a query also sees the chunk before its own; rotary positions count through the row
    timestep decay norm   the norm's mean and variance decay by 0.999 and 0.9999 a position
    working memory        a matrix per head, written with chunks that attention no longer sees; four forms of it

After github XuezheMax/gecko-llm, commit fe04b3b (MIT); tests/bench/test_claims_gecko.py compares with its numbers. The gate is
that of ifm-ai/xllm's `gekko`. Letters: B rows, L tokens, H heads, S and V channels of a head's keys and values, C chunk, G groups.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import megalodon_ops as mo
from megalodon_ops.model.layers import Linear

from .llama import group_by_length

BETAS = 0.999, 0.9999
ROPE_BASE = 500_000.0


@dataclass(frozen=True)
class Parts:
    """Gecko's parts in a model; the default has none: it is MEGALODON."""

    visible_chunks: int = 1
    """Chunks that attention sees, including the query's own"""
    decay_norm: bool = False
    memory: str | None = None
    """A key of WRITE"""
    memory_of_all: bool = False
    """Write all chunks before a query's own to the memory, including those that attention sees"""
    memory_gate: bool = False
    """Mix the outputs of memory and attention by a gate per head; False: add the memory's after attention's gate"""
    memory_logits: float | None = None
    """Initial root mean square of the memory's queries and keys; None: 1 / sqrt(S), as released"""

    @property
    def unwritten_chunks(self) -> int:
        """Chunks that are not yet in the memory, including a query's own."""
        return 1 if self.memory_of_all else self.visible_chunks


MEMORIES = {
    "memory": Parts(memory="mean"),
    "memory, logits of 3": Parts(memory="mean", memory_logits=3.0),
    "memory, gate": Parts(memory="mean", memory_gate=True),
    "memory, delta rule": Parts(memory="delta"),
}
PARTS = {"two chunks": Parts(visible_chunks=2), "decay norm": Parts(decay_norm=True), **MEMORIES}
PARTS |= {
    f"all with {name}": dataclasses.replace(parts, visible_chunks=2, decay_norm=True)
    for name, parts in MEMORIES.items()
}
TWO_CHUNKS = dataclasses.replace(MEMORIES["memory, logits of 3"], visible_chunks=2)
PARTS |= {
    "two chunks with memory, logits of 3": TWO_CHUNKS,
    "two chunks with memory of all, logits of 3": dataclasses.replace(TWO_CHUNKS, memory_of_all=True),
}


def cost(config: mo.MegalodonConfig, parts: Parts, length: int) -> tuple[float, int]:
    """Mean operations a token in rows of `length`, and numbers in a state, of a layer's attention and memory."""
    S, V, C = config.z_dim, config.value_dim, min(config.chunk_size, length)
    # Mean keys of a query: half of its own chunk, and all of each earlier one, which the first chunks of a row lack.
    keys = C / 2 + sum(max(0.0, C * (1 - i * C / length)) for i in range(1, parts.visible_chunks))
    operations = 2 * (S + V) * keys
    numbers = parts.visible_chunks * config.chunk_size * (S + V)
    if parts.memory is not None:
        matrix = S * V // config.num_heads
        operations += 6 * matrix + (C * (2 * S + V) if parts.memory == "delta" else 0)
        numbers += matrix + S + parts.unwritten_chunks * config.chunk_size * S
    return operations, numbers


def timestep_decay_norm(
    x: Tensor,  # (B, L, D)
    weight: Tensor,  # (D,)
    bias: Tensor,  # (D,)
    *,
    num_groups: int,
    betas: tuple[float, float] = BETAS,
    eps: float = 1e-5,
    state: tuple[Tensor, Tensor, Tensor] | None = None,  # count (B,), mean and variance (B, G), both uncorrected
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Normalize by decaying means of the positions' means and variances; return y and the state after the last position.

    With a position's mean u and variance s, y = (x - M) R (1 + weight) + bias, where

    m_t = b1 m_{t-1} + (1 - b1) u_t    v_t = b2 v_{t-1} + (1 - b2) s_t
    M_t = m_t / (1 - b1^n_t)           R_t = 1 / sqrt(v_t / (1 - b2^n_t) + eps)      n_t: positions up to t
    """
    groups = x.unflatten(-1, (num_groups, -1))  # (B, L, G, D / G)
    if state is None:
        zeros = torch.zeros(len(x), num_groups, dtype=torch.float64)
        state = torch.zeros(len(x), dtype=torch.int64), zeros, zeros
    positions = torch.arange(1, x.shape[1] + 1, dtype=torch.float64)
    counts = state[0][:, None, None] + positions[:, None]  # (B, L, 1)
    own_variance, own_mean = torch.var_mean(groups.double(), -1, correction=0)
    corrected, ends = [], []
    for own, before, beta in zip((own_mean, own_variance), state[1:], betas, strict=True):
        power = (positions * math.log(beta)).exp()[:, None]  # (L, 1); not too small for some thousand positions
        means = power * (before[:, None] + (1 - beta) * (own / power).cumsum(1))  # (B, L, G)
        corrected.append(means / -torch.expm1(counts * math.log(beta)))
        ends.append(means[:, -1])
    mean, variance = (t.to(x.dtype)[..., None] for t in corrected)
    y = ((groups - mean) * (variance + eps).rsqrt()).flatten(-2) * (1 + weight) + bias
    return y, (state[0] + x.shape[1], *ends)


def rotate(x: Tensor, base: float) -> Tensor:
    """Rotate neighbouring pairs of x (B, H, L, S) by their positions in the row; scores depend on distances alone."""
    *_, L, S = x.shape
    angles = torch.arange(L, dtype=torch.float64)[:, None] * base ** (torch.arange(0, S, 2, dtype=torch.float64) / -S)
    turn = torch.polar(torch.ones_like(angles), angles).to(torch.promote_types(x.dtype, torch.complex64))
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)


def chunk_attention(q: Tensor, k: Tensor, v: Tensor, *, chunk_size: int, visible_chunks: int) -> Tensor:
    """Causal softmax attention of q (B, H, L, S), unscaled, in its own chunk and the `visible_chunks` - 1 before it."""
    length = q.shape[2]
    q, k, v = (_chunks(t, chunk_size) for t in (q, k, v))  # (B, H, n, C, ...)
    own = torch.ones(chunk_size, chunk_size, dtype=torch.bool).tril()
    mask = torch.cat((torch.ones(chunk_size, (visible_chunks - 1) * chunk_size, dtype=torch.bool), own), 1)
    indices = torch.arange(q.shape[2])[:, None] - torch.arange(visible_chunks - 1, -1, -1)  # (n, visible_chunks)
    exists = (indices >= 0).repeat_interleave(chunk_size, 1)[:, None]  # (n, 1, visible_chunks C)
    k, v = (t[:, :, indices.clamp(min=0)].flatten(3, 4) for t in (k, v))  # (B, H, n, visible_chunks C, ...)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask & exists, scale=1.0)
    return y.flatten(2, 3)[:, :, :length]


def _chunks(t: Tensor, size: int) -> Tensor:
    return F.pad(t, (0, 0, 0, -t.shape[2] % size)).unflatten(2, (-1, size))


Memory = tuple[Tensor, Tensor]
"""M (B, H, S, V), and the logarithm of the mass written to its rows (B, H, S)"""


def write_mean(memory: Memory, keys: Tensor, values: Tensor) -> Memory:
    """As released: a row of M is a mean over the past, with weights exp(k), of the values that M did not predict."""
    M, mass = memory
    written = keys.logsumexp(2)
    total = torch.logaddexp(mass, written)
    share = (written - total).exp()[..., None]
    unknown = values - keys.softmax(-1) @ M
    return (1 - share) * M + share * (keys.softmax(2).mT @ unknown), total


def write_delta(memory: Memory, keys: Tensor, values: Tensor) -> Memory:
    """The delta rule, a control: M += k (v - k M) for each key of length 1 in turn, computed for a whole chunk at once."""
    M, mass = memory
    k = F.normalize(keys, dim=-1)
    unknown = torch.linalg.solve_triangular(k @ k.mT, values - k @ M, upper=False, unitriangular=True)
    return M + k.mT @ unknown, torch.zeros_like(mass)


WRITE = {"mean": (write_mean, lambda q: q.softmax(-1)), "delta": (write_delta, lambda q: F.normalize(q, dim=-1))}
"""Functions that write a memory, and that turn a query into the weights that read it"""


def working_memory(
    q: Tensor,  # (B, H, L, S)
    k: Tensor,  # (B, H, L, S)
    v: Tensor,  # (B, H, L, V)
    *,
    chunk_size: int,
    visible_chunks: int = 2,
    kind: str = "mean",
) -> tuple[Tensor, Memory]:
    """Memory reads (B, H, L, V) of the chunks that attention does not see, and the memory after the last chunk.

    A chunk reads first; then the oldest of its `visible_chunks` is written, complete or not.
    """
    write, read_weights = WRITE[kind]
    B, H, _, S = q.shape
    memory = q.new_zeros(B, H, S, v.shape[-1]), q.new_full((B, H, S), -torch.inf)
    keys, values = k.split(chunk_size, 2), v.split(chunk_size, 2)
    found = []
    for number, queries in enumerate(q.split(chunk_size, 2)):
        found.append(read_weights(queries) @ memory[0])
        oldest = number - visible_chunks + 1
        if oldest >= 0:
            memory = write(memory, keys[oldest], values[oldest])
    return torch.cat(found, 2), memory


class DecayNorm(mo.TimestepNorm):
    """:func:`timestep_decay_norm` in place of timestep norm; rows start without a state."""

    betas = BETAS

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        y, _ = timestep_decay_norm(
            x, self.weight, self.bias, num_groups=self.num_groups, betas=self.betas, eps=self.eps
        )
        return y


class Attention(mo.NormalizedAttention):
    """First half of a block with some of Gecko's parts; rows start without a state."""

    def __init__(self, config: mo.MegalodonConfig, parts: Parts) -> None:
        super().__init__(config)
        self.parts = parts
        if parts.memory is not None:
            self.gamma, self.beta = (nn.Parameter(torch.zeros(4, config.z_dim)) for _ in range(2))
            if parts.memory_logits is not None:
                with torch.no_grad():
                    self.gamma[2:] = parts.memory_logits * math.sqrt(config.z_dim // config.num_heads) - 1
        self.wg = Linear(config.model_dim, config.num_heads) if parts.memory_gate else None

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        config, parts = self.config, self.parts
        heads = config.num_heads
        t = self.timenorm(x)
        m = self.rmsnorm(self.cema(t))
        v = F.silu(self.wv(t)).unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, H, L, V)
        z = self.wz(m).unflatten(-1, (heads, -1))
        z = z * (z.square().mean(-1, keepdim=True) + config.norm_eps).rsqrt()
        gain = ((1 + self.gamma) * z.shape[-1] ** -0.5).unflatten(-1, (heads, -1))
        offset = self.beta.unflatten(-1, (heads, -1))
        q, k, *own = (z[:, :, None] * gain + offset).permute(2, 0, 3, 1, 4)  # each (B, H, L, S)
        q, k = rotate(q, config.rotary_base), rotate(k, config.rotary_base)
        a = chunk_attention(q, k, v, chunk_size=config.chunk_size, visible_chunks=parts.visible_chunks)
        r = F.silu(self.wr(m)).unflatten(-1, (heads, -1)).transpose(1, 2)
        if parts.memory is None:
            out = a * r
        else:
            chunks = dict(chunk_size=config.chunk_size, visible_chunks=parts.unwritten_chunks)
            read, _ = working_memory(*own, v, **chunks, kind=parts.memory)
            if self.wg is None:
                out = a * r + read
            else:
                empty = torch.arange(x.shape[1]) < parts.unwritten_chunks * config.chunk_size  # no memory yet
                gate = self.wg(m).sigmoid().transpose(1, 2)[..., None] * ~empty[:, None]  # (B, H, L, 1)
                out = (a + gate * (read - a)) * r
        return x + self.wh1(m) + self.wh2(out.transpose(1, 2).flatten(-2))


class Gecko(mo.Megalodon):
    """A Megalodon with some of Gecko's parts, without states.

    Packed sequences become rows of a padded batch. The two-hop residual, CEMA's omega and initial values are MEGALODON's.
    """

    def __init__(self, config: mo.MegalodonConfig, parts: Parts) -> None:
        if parts.visible_chunks > 1:
            config = dataclasses.replace(config, rope_base=ROPE_BASE)
        super().__init__(config)
        for layer in self.layers:
            layer.mega = Attention(config, parts)
        if parts.decay_norm:
            sizes = (config.model_dim, config.norm_num_groups, config.norm_eps)
            for layer in self.layers:
                layer.mega.timenorm = DecayNorm(*sizes)
            self.output.final_norm = DecayNorm(*sizes)

    def loss(self, tokens: Tensor, targets: Tensor, *, cu_seqlens: Tensor | None = None, **options: Any) -> Tensor:
        if cu_seqlens is None:
            return super().loss(tokens, targets, **options)
        reduction = options.pop("reduction", "mean")
        lengths = cu_seqlens.diff().tolist()
        documents = tokens[0].split(lengths), targets[0].split(lengths)
        found: list[Any] = [None] * len(lengths)
        for group in group_by_length(lengths):
            rows = (pad_sequence([parts[i] for i in group], batch_first=True) for parts in documents)
            losses = super().loss(*rows, reduction="none", **options)
            for i, row in zip(group, losses, strict=True):
                found[i] = row[: lengths[i]]
        losses = torch.cat(found)[None]
        return losses if reduction == "none" else losses.mean()
