"""`adaptive_working_memory`: each position reads a memory of all earlier chunks, a matrix per head."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.arrays import call_with_arrays
from ..chunked_attention.chunked_attention import chunked_attention_state, chunked_attention_state_
from ..common.definition import accumulation_dtype, autocast, call, define_op, empty_like
from ..common.definition import int64_or_none, launch, num_sequences, num_positions
from ..common.flops import lengths_of, readable_values
from ..common.states import WorkingMemoryState, state_fields
from ..chunked_attention.two_chunk_attention import two_chunk_attention_state, two_chunk_attention_state_
from ..common.checks import check_device, check_flag, check_rank, check_sequences, check_size, check_tensor
from .working_memory_plan import OP as _NAME, Plan, length

_FEW_TOKENS = 32
"""Calls with a state and at most this many tokens use the CPU kernel for decoding"""


def adaptive_working_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    chunk_size: int,
    visible_chunks: int = 1,
    state: WorkingMemoryState | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor | tuple[Tensor, WorkingMemoryState]:
    r"""Read a memory of earlier chunks; each chunk writes the part of its values that the memory did not predict.

    .. math::
        o_t &= \mathrm{softmax}(q_t)^\top M, \qquad
        M' = (1 - r) M + r\, P^\top (V - \Phi M) \quad \text{after each chunk} \\
        P &= \mathrm{softmax}_t(k), \quad \Phi = \mathrm{softmax}_K(k), \quad
        r = e^{w - z'}, \quad w = \log \textstyle\sum_t e^{k_t}, \quad z' = \log (e^z + e^w)

    Row i of M is the mean, over past positions t, of the part of v_t that M did not predict, weighted by exp(k_ti); z
    is the logarithm of the sum of the weights. Chunks are those of :func:`chunked_attention`, which attends to the
    position's own chunk.

    Args:
        q, k: (B, L, H, K) float32, float64, bfloat16 or float16, without rotary positions.
        v: (B, L, H, V) in q's dtype.
        chunk_size: C.
        visible_chunks: 1 or 2, the number of chunks that attention sees, the position's own included. For 2, each chunk
            is written one chunk later, when attention no longer sees it.
        state: the state that an earlier call returned; None: an empty memory.
        return_state: also return the state after each sequence's last position.
        cu_seqlens, lengths: sequences as in :func:`cema`.

    Returns:
        o (B, L, H, V), zero at tokens in no sequence and, for finite queries, in a sequence's first chunk; with
        `return_state` also the :class:`WorkingMemoryState`.

    Raises:
        ValueError: a shape or a value is wrong. TypeError: a dtype is wrong. Second derivatives are not supported.

    Gradients go to every tensor but the state's k and v, which are constant in the backward. Softmax, M and z are
    float32 (float64 for float64); operands of matrix products are rounded to q's dtype. The op is a loop of torch's
    matrix products over chunks: 6 K V operations for each position and head. On the CPU a call of up to 32 tokens with
    a state is one kernel. Only the inputs are kept for the backward, which recomputes the memory. On a GPU the host
    waits for `cu_seqlens`, `lengths` and the state's positions.

    Arrays of other libraries: see :mod:`megalodon_ops.ops.common.arrays`.

    Source: Gecko, arXiv 2601.06463, and the released code, in which attention sees two chunks and the memory contains
    those before them. The mathematics: :func:`megalodon_ops.reference.adaptive_working_memory`.

    Example:
        >>> import torch, megalodon_ops as mo
        >>> q = k = torch.zeros(1, 6, 1, 2)  # equal weights: the mean of all earlier chunks
        >>> v = torch.tensor([1.0, 3.0, 5.0, 5.0, 0.0, 0.0]).reshape(1, 6, 1, 1)
        >>> mo.adaptive_working_memory(q, k, v, chunk_size=2).flatten()
        tensor([0.0000, 0.0000, 2.0000, 2.0000, 2.5000, 2.5000])
    """
    if not isinstance(q, Tensor):
        return call_with_arrays(adaptive_working_memory, **locals())
    check_tensor(_NAME, "k", k)
    check_tensor(_NAME, "v", v)
    q, k, v = autocast(q, k, v)
    chunk_size, visible_chunks = (
        check_size(_NAME, name, value)
        for name, value in (("chunk_size", chunk_size), ("visible_chunks", visible_chunks))
    )
    if visible_chunks > 2:
        raise ValueError(f"{_NAME}: `visible_chunks` must be 1 or 2, got {visible_chunks}.")
    check_flag(_NAME, "return_state", return_state)
    cu_seqlens, lengths = int64_or_none(cu_seqlens), int64_or_none(lengths)
    _check(q, k, v, cu_seqlens, lengths)
    state = _check_state(state, q, v, visible_chunks * chunk_size, num_sequences(len(q), cu_seqlens))
    o, memory, mass = read_and_write(q, k, v, chunk_size, visible_chunks, state, cu_seqlens, lengths, return_state)
    if not return_state:
        return o
    cached = (
        (None,) * 3
        if state is None
        else (state.k, state.v, num_cached_rows(state.position, chunk_size, visible_chunks))
    )
    append = two_chunk_attention_state if visible_chunks == 2 else chunked_attention_state
    k, v, _ = call(append, k.detach(), v.detach(), *cached, chunk_size, cu_seqlens, lengths)
    return o, WorkingMemoryState(memory, mass, k, end_position(q, state, cu_seqlens, lengths), v)


def read_and_write(
    q: Tensor, k: Tensor, v: Tensor, chunk_size: int, visible_chunks: int, state: WorkingMemoryState | None,
    cu_seqlens: Tensor | None, lengths: Tensor | None, to_end: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return o and, if `to_end`, the memory and mass after the last position, else empty ones. Checks nothing."""
    memory, mass, cache_k, position, cache_v = (None,) * 5 if state is None else state
    tensors = (q, k, v, memory, mass, cache_k, cache_v, position)
    return call(adaptive_working_memory_fwd, *tensors, chunk_size, visible_chunks, cu_seqlens, lengths, to_end)


def read_write_and_keep(
    q: Tensor, k: Tensor, v: Tensor, chunk_size: int, visible_chunks: int, state: WorkingMemoryState | None,
    cu_seqlens: Tensor | None, lengths: Tensor | None, to_end: bool, inplace: bool = False,
    cached_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return :func:`read_and_write`'s results and, if `to_end`, the new state's k, written in place if `inplace`.

    cached_rows: (S,) valid rows of the state's k, if the caller has them.
    """
    cu_seqlens, lengths = int64_or_none(cu_seqlens), int64_or_none(lengths)
    o, memory, mass = read_and_write(q, k, v, chunk_size, visible_chunks, state, cu_seqlens, lengths, to_end)
    if not to_end:
        return o, memory, mass, k[:, :0]
    cached = (None,) * 3
    if state is not None:
        if cached_rows is None:
            cached_rows = num_cached_rows(state.position, chunk_size, visible_chunks)
        cached = state.k, state.v[..., :0].contiguous(), cached_rows.clone()
    new = k.detach(), v[..., :0].detach()
    if inplace and state is not None:
        append = two_chunk_attention_state_ if visible_chunks == 2 else chunked_attention_state_
        append(*new, *cached, chunk_size, cu_seqlens, lengths)
        return o, memory, mass, state.k
    append = two_chunk_attention_state if visible_chunks == 2 else chunked_attention_state
    return o, memory, mass, append(*new, *cached, chunk_size, cu_seqlens, lengths)[0]


def num_cached_rows(position: Tensor, chunk_size: int, visible_chunks: int) -> Tensor:
    """(S,) number of valid rows of keys and values in a state after `position` positions."""
    return torch.minimum(position, (visible_chunks - 1) * chunk_size + position % chunk_size)


def end_position(
    q: Tensor, state: WorkingMemoryState | None, cu_seqlens: Tensor | None, lengths: Tensor | None
) -> Tensor:
    """(S,) number of positions of each sequence so far, those of its state included."""
    counts = num_positions(q, cu_seqlens, lengths)
    return counts.clone() if state is None else state.position + counts  # counts may be the caller's lengths


class _Writer:
    """Weights and values of the n chunks that are written; :meth:`write` writes those of one turn (:class:`Plan`)."""

    def __init__(
        self, plan: Plan, k: Tensor, v: Tensor, cache_k: Tensor | None, cache_v: Tensor | None, z: Tensor
    ) -> None:
        """Update z (S H, K) in place."""
        self.U = plan.take_written(v, cache_v)  # (n H, C, V): v; `write` replaces it by U = V - F M
        logits = plan.take_written(k, cache_k).to(z.dtype)  # (n H, C, K)
        w = logits.logsumexp(1)  # (n H, K)
        added = w.index_fill(0, plan.absent, -torch.inf)
        self.r = torch.empty_like(w)
        for at in plan.writes.turns:
            before = z[: length(at)]
            total = torch.logaddexp(before, added[at])
            self.r[at] = (added[at] - total).exp_()
            before.copy_(total)
        self.r.index_fill_(0, plan.absent, 0)
        self.P, self.F = (logits - w[:, None]).exp_(), logits.softmax(-1)
        self.p, self.f = self.P.to(k.dtype), self.F.to(k.dtype)
        self._plan = plan

    def write(self, turn: int, M: Tensor) -> Tensor:
        """Write the turn's chunks to M (S H, K, V); return N = P^T U (n H, K, V)."""
        at = self._plan.writes.turns[turn]
        U, M = self.U[at], M[: length(at)]
        if not self._plan.is_empty(turn):
            U.baddbmm_(self.f[at], M.to(U.dtype), alpha=-1)
        N = (self.p[at].mT @ U).to(M.dtype)
        M.lerp_(N, self.r[at][..., None].expand_as(N))
        return N


def _fwd(
    q, k, v, memory, mass, cache_k, cache_v, position, chunk_size, visible_chunks, cu_seqlens, lengths, return_state
):
    if q.is_cpu and position is not None and q.shape[0] * q.shape[1] <= _FEW_TOKENS:
        o, M, z = empty_like(v), *(x.clone(memory_format=torch.contiguous_format) for x in (memory, mass))
        tensors = (x.contiguous() for x in (q, k, v, cache_k, cache_v, position))
        launch("working_memory_steps", *tensors, chunk_size, visible_chunks, cu_seqlens, lengths, M, z, o)
        return o, *((M, z) if return_state else (M.new_empty(0), z.new_empty(0)))
    plan = Plan(q, chunk_size, visible_chunks, position, cu_seqlens, lengths, return_state)
    M, z = plan.start(q, v, memory, mass)
    writer = _Writer(plan, k, v, cache_k, cache_v, z)
    queries = plan.reads.take(q).to(M.dtype).softmax(-1).to(q.dtype)
    o = queries.new_empty(*queries.shape[:2], v.shape[3])
    for turn, (reads, _) in enumerate(plan.turns):
        torch.bmm(queries[reads], M[: length(reads)].to(q.dtype), out=o[reads])
        writer.write(turn, M)
    ends = plan.end(M, z) if return_state else (M.new_empty(0), M.new_empty(0))
    return plan.reads.put(o, v), *ends


def _fwd_fake(q, k, v, *others):
    *_, cu_seqlens, _, return_state = others
    mass_shape = (num_sequences(len(q), cu_seqlens), *q.shape[2:])
    shapes = ((*mass_shape, v.shape[3]), mass_shape) if return_state else (0, 0)
    return empty_like(v), *(q.new_empty(shape, dtype=accumulation_dtype(q.dtype)) for shape in shapes)


def _bwd(
    do, dmemory_out, dmass_out, q, k, v, memory, mass, cache_k, cache_v, position, chunk_size, visible_chunks, cu_seqlens, lengths
):  # fmt: skip
    """Formulas: adaptive_working_memory_reference.py. Without dmemory_out and dmass_out, the end state is unused."""
    to_end, dtype = dmemory_out is not None or dmass_out is not None, q.dtype
    plan = Plan(q, chunk_size, visible_chunks, position, cu_seqlens, lengths, to_end)
    M, z = plan.start(q, v, memory, mass)
    writer = _Writer(plan, k, v, cache_k, cache_v, z)
    before, written = [], []
    for turn, (reads, writes) in enumerate(plan.turns):
        before.append(M[: max(length(reads), length(writes))].clone())
        written.append(writer.write(turn, M))
    read = plan.reads.take(q).to(M.dtype).softmax(-1)
    queries, do = read.to(dtype), plan.reads.take(torch.zeros_like(v) if do is None else do)
    dqueries, dP, dF, dU = map(torch.empty_like, (queries, writer.p, writer.f, writer.U))
    dw = torch.empty_like(writer.r)
    G, g = plan.start_of_backward(M, dmemory_out, dmass_out)
    for turn, (reads, writes) in reversed([*enumerate(plan.turns)]):
        M, N, r, n = before[turn], written[turn], writer.r[writes], length(writes)
        dN, dr = (r[..., None] * G[:n]).to(dtype), (G[:n] * (N - M[:n])).sum(-1) * r * (1 - r)
        torch.bmm(writer.U[writes], dN.mT, out=dP[writes])
        torch.bmm(writer.p[writes], dN, out=dU[writes])
        dw[writes] = g[:n] * r + dr
        if plan.is_empty(turn):
            dF[writes] = 0
        else:
            torch.bmm(dU[writes], M[:n].to(dtype).mT, out=dF[writes])
            G[:n].mul_(1 - r[..., None]).sub_(writer.f[writes].mT @ dU[writes])
            g[:n].mul_(1 - r).sub_(dr)
        n = length(reads)
        torch.bmm(do[reads], M[:n].to(dtype).mT, out=dqueries[reads])
        G[:n].add_(queries[reads].mT @ do[reads])
    dq = torch._softmax_backward_data(dqueries.to(read.dtype), read, 2, read.dtype)
    dk = torch._softmax_backward_data(dP.to(read.dtype), writer.P, 1, read.dtype).addcmul_(writer.P, dw[:, None])
    dk -= torch._softmax_backward_data(dF.to(read.dtype), writer.F, 2, read.dtype)
    dstate = (q.new_empty(0), q.new_empty(0)) if memory is None else plan.end_of_backward(G, g)
    return plan.reads.put(dq, q), plan.writes.put(dk, k), plan.writes.put(dU, v), *dstate


_TENSORS = (
    "Tensor q, Tensor k, Tensor v, Tensor? memory, Tensor? mass, Tensor? cache_k, Tensor? cache_v, Tensor? position, "
    "int chunk_size, int visible_chunks, Tensor? cu_seqlens, Tensor? lengths"
)


def _flops(q, v, position, chunk_size, visible_chunks, cu_seqlens, lengths, return_state):
    read, predicted, written = _position_counts(
        q, position, chunk_size, visible_chunks, cu_seqlens, lengths, return_state
    )
    return 2 * (read + predicted + written) * q.shape[2] * q.shape[3] * v.shape[3]


def _bwd_flops(q, v, position, chunk_size, visible_chunks, cu_seqlens, lengths, dmemory_out, dmass_out):
    to_end = dmemory_out is not None or dmass_out is not None
    read, predicted, written = _position_counts(q, position, chunk_size, visible_chunks, cu_seqlens, lengths, to_end)
    return 2 * (2 * read + 3 * (predicted + written)) * q.shape[2] * q.shape[3] * v.shape[3]


def _position_counts(
    q: Tensor,
    position: Tensor | None,
    chunk_size: int,
    visible: int,
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
    to_end: bool,
) -> tuple[int, int, int]:
    """Numbers of positions that read M, for which Phi M is computed, and that are written to M.

    Without `to_end`, chunks that no position reads are not written; for an empty M, Phi M is not computed.
    """
    counts = lengths_of(q, cu_seqlens, lengths)
    seen = readable_values(position, [0] * len(counts))
    ends = [before % chunk_size + count for before, count in zip(seen, counts)]
    written = [(end if to_end else max(end - 1, 0)) // chunk_size * chunk_size for end in ends]
    late = (visible - 1) * chunk_size  # positions at a sequence's end that are not written yet
    written = [max(n - late, 0) if position is None else n for n in written]
    predicted = [max(n - chunk_size, 0) if position is None else n for n in written]
    return sum(counts), sum(predicted), sum(written)


adaptive_working_memory_bwd = define_op(
    f"adaptive_working_memory_bwd(Tensor? do, Tensor? dmemory_out, Tensor? dmass_out, {_TENSORS}) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dmemory, Tensor dmass)",
    kernel=_bwd,
    flops=_bwd_flops,
)
adaptive_working_memory_fwd = define_op(
    f"adaptive_working_memory_fwd({_TENSORS}, bool return_state) -> (Tensor o, Tensor memory_out, Tensor mass_out)",
    kernel=_fwd,
    fake=_fwd_fake,
    backward=adaptive_working_memory_bwd,
    flops=_flops,
)


def _check(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, lengths: Tensor | None) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_rank(_NAME, name, x, "(B, L, H, V)" if name == "v" else "(B, L, H, K)", 4)
        check_device(_NAME, name, x, q)
        if not x.is_floating_point() or x.dtype != q.dtype:
            raise TypeError(
                f"{_NAME}: `{name}` must be floating point and of one dtype with `q`, {q.dtype}, got {x.dtype}."
            )
    if k.shape != q.shape:
        raise ValueError(f"{_NAME}: `k` must have q's shape {tuple(q.shape)}, got {tuple(k.shape)}.")
    if v.shape[:3] != q.shape[:3]:
        raise ValueError(
            f"{_NAME}: `v` must have shape (B, L, H, V) beside a q of {tuple(q.shape)}, got {tuple(v.shape)}."
        )
    check_sequences(_NAME, q, cu_seqlens, lengths)


def _check_state(state: WorkingMemoryState | None, q: Tensor, v: Tensor, C: int, S: int) -> WorkingMemoryState | None:
    if state is None:
        return None
    state = WorkingMemoryState(*state_fields(_NAME, state, WorkingMemoryState))
    (H, K), V, real = q.shape[2:], v.shape[3], accumulation_dtype(q.dtype)
    wanted = {
        "memory": ((S, H, K, V), real),
        "mass": ((S, H, K), real),
        "k": ((S, C, H, K), q.dtype),
        "position": ((S,), torch.int64),
        "v": ((S, C, H, V), q.dtype),
    }
    for field, (shape, dtype) in wanted.items():
        tensor = getattr(state, field)
        check_tensor(_NAME, f"state.{field}", tensor)
        check_device(_NAME, f"state.{field}", tensor, q)
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{_NAME}: `state.{field}` must have shape {shape}, got {tuple(tensor.shape)}.")
        if tensor.dtype != dtype:
            raise TypeError(f"{_NAME}: `state.{field}` must be {dtype}, got {tensor.dtype}.")
        if field in ("k", "v") and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{_NAME}: `state.{field}` must not require gradients, it is constant in the backward; detach it."
            )
    return state
