"""Softmax attention inside chunks of C positions (arXiv 2404.08801, section 2), with DropKey (arXiv 2208.02646).

A sequence is divided into a grid of chunks. Query i, a row of the scores, sees the columns j <= i of its own chunk and,
if two chunks are visible (Gecko, arXiv 2601.06463), the columns of the previous one. If attention is not causal, as in
an encoder, row i sees all columns of its chunk:

    s_ij = scale q_i . k_j                     -inf for columns dropped by DropKey
    P_ij = exp(s_ij) / sum_j exp(s_ij)         zero if all columns were dropped
    o_i  = sum_j P_ij v_j

Only causal attention has states. After a given state, a sequence first completes the state's chunk: the state's
`position` keys are columns 0 .. position - 1, and token t is row position + t. The state's keys are those of the
unfinished chunk and, if two chunks are visible, of the previous one. q and k have K channels a head, v and o have V.

Keys and values of a state may have 8 bits. When a position enters the state, each of its vectors x gets a scale
s = max |x| / 127, and number x_i becomes s n_i with an integer n_i. The keys and values of the call itself are exact.
(This reference rounds s n_i to the dtype of q; kernels may leave that out.)

Forward and backward, a value that is not finite reaches the rows that see it, even with weight 0, and no other rows.

DropKey hides each key from each query with probability `dropkey`. The other scores are not rescaled: the softmax
renormalizes. The mask (philox.py) depends on seed, sequence, head, and row and column in the call, so a sequence that
is read in other pieces has another mask.

dtypes: q, k, v, o and the state float32, float64, bfloat16 or float16; scores, softmax and sums float32, or float64
for float64.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from megalodon_ops.ops.common.philox import draw_seed, dropkey_mask
from megalodon_ops.ops.common.quantized_rows import pack_rows, unpack_rows
from megalodon_ops.ops.common.reference_helpers import sequences
from megalodon_ops.ops.common.spans import as_spans
from megalodon_ops.ops.common.states import AttentionState, accumulation_dtype


def chunked_attention(
    q: Tensor,  # (B, L, H, K)
    k: Tensor,  # (B, L, H, K)
    v: Tensor,  # (B, L, H, V)
    *,
    chunk_size: int,
    visible_chunks: int = 1,
    causal: bool = True,
    scale: float = 1.0,
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
    """Attend inside each chunk: o_i = sum_j softmax_j(scale q_i . k_j) v_j over the columns j that row i sees.

    Returns o (B, L, H, V) and, with `return_state`, the state after each sequence's last position.
    The state is a constant, without gradients. `inplace_state` writes the new state into the given state's tensors.

    >>> q = torch.zeros(1, 3, 1, 2)
    >>> v = torch.tensor([2.0, 4.0, 6.0]).view(1, 3, 1, 1)
    >>> chunked_attention(q, q, v, chunk_size=2).flatten().tolist()
    [2.0, 3.0, 6.0]
    """
    if not causal and (state is not None or return_state):
        raise ValueError("chunked_attention: `causal` must be True where a state is given or returned.")
    spans = as_spans("chunked_attention", q, cu_seqlens, lengths, starts, spans)
    seed = int(draw_seed() if dropkey_seed is None else dropkey_seed) if dropkey > 0 else 0
    o, ends = torch.zeros_like(v), []
    for s, (row, tokens) in enumerate(sequences(q, spans)):
        new = k[row, tokens], v[row, tokens]
        q_s, k_s, v_s, position = _on_grid(q[row, tokens], *new, state, s)
        o_s = torch.zeros_like(v_s)  # (position + n, H, V)
        for rows, columns in _chunks(position, len(k_s), chunk_size, visible_chunks):
            P = _probabilities(q_s, k_s, rows, columns, causal, scale, dropkey, seed, s)
            o_s[rows] = _masked_sum(P, v_s[columns], _seen_mask(rows, columns, causal))
        o[row, tokens] = o_s[position:].to(v.dtype)
        ends.append(_kept_rows(*new, state, s))
    if not return_state:
        return o
    like = (k, v) if state is None else state[:2]
    new = _end_state(*like, ends, chunk_size, visible_chunks)
    if inplace_state:
        for old, value in zip(state, new, strict=True):
            old.copy_(value)
        new = state
    return o, new


def chunked_attention_bwd(
    do: Tensor,  # (B, L, H, V)
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    chunk_size: int,
    visible_chunks: int = 1,
    causal: bool = True,
    scale: float = 1.0,
    state: AttentionState | None = None,
    dropkey: float = 0.0,
    dropkey_seed: Tensor | None = None,
    spans: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Recompute the probabilities of each chunk and differentiate the softmax. Returns dq, dk, dv.

        o_i = sum_j P_ij v_j                   ->   dv_j = sum_i P_ij do_i         dP_ij = do_i . v_j
        P_ij = exp(s_ij) / sum_j exp(s_ij)     ->   ds_ij = P_ij (dP_ij - delta_i)
              as dP_ij/ds_im = P_ij (1[j=m] - P_im)      delta_i = sum_j P_ij dP_ij
        s_ij = scale q_i . k_j                 ->   dq_i = scale sum_j ds_ij k_j   dk_j = scale sum_i ds_ij q_i

    delta needs no probabilities: delta_i = sum_j P_ij (do_i . v_j) = do_i . o_i. A dropped score has P_ij = 0 and so no
    gradient; a row whose scores were all dropped has none. Cached keys and values are constants.
    """
    seed = int(dropkey_seed) if dropkey > 0 else 0
    real = accumulation_dtype(q.dtype)
    dq, dk, dv = (torch.zeros_like(a) for a in (q, k, v))
    for s, (row, tokens) in enumerate(sequences(q, spans)):
        q_s, k_s, v_s, position = _on_grid(q[row, tokens], k[row, tokens], v[row, tokens], state, s)
        do_s = torch.cat([v_s.new_zeros(position, *v_s.shape[1:]), do[row, tokens].to(real)])
        dq_s, dk_s, dv_s = (torch.zeros_like(a) for a in (q_s, k_s, v_s))
        for rows, columns in _chunks(position, len(k_s), chunk_size, visible_chunks):
            P = _probabilities(q_s, k_s, rows, columns, causal, scale, dropkey, seed, s)
            dP = torch.einsum("ihv,jhv->hij", do_s[rows], v_s[columns])
            delta = torch.where(P == 0, 0, P * dP).sum(-1, keepdim=True)
            dS = torch.where(P == 0, 0, P * (dP - delta))
            seen = _seen_mask(rows, columns, causal)
            dq_s[rows] = scale * _masked_sum(dS, k_s[columns], seen)
            dk_s[columns] += scale * _masked_sum(dS.mT, q_s[rows], seen.mT)
            dv_s[columns] += _masked_sum(P.mT, do_s[rows], seen.mT)
        for total, part in ((dq, dq_s), (dk, dk_s), (dv, dv_s)):
            total[row, tokens] = part[position:].to(total.dtype)
    return dq, dk, dv


def _on_grid(
    q: Tensor, k: Tensor, v: Tensor, state: AttentionState | None, s: int
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Return q, k, v (position + n, H, ...), the state's rows (zeros in q) before the n new ones, and `position`."""
    real = accumulation_dtype(q.dtype)
    if state is None:
        return q.to(real), k.to(real), v.to(real), 0
    position = int(state.position[s])
    q = torch.cat([q.new_zeros(position, *q.shape[1:]), q])
    cached = (unpack_rows(x).to(q.dtype) if x.dtype == torch.int8 else x for x in state[:2])
    k, v = (torch.cat([x[s, :position].detach().to(real), new.to(real)]) for x, new in zip(cached, (k, v)))
    return q.to(real), k, v, position


def _kept_rows(k: Tensor, v: Tensor, state: AttentionState | None, s: int) -> tuple[Tensor, Tensor]:
    """Return the cached and the n new keys and values, in the state's format, (position + n, H, ...)."""
    if state is None:
        return k.detach(), v.detach()
    kept = []
    for cache, new in ((state.k, k.detach()), (state.v, v.detach())):
        rows = pack_rows(new) if cache.dtype == torch.int8 else new
        kept.append(torch.cat([cache[s, : state.position[s]], rows]))
    return tuple(kept)


def _chunks(position: int, total: int, chunk_size: int, visible: int) -> Iterator[tuple[slice, slice]]:
    """Yield the new rows of each chunk that has some, and the columns of the chunks that they see."""
    for start in range(position // chunk_size * chunk_size, total, chunk_size):
        columns = slice(max(start - (visible - 1) * chunk_size, 0), min(start + chunk_size, total))
        yield slice(max(start, position), columns.stop), columns


def _probabilities(
    q: Tensor, k: Tensor, rows: slice, columns: slice, causal: bool, scale: float, dropkey: float, seed: int, s: int
) -> Tensor:
    """Return softmax(scale q k^T) for the rows and columns, (H, rows, columns)."""
    scores = scale * torch.einsum("ihk,jhk->hij", q[rows], k[columns])
    masked = (~_seen_mask(rows, columns, causal)).to(q.device).expand(scores.shape)
    if dropkey > 0:
        i = torch.arange(rows.start, rows.stop, device=q.device)
        j = torch.arange(columns.start, columns.stop, device=q.device)
        masked = masked | dropkey_mask(dropkey, seed, s, q.shape[1], i, j)
    return scores.masked_fill(masked, -torch.inf).softmax(-1).masked_fill(masked, 0)


def _seen_mask(rows: slice, columns: slice, causal: bool) -> Tensor:
    """Return (rows, columns) bools, True where the row sees the column."""
    last = torch.arange(rows.start, rows.stop) if causal else torch.full((rows.stop - rows.start,), columns.stop - 1)
    return torch.arange(columns.start, columns.stop) <= last[:, None]


def _masked_sum(weights: Tensor, terms: Tensor, seen: Tensor) -> Tensor:
    """Return sum_j weights_ij terms_j, (I, H, E), over the j that i sees.

    weights (H, I, J), terms (J, H, E). seen (I, J): True where i sees j.
    """
    finite = terms.isfinite()
    total = torch.einsum("hij,jhe->ihe", weights, terms.where(finite, 0))
    for j in (~finite).flatten(1).any(1).nonzero().flatten().tolist():
        i = seen[:, j].nonzero().flatten().to(terms.device)
        total = total.index_add(0, i, weights[:, i, j].T[..., None] * terms[j].where(~finite[j], 0))
    return total


def _end_state(
    k: Tensor, v: Tensor, ends: list[tuple[Tensor, Tensor]], chunk_size: int, visible: int
) -> AttentionState:
    """Return the state with the keys and values that the next position will see; its other rows are zero."""
    S = len(ends)
    state = AttentionState(
        k=k.new_zeros(S, visible * chunk_size, *k.shape[2:]),
        v=v.new_zeros(S, visible * chunk_size, *v.shape[2:]),
        position=torch.zeros(S, dtype=torch.int64, device=k.device),
    )
    for s, (k_s, v_s) in enumerate(ends):
        position = min(len(k_s), (visible - 1) * chunk_size + len(k_s) % chunk_size)
        first = len(k_s) - position
        state.k[s, :position] = k_s[first:]
        state.v[s, :position] = v_s[first:]
        state.position[s] = position
    return state
