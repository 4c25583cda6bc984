"""The parts that Gecko (arXiv 2601.06463) adds to MEGALODON, in plain torch, each of which a model may have without the others.

    two visible chunks    a query sees the chunk before its own too; rotary positions go on through the row
    timestep decay norm   the norm's mean and variance forget by 0.999 and 0.9999 a step
    working memory        a matrix a head, written with what attention no longer sees; four forms of it

After github XuezheMax/gecko-llm, commit fe04b3b (MIT), with whose numbers tests/bench/test_claims_gecko.py compares; the gate is of
ifm-ai/xllm's `gekko`. Letters: B rows, L tokens, H heads, S and V channels of a head's keys and values, C a chunk, G groups.
"""

from __future__ import annotations

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

from .llama import similar

BETAS = 0.999, 0.9999
ROPE_BASE = 500_000.0


@dataclass(frozen=True)
class Parts:
    """What a model has of Gecko; as it stands, nothing: it is MEGALODON."""

    visible: int = 1
    """Chunks that attention sees, its own among them"""
    decays: bool = False
    memory: str | None = None
    """A key of WRITE"""
    of_all: bool = False
    """The memory is of all chunks before a step's own, those that attention sees among them"""
    gated: bool = False
    """The memory's output takes attention's place by a gate a head, in place of being added behind attention's gate"""
    logits: float | None = None
    """How large the memory's queries and keys are at the start, root mean square; None: 1 / sqrt(S), as released"""

    @property
    def unwritten(self) -> int:
        """Chunks that are not in the memory yet, a step's own among them."""
        return 1 if self.of_all else self.visible


MEMORIES = {
    "memory": Parts(memory="mean"),
    "memory, logits of 3": Parts(memory="mean", logits=3.0),
    "memory, gate": Parts(memory="mean", gated=True),
    "memory, delta rule": Parts(memory="delta"),
}
PARTS = {"two chunks": Parts(visible=2), "decay norm": Parts(decays=True), **MEMORIES}
PARTS |= {f"all with {name}": dataclasses.replace(parts, visible=2, decays=True) for name, parts in MEMORIES.items()}
TWO = dataclasses.replace(MEMORIES["memory, logits of 3"], visible=2)
PARTS |= {
    "two chunks with memory, logits of 3": TWO,
    "two chunks with memory of all, logits of 3": dataclasses.replace(TWO, of_all=True),
}


def cost(config: mo.MegalodonConfig, parts: Parts, length: int) -> tuple[float, int]:
    """What attention and memory take in a layer: operations a token of rows of `length`, on average, and numbers of a state."""
    S, V, C = config.z_dim, config.value_dim, min(config.chunk_size, length)
    seen = sum(max(0.0, C / 2 if i == 0 else C * (1 - i * C / length)) for i in range(parts.visible))
    operations, numbers = 2 * (S + V) * seen, parts.visible * config.chunk_size * (S + V)
    if parts.memory is not None:
        matrix = S * V // config.num_heads
        operations += 6 * matrix + (C * (2 * S + V) if parts.memory == "delta" else 0)
        numbers += matrix + S + parts.unwritten * config.chunk_size * S
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
    """y = (x - M) R (1 + weight) + bias, and the state after the last step. Of a step's own mean u and variance s,

    m_t = b1 m_{t-1} + (1 - b1) u_t    v_t = b2 v_{t-1} + (1 - b2) s_t
    M_t = m_t / (1 - b1^n_t)           R_t = 1 / sqrt(v_t / (1 - b2^n_t) + eps)      n_t: steps so far, t among them
    """
    groups = x.unflatten(-1, (num_groups, -1))  # (B, L, G, D / G)
    if state is None:
        count, zeros = torch.zeros(len(x), dtype=torch.int64), torch.zeros(len(x), num_groups, dtype=torch.float64)
        state = count, zeros, zeros
    steps = torch.arange(1, x.shape[1] + 1, dtype=torch.float64)
    counts = state[0][:, None, None] + steps[:, None]  # (B, L, 1)
    corrected, ends = [], []
    for own, before, beta in zip(
        torch.var_mean(groups.double(), -1, correction=0)[::-1], state[1:], betas, strict=True
    ):
        power = (steps * math.log(beta)).exp()[:, None]  # (L, 1); at most some thousand steps: its inverse is small
        found = power * (before[:, None] + (1 - beta) * (own / power).cumsum(1))  # (B, L, G)
        corrected.append(found / -torch.expm1(counts * math.log(beta)))
        ends.append(found[:, -1])
    mean, variance = (t.to(x.dtype)[..., None] for t in corrected)
    y = ((groups - mean) * (variance + eps).rsqrt()).flatten(-2) * (1 + weight) + bias
    return y, (state[0] + x.shape[1], *ends)


def rotated(x: Tensor, base: float) -> Tensor:
    """x (B, H, L, S), neighbouring pairs of it turned by their step: scores depend on how far apart two steps are, so that they
    are those of positions that restart with the chunk, as MEGALODON's do, where attention sees no other chunk."""
    *_, L, S = x.shape
    angles = torch.arange(L, dtype=torch.float64)[:, None] * base ** (torch.arange(0, S, 2, dtype=torch.float64) / -S)
    turn = torch.polar(torch.ones_like(angles), angles).to(torch.promote_types(x.dtype, torch.complex64))
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)


def chunk_attention(q: Tensor, k: Tensor, v: Tensor, *, chunk_size: int, visible: int) -> Tensor:
    """Softmax attention, scores unscaled, of q (B, H, L, S) to the keys of its chunk so far, and of `visible` - 1 before it."""
    length = q.shape[2]
    q, k, v = (_chunks(t, chunk_size) for t in (q, k, v))  # (B, H, n, C, ...)
    own = torch.ones(chunk_size, chunk_size, dtype=torch.bool).tril()
    mask = torch.cat((torch.ones(chunk_size, (visible - 1) * chunk_size, dtype=torch.bool), own), 1)
    numbers = torch.arange(q.shape[2])[:, None] - torch.arange(visible - 1, -1, -1)  # (n, visible) chunks that are seen
    there = (numbers >= 0).repeat_interleave(chunk_size, 1)[:, None]  # (n, 1, visible C)
    k, v = (t[:, :, numbers.clamp(min=0)].flatten(3, 4) for t in (k, v))  # (B, H, n, visible C, ...)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask & there, scale=1.0)
    return y.flatten(2, 3)[:, :, :length]


def _chunks(t: Tensor, size: int) -> Tensor:
    return F.pad(t, (0, 0, 0, -t.shape[2] % size)).unflatten(2, (-1, size))


Memory = tuple[Tensor, Tensor]
"""M (B, H, S, V), and the logarithm of how much its rows have been written, (B, H, S)"""


def write_mean(memory: Memory, keys: Tensor, values: Tensor) -> Memory:
    """As released: a row of M is a mean over the past, with weights exp(k), of what M did not know."""
    M, mass = memory
    written = keys.logsumexp(2)
    total = torch.logaddexp(mass, written)
    share = (written - total).exp()[..., None]
    unknown = values - keys.softmax(-1) @ M
    return (1 - share) * M + share * (keys.softmax(2).mT @ unknown), total


def write_delta(memory: Memory, keys: Tensor, values: Tensor) -> Memory:
    """The delta rule, a control: for key after key, of length 1, M += k (v - k M), all keys of a chunk at once."""
    M, mass = memory
    k = F.normalize(keys, dim=-1)
    unknown = torch.linalg.solve_triangular(k @ k.mT, values - k @ M, upper=False, unitriangular=True)
    return M + k.mT @ unknown, torch.zeros_like(mass)


WRITE = {"mean": (write_mean, lambda q: q.softmax(-1)), "delta": (write_delta, lambda q: F.normalize(q, dim=-1))}
"""How a memory is written, and what of a query reads it"""


def working_memory(
    q: Tensor,  # (B, H, L, S)
    k: Tensor,  # (B, H, L, S)
    v: Tensor,  # (B, H, L, V)
    *,
    chunk_size: int,
    visible: int = 2,
    kind: str = "mean",
) -> tuple[Tensor, Memory]:
    """What each query reads of the chunks that attention does not see, (B, H, L, V), and the memory after the last chunk.

    A chunk reads first, then the oldest chunk that it saw, of `visible`, is written, complete or not.
    """
    write, of_query = WRITE[kind]
    memory = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1]), q.new_full((*q.shape[:2], q.shape[-1]), -torch.inf)
    chunks = [*zip(*(t.split(chunk_size, 2) for t in (q, k, v)), strict=True)]
    found = []
    for number, (queries, _, _) in enumerate(chunks):
        found.append(of_query(queries) @ memory[0])
        if number >= visible - 1:
            memory = write(memory, *chunks[number - visible + 1][1:])
    return torch.cat(found, 2), memory


class DecayNorm(mo.TimestepNorm):
    """:func:`timestep_decay_norm` in the place of timestep norm, of rows that begin afresh."""

    betas = BETAS

    def forward(self, x: Tensor, *, return_state: bool = False, **_: Any) -> Any:
        y, _ = timestep_decay_norm(
            x, self.weight, self.bias, num_groups=self.num_groups, betas=self.betas, eps=self.eps
        )
        return (y, None) if return_state else y


class Attention(mo.NormalizedAttention):
    """The first half of a block with some of Gecko's parts, of rows that begin afresh."""

    def __init__(self, config: mo.MegalodonConfig, parts: Parts) -> None:
        super().__init__(config)
        self.parts = parts
        if parts.memory is not None:
            self.gamma, self.beta = (nn.Parameter(torch.zeros(4, config.z_dim)) for _ in range(2))
            if parts.logits is not None:
                with torch.no_grad():
                    self.gamma[2:] = parts.logits * math.sqrt(config.z_dim // config.num_heads) - 1
        self.wg = Linear(config.model_dim, config.num_heads) if parts.gated else None

    def forward(self, x: Tensor, *, return_state: bool = False, **_: Any) -> Any:
        config, parts, heads = self.config, self.parts, self.config.num_heads
        t = self.timenorm(x)
        m = self.rmsnorm(self.cema(t))
        v = F.silu(self.wv(t)).unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, H, L, V)
        z = self.wz(m).unflatten(-1, (heads, -1))
        z = z * (z.square().mean(-1, keepdim=True) + config.norm_eps).rsqrt()
        gain, offset = (t.unflatten(-1, (heads, -1)) for t in ((1 + self.gamma) * z.shape[-1] ** -0.5, self.beta))
        q, k, *own = (z[:, :, None] * gain + offset).permute(2, 0, 3, 1, 4)  # each (B, H, L, S)
        q, k = (rotated(of_token, config.rotary_base) for of_token in (q, k))
        a = chunk_attention(q, k, v, chunk_size=config.chunk_size, visible=parts.visible)
        r = F.silu(self.wr(m)).unflatten(-1, (heads, -1)).transpose(1, 2)
        if parts.memory is None:
            out = a * r
        else:
            read, _ = working_memory(*own, v, chunk_size=config.chunk_size, visible=parts.unwritten, kind=parts.memory)
            if self.wg is None:
                out = a * r + read
            else:
                empty = torch.arange(x.shape[1]) < parts.unwritten * config.chunk_size  # nothing was written before
                gate = self.wg(m).sigmoid().transpose(1, 2)[..., None] * ~empty[:, None]  # (B, H, L, 1)
                out = (a + gate * (read - a)) * r
        y = x + self.wh1(m) + self.wh2(out.transpose(1, 2).flatten(-2))
        return (y, None) if return_state else y


class Gecko(mo.Megalodon):
    """A Megalodon with some of Gecko's parts; its rows begin afresh: it takes and gives no states.

    Packed sequences become rows of a padded batch. Two hops, omega of CEMA and the initial values are MEGALODON's.
    """

    def __init__(self, config: mo.MegalodonConfig, parts: Parts) -> None:
        if parts.visible > 1:
            config = dataclasses.replace(config, rope_base=ROPE_BASE)
        super().__init__(config)
        for layer in self.layers:
            layer.mega = Attention(config, parts)
        if parts.decays:
            for owner, name in [*((layer.mega, "timenorm") for layer in self.layers), (self.output, "final_norm")]:
                setattr(owner, name, DecayNorm(config.model_dim, config.norm_num_groups, config.norm_eps))

    def loss(self, tokens: Tensor, targets: Tensor, *, cu_seqlens: Tensor | None = None, **options: Any) -> Tensor:
        if cu_seqlens is None:
            return super().loss(tokens, targets, **options)
        reduction = options.pop("reduction", "mean")
        lengths = cu_seqlens.diff().tolist()
        own, wanted = tokens[0].split(lengths), targets[0].split(lengths)
        found: list[Any] = [None] * len(own)
        for group in similar(lengths):
            rows = (pad_sequence([of[i] for i in group], batch_first=True) for of in (own, wanted))
            losses = super().loss(*rows, reduction="none", **options)
            for i, row in zip(group, losses, strict=True):
                found[i] = row[: lengths[i]]
        losses = torch.cat(found)[None]
        return losses if reduction == "none" else losses.mean()
