"""Normalized attention: queries and keys from a shared z (normalized_qk.py), then attention (chunked_attention.py).

    q, k = normalized_qk(z, gamma, beta)      o = chunked_attention(q, k, v)

q and k are rounded to the dtype of z. The rotary position of a token is its index inside the chunk. Each sequence
starts its own chunks and rotary positions, at the position of its state if it has one.
"""

from torch import Tensor

from megalodon_ops.ops.chunked_attention.chunked_attention_reference import chunked_attention, chunked_attention_bwd
from megalodon_ops.ops.normalized_qk.normalized_qk_reference import normalized_qk, normalized_qk_bwd
from megalodon_ops.ops.common.spans import as_spans
from megalodon_ops.ops.common.states import AttentionState


def normalized_attention(
    z: Tensor,  # (B, L, H * K)
    v: Tensor,  # (B, L, H * V)
    gamma: Tensor,  # (2, H * K)
    beta: Tensor,  # (2, H * K)
    *,
    num_heads: int,
    chunk_size: int,
    causal: bool = True,
    rope_base: float = 10000.0,
    eps: float = 1e-5,
    state: AttentionState | None = None,
    return_state: bool = False,
    inplace_state: bool = False,
    dropkey: float = 0.0,
    dropkey_seed: Tensor | None = None,  # (1,) int64
    cu_seqlens: Tensor | None = None,  # (S + 1,)
    lengths: Tensor | None = None,  # (B,)
    starts: Tensor | None = None,  # (B,)
    spans: Tensor | None = None,  # (S, 2)
) -> Tensor | tuple[Tensor, AttentionState]:
    """Attend inside chunks with queries and keys from z: chunked_attention(*normalized_qk(z, gamma, beta), v).

    Returns o (B, L, H * V) and, with `return_state`, the rotated keys, values and position of the unfinished chunks.

    >>> import torch
    >>> z, v, zeros = torch.zeros(1, 2, 2), torch.tensor([[[2.0], [4.0]]]), torch.zeros(2, 2)
    >>> normalized_attention(z, v, zeros, zeros, num_heads=1, chunk_size=2).flatten().tolist()
    [2.0, 3.0]
    """
    spans = as_spans("normalized_attention", z, cu_seqlens, lengths, starts, spans)
    position = None if state is None else state.position
    normalized = dict(num_heads=num_heads, rope_base=rope_base, eps=eps, position=position, spans=spans)
    q, k = normalized_qk(z, gamma, beta, chunk_size=chunk_size, **normalized)
    masks = dict(causal=causal, dropkey=dropkey, dropkey_seed=dropkey_seed, spans=spans)
    states = dict(state=state, return_state=return_state, inplace_state=inplace_state)
    result = chunked_attention(q, k, v.unflatten(-1, (num_heads, -1)), chunk_size=chunk_size, **masks, **states)
    if not return_state:
        return result.flatten(-2)
    o, state = result
    return o.flatten(-2), state


def normalized_attention_bwd(
    do: Tensor,  # (B, L, H * V)
    z: Tensor,
    v: Tensor,
    gamma: Tensor,
    beta: Tensor,
    *,
    num_heads: int,
    chunk_size: int,
    causal: bool = True,
    rope_base: float = 10000.0,
    eps: float = 1e-5,
    state: AttentionState | None = None,
    dropkey: float = 0.0,
    dropkey_seed: Tensor | None = None,
    spans: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Apply the chain rule to both parts: do -> dq, dk, dv -> dz, dgamma, dbeta. Returns dz, dv, dgamma, dbeta."""
    position = None if state is None else state.position
    normalized = dict(num_heads=num_heads, rope_base=rope_base, eps=eps, position=position, spans=spans)
    q, k = normalized_qk(z, gamma, beta, chunk_size=chunk_size, **normalized)
    do, v = (x.unflatten(-1, (num_heads, -1)) for x in (do, v))
    masks = dict(causal=causal, dropkey=dropkey, dropkey_seed=dropkey_seed, spans=spans)
    dq, dk, dv = chunked_attention_bwd(do, q, k, v, chunk_size=chunk_size, state=state, **masks)
    dz, dgamma, dbeta = normalized_qk_bwd(dq, dk, z, gamma, beta, chunk_size=chunk_size, **normalized)
    return dz, dv.flatten(-2), dgamma, dbeta
