"""Adaptive working memory: a matrix for each head, written by earlier chunks (Gecko, arXiv 2601.06463, eqs. 17 to 23).

Chunks have C positions, as in chunked_attention.py. M (K, V) starts at 0. z (K,), the logarithm of the total weight
written to each row, starts at -inf. All positions of a chunk read M as it is before the chunk. When a chunk is
complete, it is written to M or, if attention sees two chunks, the previous chunk is:

    o_t = softmax(q_t) M
    w_i = log sum_t exp(k_ti)      z' = log(exp(z) + exp(w))      r = exp(w - z')           over the chunk's positions t
    P_ti = exp(k_ti - w_i)         F_t = softmax(k_t)             U = V - F M
    M' = (1 - r) M + r P^T U

So row i of M is a mean over the past, with weights exp(k_ti), of the part of the values that M did not predict. A
sequence that continues from a state first completes the state's chunk, with the state's keys and values.

dtypes: q, k, v, o and the state's k and v float32, float64, bfloat16 or float16; the rest float32 (float64 for
float64).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from megalodon_ops.ops.common.states import WorkingMemoryState, accumulation_dtype
from megalodon_ops.ops.common.spans import as_spans
from megalodon_ops.ops.common.reference_helpers import sequences


def adaptive_working_memory(
    q: Tensor,  # (B, L, H, K)
    k: Tensor,  # (B, L, H, K)
    v: Tensor,  # (B, L, H, V)
    *,
    chunk_size: int,
    visible_chunks: int = 1,
    state: WorkingMemoryState | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,  # (S + 1,)
    lengths: Tensor | None = None,  # (B,)
    starts: Tensor | None = None,  # (B,)
    spans: Tensor | None = None,  # (S, 2)
) -> Tensor | tuple[Tensor, WorkingMemoryState]:
    """Read M and write to it, chunk by chunk. Returns o (B, L, H, V) and, with `return_state`, the state.

    >>> q = torch.zeros(1, 4, 1, 1)
    >>> v = torch.tensor([1.0, 3.0, 0.0, 0.0]).view(1, 4, 1, 1)
    >>> adaptive_working_memory(q, q, v, chunk_size=2).flatten().tolist()
    [0.0, 0.0, 2.0, 2.0]
    """
    spans = as_spans("adaptive_working_memory", q, cu_seqlens, lengths, starts, spans)
    o, ends = torch.zeros_like(v), []
    for s, (row, tokens) in enumerate(sequences(q, spans)):
        positions = _on_grid(q[row, tokens], k[row, tokens], v[row, tokens], chunk_size, visible_chunks, state, s)
        M, z = _initial_memory(q, v, chunk_size, visible_chunks, state, s)
        read = []
        for chunk, written in _chunks(positions, chunk_size, visible_chunks):
            read.append(torch.einsum("thk,hkv->thv", chunk.q.softmax(-1), M))
            if written is not None:
                M, z = _write(M, z, written)
        o[row, tokens] = torch.cat([positions.v[:0], *read])[positions.cached :].to(v.dtype)
        ends.append((M, z, positions))
    return (o, _end_state(q, k, v, ends, chunk_size, visible_chunks, state)) if return_state else o


def adaptive_working_memory_bwd(
    do: Tensor,  # (B, L, H, V)
    dmemory: Tensor | None,  # (S, H, K, V)
    dmass: Tensor | None,  # (S, H, K)
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    chunk_size: int,
    visible_chunks: int = 1,
    state: WorkingMemoryState | None = None,
    spans: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Process the chunks in reverse with the gradients G of M' and g of z'. Returns dq, dk, dv, dmemory, dmass.

        M' = (1 - r) M + r N,  N = P^T U    ->   dN = r G      dr = sum_v G (N - M)      dM = (1 - r) G
        N = P^T U                           ->   dP = U dN^T   dU = P dN
        U = V - F M                         ->   dV = dU       dF = -dU M^T              dM += -F^T dU
        o = softmax(q) M                    ->   dM += softmax(q)^T do,  dq: do M^T through the softmax
        r = exp(w - z')                     ->   dw = dr r (1 - r) + g r                 dz = -dr r (1 - r) + g (1 - r)
        P_ti = exp(k_ti - w_i)              ->   dk = P (dP - sum_t P dP) + P dw + F (dF - sum_i F dF)

    Cached keys and values are constants.
    """
    dq, dk, dv = (torch.zeros_like(a) for a in (q, k, v))
    dstates = []
    for s, (row, tokens) in enumerate(sequences(q, spans)):
        positions = _on_grid(q[row, tokens], k[row, tokens], v[row, tokens], chunk_size, visible_chunks, state, s)
        M, z = _initial_memory(q, v, chunk_size, visible_chunks, state, s)
        do_s = torch.cat([positions.v.new_zeros(positions.cached, *v.shape[2:]), do[row, tokens].to(M.dtype)])
        before = []
        for read, written in _chunks(positions, chunk_size, visible_chunks):
            before.append((read, written, M, z))
            if written is not None:
                M, z = _write(M, z, written)
        G = torch.zeros_like(M) if dmemory is None else dmemory[s]
        g = torch.zeros_like(z) if dmass is None or bool((z == -torch.inf).any()) else dmass[s]
        grads = [torch.zeros_like(a) for a in positions[:3]]
        for number, (read, chunk, M, z) in reversed([*enumerate(before)]):
            if chunk is not None:
                first = (number - visible_chunks + 1) * chunk_size
                rows = slice(first, first + chunk_size)
                w = chunk.k.logsumexp(0)
                r = (w - torch.logaddexp(z, w)).exp()
                P, F = (chunk.k - w).exp(), chunk.k.softmax(-1)
                U = chunk.v - torch.einsum("thk,hkv->thv", F, M)
                N = torch.einsum("thk,thv->hkv", P, U)
                dN = r[..., None] * G
                dr = (G * (N - M)).sum(-1)
                dP = torch.einsum("thv,hkv->thk", U, dN)
                dU = torch.einsum("thk,hkv->thv", P, dN)
                dF = -torch.einsum("thv,hkv->thk", dU, M)
                dw = dr * r * (1 - r) + g * r
                g = -dr * r * (1 - r) + g * (1 - r)
                G = (1 - r)[..., None] * G - torch.einsum("thk,thv->hkv", F, dU)
                grads[1][rows] = P * (dP - (P * dP).sum(0) + dw) + F * (dF - (F * dF).sum(-1, keepdim=True))
                grads[2][rows] = dU
            rows = slice(number * chunk_size, number * chunk_size + len(read.q))
            Q = read.q.softmax(-1)
            do_c = do_s[rows]
            dQ = torch.einsum("thv,hkv->thk", do_c, M)
            grads[0][rows] = Q * (dQ - (Q * dQ).sum(-1, keepdim=True))
            G = G + torch.einsum("thk,thv->hkv", Q, do_c)
        for total, part in zip((dq, dk, dv), grads, strict=True):
            total[row, tokens] = part[positions.cached :].to(total.dtype)
        dstates.append((G, torch.where(z == -torch.inf, 0, g)))
    if not dstates:
        return dq, dk, dv, dmemory, dmass
    G, g = zip(*dstates, strict=True)
    return dq, dk, dv, torch.stack(G), torch.stack(g)


class _Positions(NamedTuple):
    """Positions of a sequence from the start of a chunk; the first `cached` ones come from the state."""

    q: Tensor  # (cached + n, H, K)
    k: Tensor
    v: Tensor
    cached: int


def _on_grid(
    q: Tensor, k: Tensor, v: Tensor, chunk_size: int, visible: int, state: WorkingMemoryState | None, s: int
) -> _Positions:
    real = accumulation_dtype(q.dtype)
    q, k, v = q.to(real), k.to(real), v.to(real)
    if state is None:
        return _Positions(q, k, v, 0)
    cached = _num_kept(int(state.position[s]), chunk_size, visible)
    k, v = (torch.cat([old[s, :cached].to(real), new]) for old, new in ((state.k, k), (state.v, v)))
    return _Positions(torch.cat([q.new_zeros(cached, *q.shape[1:]), q]), k, v, cached)


def _num_kept(seen: int, chunk_size: int, visible: int) -> int:
    """Return the number of positions that a state keeps: those of chunks that are not yet written."""
    return min(seen, (visible - 1) * chunk_size + seen % chunk_size)


def _initial_memory(
    q: Tensor, v: Tensor, chunk_size: int, visible: int, state: WorkingMemoryState | None, s: int
) -> tuple[Tensor, Tensor]:
    """Return M (H, K, V) and z (H, K) before the sequence's first position in this call."""
    if state is None:
        M = q.new_zeros(*q.shape[2:], v.shape[-1], dtype=accumulation_dtype(q.dtype))
        return M, M.new_full(M.shape[:2], -torch.inf)
    z = state.mass[s]
    return state.memory[s], torch.full_like(z, -torch.inf) if int(state.position[s]) < visible * chunk_size else z


def _chunks(positions: _Positions, chunk_size: int, visible: int) -> list[tuple[_Positions, _Positions | None]]:
    """Return pairs of a chunk that reads M and the chunk that is written after that, or None."""
    parts = (a.split(chunk_size) if len(a) else () for a in positions[:3])
    chunks = [_Positions(*chunk, cached=0) for chunk in zip(*parts, strict=True)]
    pairs = []
    for i, chunk in enumerate(chunks):
        is_completed = positions.cached < (i + 1) * chunk_size <= len(positions.q)
        pairs.append((chunk, chunks[i - visible + 1] if is_completed and i >= visible - 1 else None))
    return pairs


def _write(M: Tensor, z: Tensor, chunk: _Positions) -> tuple[Tensor, Tensor]:
    """Write a complete chunk to M. Returns the new M and z."""
    w = chunk.k.logsumexp(0)
    total = torch.logaddexp(z, w)
    r = (w - total).exp()[..., None]
    U = chunk.v - torch.einsum("thk,hkv->thv", chunk.k.softmax(-1), M)
    return (1 - r) * M + r * torch.einsum("thk,thv->hkv", (chunk.k - w).exp(), U), total


def _end_state(
    q: Tensor, k: Tensor, v: Tensor, ends: list[tuple[Tensor, Tensor, _Positions]], chunk_size: int, visible: int,
    state: WorkingMemoryState | None,
) -> WorkingMemoryState:  # fmt: skip
    """Return the state with the positions of chunks that are not yet written; its other rows are zero."""
    S, (H, K), V, real = len(ends), q.shape[2:], v.shape[-1], accumulation_dtype(q.dtype)
    memory, mass = q.new_zeros(S, H, K, V, dtype=real), q.new_zeros(S, H, K, dtype=real)
    keys, values = k.new_zeros(S, visible * chunk_size, H, K), v.new_zeros(S, visible * chunk_size, H, V)
    position = torch.zeros(S, dtype=torch.int64, device=q.device)
    for s, (M, z, positions) in enumerate(ends):
        before = 0 if state is None else int(state.position[s])
        position[s] = before - positions.cached + len(positions.q)
        memory[s] = M
        if position[s] >= visible * chunk_size:
            mass[s] = z
        kept = _num_kept(int(position[s]), chunk_size, visible)
        keys[s, :kept] = positions.k[len(positions.k) - kept :].detach().to(k.dtype)
        values[s, :kept] = positions.v[len(positions.v) - kept :].detach().to(v.dtype)
    return WorkingMemoryState(memory, mass, keys, position, values)
