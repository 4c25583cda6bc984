"""`adaptive_working_memory`: each position reads a matrix per head that summarizes all earlier chunks."""

import torch
from torch import Tensor

from ..common.arrays import call_with_arrays
from ..chunked_attention.chunked_attention import append, append_in_place
from ..common.definition import autocast, call, define_op, empty_like, launch
from ..common.flops import lengths_of, readable_values
from ..common.spans import as_spans, num_positions, num_sequences
from ..linear.linear import put_products_
from ..common.states import WorkingMemoryState, accumulation_dtype, state_fields
from ..common.checks import check_device, check_flag, check_rank, check_size, check_tensor
from .working_memory_plan import OP as _NAME, Index, Plan, matrices

_FEW_TOKENS = 32
"""On the CPU, calls with a state and at most this many tokens (B L) use the kernel for decoding"""


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
    starts: Tensor | None = None,
    spans: Tensor | None = None,
) -> Tensor | tuple[Tensor, WorkingMemoryState]:
    r"""Read a memory of earlier chunks; each chunk writes the part of its values that the memory did not predict.

    .. math::
        o_t &= \mathrm{softmax}(q_t)^\top M, \qquad
        M' = (1 - r) M + r\, P^\top (V - \Phi M) \quad \text{after each chunk} \\
        P &= \mathrm{softmax}_t(k), \quad \Phi = \mathrm{softmax}_K(k), \quad
        r = e^{w - z'}, \quad w = \log \textstyle\sum_t e^{k_t}, \quad z' = \log (e^z + e^w)

    Row i of M is a mean over past positions t, weighted by exp(k_ti), of the part of v_t that M did not predict; z_i is
    the logarithm of the sum of the weights. M starts at 0. Chunks are those of :func:`chunked_attention`, which attends
    to the position's own chunk.

    Args:
        q, k: (B, L, H, K) float32, float64, bfloat16 or float16, without rotary positions.
        v: (B, L, H, V) in q's dtype.
        chunk_size: C.
        visible_chunks: 1 or 2, the number of chunks that attention sees, the position's own included. With 2, a chunk
            is written one chunk later, when attention no longer sees it.
        state: the state that an earlier call returned; None: an empty memory.
        return_state: also return the state after each sequence's last position.
        cu_seqlens, lengths, starts, spans: sequences as in :func:`cema`.

    Returns:
        o (B, L, H, V), zero at tokens in no sequence and, for finite queries, in a sequence's first chunk; with
        `return_state` also the :class:`WorkingMemoryState`.

    Raises:
        ValueError: a shape or a value is wrong. TypeError: a dtype is wrong. Second derivatives are not supported.

    Every tensor has gradients except the state's k and v, which are constant in the backward. Softmax, M and z are
    float32 (float64 for float64). Operands of matrix products are rounded to q's dtype, except in the loop over chunks.
    The op consists of matrix products, 4 K V + 2 K^2 (1 + V / C) operations for each position and head. On the CPU a
    call of up to 32 tokens with a state is one kernel. The backward keeps only the inputs and recomputes the memory. On
    a GPU the host waits for the sequences' and the state's positions.

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
    chunk_size = check_size(_NAME, "chunk_size", chunk_size)
    visible_chunks = check_size(_NAME, "visible_chunks", visible_chunks)
    if visible_chunks > 2:
        raise ValueError(f"{_NAME}: `visible_chunks` must be 1 or 2, got {visible_chunks}.")
    check_flag(_NAME, "return_state", return_state)
    _check(q, k, v)
    spans = as_spans(_NAME, q, cu_seqlens, lengths, starts, spans)
    state = _check_state(state, q, v, visible_chunks * chunk_size, num_sequences(len(q), spans))
    o, memory, mass = read_and_write(q, k, v, chunk_size, visible_chunks, state, spans, return_state)
    if not return_state:
        return o
    cached = (None,) * 3
    if state is not None:
        cached = state.k, state.v, num_cached_rows(state.position, chunk_size, visible_chunks)
    k, v, _ = append(k, v, *cached, chunk_size, visible_chunks, spans)
    return o, WorkingMemoryState(memory, mass, k, end_position(q, state, spans), v)


def read_and_write(
    q: Tensor, k: Tensor, v: Tensor, chunk_size: int, visible_chunks: int, state: WorkingMemoryState | None,
    spans: Tensor | None, to_end: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return o, and the memory and mass after the last position, which are empty unless `to_end`. Checks nothing."""
    memory, mass, cache_k, position, cache_v = (None,) * 5 if state is None else state
    tensors = (q, k, v, memory, mass, cache_k, cache_v, position)
    return call(adaptive_working_memory_fwd, *tensors, chunk_size, visible_chunks, spans, to_end)


def read_write_and_keep(
    q: Tensor, k: Tensor, v: Tensor, chunk_size: int, visible_chunks: int, state: WorkingMemoryState | None,
    spans: Tensor | None, to_end: bool, inplace: bool = False,
    cached_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return :func:`read_and_write`'s results and the new state's k, which has no rows unless `to_end`.

    Args:
        inplace: write the new k into `state.k`.
        cached_rows: (S,) number of valid rows of `state.k`; None: computed from the position.
    """
    o, memory, mass = read_and_write(q, k, v, chunk_size, visible_chunks, state, spans, to_end)
    if not to_end:
        return o, memory, mass, k[:, :0]
    cached = (None,) * 3
    if state is not None:
        if cached_rows is None:
            cached_rows = num_cached_rows(state.position, chunk_size, visible_chunks)
        cached = state.k, state.v[..., :0].contiguous(), cached_rows.clone()
    new = k, v[..., :0], *cached, chunk_size, visible_chunks, spans
    if inplace and state is not None:
        append_in_place(*new)
        return o, memory, mass, state.k
    return o, memory, mass, append(*new)[0]


def num_cached_rows(position: Tensor, chunk_size: int, visible_chunks: int) -> Tensor:
    """Return (S,), the number of valid rows of keys and values in a state after `position` positions."""
    return torch.minimum(position, (visible_chunks - 1) * chunk_size + position % chunk_size)


def end_position(q: Tensor, state: WorkingMemoryState | None, spans: Tensor | None) -> Tensor:
    """Return (S,), the number of positions of each sequence so far, those of its state included."""
    counts = num_positions(q, spans)
    return counts if state is None else state.position + counts


class _Writer:
    """Update of M by each of the n chunks that are written: M' = M + X, where X = r (N - M) and N = P^T (V - F M).

    With A = P^T F, N = P^T V - A M. So X = E + D M, where E = r P^T V and D = -r (A + I). E and D do not depend on M:
    they are computed for all chunks at once, and only the calls of :meth:`write` are a loop over chunks.
    """

    def __init__(
        self, plan: Plan, k: Tensor, v: Tensor, cache_k: Tensor | None, cache_v: Tensor | None, z: Tensor
    ) -> None:
        """Compute E and D of all chunks, and update z (S, H, K) in place."""
        self.V = plan.take_written(v, cache_v)  # (n, H, C, V)
        logits = plan.take_written(k, cache_k).to(z.dtype)  # (n, H, C, K)
        top = logits.amax(-2, keepdim=True)
        self.P, self.F = (logits - top).exp_(), logits.softmax(-1)
        total = self.P.sum(-2, keepdim=True)
        self.P.div_(total)
        w = total.log_().add_(top).squeeze(-2)  # (n, H, K)
        after = w.index_fill(0, plan.absent, -torch.inf)
        for _, _, num_writes, writes in plan.turns:
            if num_writes:
                z[:num_writes] = after[writes] = torch.logaddexp(z[:num_writes], after[writes])
        self.r = (w - after).exp_()  # (n, H, K)
        self.r.index_fill_(0, plan.absent, 0)
        self.p, self.f = self.P.to(k.dtype), self.F.to(k.dtype)
        E = k.new_empty(*w.shape, v.shape[3])
        A = k.new_empty(*w.shape, w.shape[-1])
        for p, f, V, e, a in plan.writes.matrices(self.p, self.f, self.V, E, A):
            put_products_(e, p.mT, V)
            put_products_(a, p.mT, f)
        r = self.r[..., None]
        self.X = E.to(z.dtype).mul_(r)  # (n, H, K, V): E, to which `write` adds D M
        self.D = A.to(z.dtype).mul_(-r)  # (n, H, K, K)
        self.D.diagonal(dim1=-2, dim2=-1).sub_(self.r)

    def write(self, chunks: Index, M: Tensor) -> None:
        """Write `chunks`, one for each sequence of M (number of chunks, H, K, V)."""
        X, D, before = matrices(self.X[chunks], self.D[chunks], M)
        put_products_(X, D, before, add=True)
        M += self.X[chunks]


def _fwd(q, k, v, memory, mass, cache_k, cache_v, position, chunk_size, visible_chunks, spans, return_state):
    if q.is_cpu and position is not None and q.shape[0] * q.shape[1] <= _FEW_TOKENS:
        o = empty_like(v)
        M, z = (x.clone(memory_format=torch.contiguous_format) for x in (memory, mass))
        tensors = (x.contiguous() for x in (q, k, v, cache_k, cache_v, position))
        launch("working_memory_steps", *tensors, chunk_size, visible_chunks, spans, M, z, o)
        return o, *((M, z) if return_state else (M.new_empty(0), z.new_empty(0)))
    plan = Plan(q, chunk_size, visible_chunks, position, spans, return_state)
    M, z = plan.start(q, v, memory, mass)
    writer = _Writer(plan, k, v, cache_k, cache_v, z)
    queries = plan.reads.take(q).to(M.dtype).softmax(-1).to(q.dtype)
    M_of_reads = queries.new_empty(*queries.shape[:-2], *M.shape[2:])  # M that each chunk reads
    for num_reads, reads, num_writes, writes in plan.turns:
        M_of_reads[reads] = M[:num_reads]
        if num_writes:
            writer.write(writes, M[:num_writes])
    o, chunks = plan.reads.empty(v)
    for Q, M_read, out in plan.reads.matrices(queries, M_of_reads, chunks):
        put_products_(out, Q, M_read)
    ends = plan.end(M, z) if return_state else (M.new_empty(0), M.new_empty(0))
    return plan.reads.put(o, chunks), *ends


def _fwd_fake(q, k, v, *others):
    *_, spans, return_state = others
    mass_shape = (num_sequences(len(q), spans), *q.shape[2:])
    shapes = ((*mass_shape, v.shape[3]), mass_shape) if return_state else (0, 0)
    return empty_like(v), *(q.new_empty(shape, dtype=accumulation_dtype(q.dtype)) for shape in shapes)


def _bwd(
    do, dmemory_out, dmass_out, q, k, v, memory, mass, cache_k, cache_v, position, chunk_size, visible_chunks, spans
):  # fmt: skip
    """Differentiate the formulas of adaptive_working_memory_reference.py, with A = P^T F and N = P^T V - A M.

        dA = -dN M^T     dP = V dN^T + F dA^T     dF = P dA     dV = P dN
        dM = dM' + D^T dM'                        r (1 - r) dr = (1 - r) sum_v dM' X

    If dmemory_out and dmass_out are None, the end state was not used.
    """
    to_end = dmemory_out is not None or dmass_out is not None
    plan = Plan(q, chunk_size, visible_chunks, position, spans, to_end)
    M, z = plan.start(q, v, memory, mass)
    writer = _Writer(plan, k, v, cache_k, cache_v, z)
    weights = plan.reads.take(q).to(M.dtype).softmax(-1)
    queries = weights.to(q.dtype)
    do = plan.reads.take(torch.zeros_like(v) if do is None else do)
    M_of_reads = q.new_empty(*weights.shape[:-2], *M.shape[2:])
    dM_of_reads = torch.empty_like(M_of_reads)
    replaced = q.new_empty(writer.X.shape)  # M before each write
    for num_reads, reads, num_writes, writes in plan.turns:
        M_of_reads[reads] = M[:num_reads]
        if num_writes:
            replaced[writes] = M[:num_writes]
            writer.write(writes, M[:num_writes])
    dqueries = torch.empty_like(queries)
    for dO, Q, M_read, dQ, dM in plan.reads.matrices(do, queries, M_of_reads, dqueries, dM_of_reads):
        put_products_(dQ, dO, M_read.mT)
        put_products_(dM, Q.mT, dO)
    G, g = plan.start_of_backward(M, dmemory_out, dmass_out)
    dM = torch.empty_like(writer.X)  # gradient of M after each write
    for num_reads, reads, num_writes, writes in reversed(plan.turns):
        if num_writes:
            dM[writes] = G[:num_writes]
            dbefore_write, D, dafter = matrices(G[:num_writes], writer.D[writes], dM[writes])
            put_products_(dbefore_write, D.mT, dafter, add=True)
        G[:num_reads] += dM_of_reads[reads]
    r = writer.r
    r_part = (1 - r) * writer.X.mul_(dM).sum(-1)  # dr r (1 - r)
    dw = torch.empty_like(r)
    for _, _, num_writes, writes in reversed(plan.turns):
        if num_writes:
            dw[writes] = g[:num_writes]
            g[:num_writes] -= g[:num_writes] * r[writes] + r_part[writes]
    dw.mul_(r).add_(r_part)
    dN = dM.mul_(r[..., None]).to(q.dtype)
    dV, dV_chunks = plan.writes.empty(v)
    dP = q.new_empty(writer.P.shape)
    dF = torch.empty_like(dP)
    dA_transposed = q.new_empty(writer.D.shape)
    tensors = writer.p, writer.f, writer.V, replaced, dN, dA_transposed, dP, dF, dV_chunks
    for p, f, V, M_written, dn, da_transposed, dp, df, dv in plan.writes.matrices(*tensors):
        put_products_(da_transposed, M_written, dn.mT)
        da_transposed.neg_()
        put_products_(dp, V, dn.mT)
        put_products_(dp, f, da_transposed, add=True)
        put_products_(df, p, da_transposed.mT)
        put_products_(dv, p, dn)
    dq = torch._softmax_backward_data(dqueries.to(weights.dtype), weights, -1, weights.dtype)
    dk = torch._softmax_backward_data(dP.to(weights.dtype), writer.P, -2, weights.dtype)
    dk.addcmul_(writer.P, dw[..., None, :])
    dk += torch._softmax_backward_data(dF.to(weights.dtype), writer.F, -1, weights.dtype)
    gradients = []
    for chunks, like, gradient in ((plan.reads, q, dq), (plan.writes, k, dk)):
        whole, target = chunks.empty(like)
        gradients.append(chunks.put(whole, target.copy_(gradient)))
    dstate = (q.new_empty(0), q.new_empty(0)) if memory is None else plan.end_of_backward(G, g)
    return *gradients, plan.writes.put(dV, dV_chunks), *dstate


_TENSORS = (
    "Tensor q, Tensor k, Tensor v, Tensor? memory, Tensor? mass, Tensor? cache_k, Tensor? cache_v, Tensor? position, "
    "int chunk_size, int visible_chunks, Tensor? spans"
)


def _flops(q, v, position, chunk_size, visible_chunks, spans, return_state):
    H, K, V = *q.shape[2:], v.shape[3]
    read, written = _position_counts(q, position, chunk_size, visible_chunks, spans, return_state)
    return 2 * H * (read * K * V + written * K * (K + V) + written // chunk_size * K * K * V)


def _bwd_flops(q, v, position, chunk_size, visible_chunks, spans, dmemory_out, dmass_out):
    H, K, V = *q.shape[2:], v.shape[3]
    to_end = dmemory_out is not None or dmass_out is not None
    read, written = _position_counts(q, position, chunk_size, visible_chunks, spans, to_end)
    return 2 * H * (2 * read * K * V + 3 * written * K * (K + V) + 3 * (written // chunk_size) * K * K * V)


def _position_counts(
    q: Tensor, position: Tensor | None, chunk_size: int, visible: int, spans: Tensor | None, to_end: bool
) -> tuple[int, int]:
    """Return the numbers of positions that read M and that are written to M.

    Without `to_end`, only chunks that a later position reads are written.
    """
    counts = lengths_of(q, spans)
    seen = readable_values(position, [0] * len(counts))
    ends = [before % chunk_size + count for before, count in zip(seen, counts)]
    written = [(end if to_end else max(end - 1, 0)) // chunk_size * chunk_size for end in ends]
    late = (visible - 1) * chunk_size if position is None else 0  # last complete chunk, not written yet
    return sum(counts), sum(max(n - late, 0) for n in written)


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


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
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
