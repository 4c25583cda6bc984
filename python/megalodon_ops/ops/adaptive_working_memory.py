"""`adaptive_working_memory`: what each step reads of the chunks before its own, from a matrix a head."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .arrays import call_with_arrays
from .chunked_attention import chunked_attention_state
from .library import accumulation_dtype, autocast, call, define_op, empty_like, int64_or_none, num_sequences
from .states import WorkingMemoryState, fields_of
from .values import check_device, check_flag, check_rank, check_sequences, check_size, check_tensor, shown

_NAME = "adaptive_working_memory"


def adaptive_working_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    chunk_size: int,
    state: WorkingMemoryState | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor | tuple[Tensor, WorkingMemoryState]:
    r"""Reads a memory of all chunks before a step's own, which each chunk writes with what the memory did not know.

    .. math::
        o_t &= \mathrm{softmax}(q_t)^\top M, \qquad
        M' = (1 - r) M + r\, P^\top (V - \Phi M) \quad \text{after each chunk} \\
        P &= \mathrm{softmax}_t(k), \quad \Phi = \mathrm{softmax}_K(k), \quad
        r = e^{w - z'}, \quad w = \log \textstyle\sum_t e^{k_t}, \quad z' = \log (e^z + e^w)

    Row i of M is a mean over the past with weights exp(k_ti), of what M did not know; z is the logarithm of the sum of
    these weights. Chunks lie as in :func:`chunked_attention`, which sees the step's own chunk.

    Args:
        q, k: (B, L, H, K) float32, float64, bfloat16 or float16, without rotary positions.
        v: (B, L, H, V) in q's dtype.
        chunk_size: C.
        state: what an earlier call returned; None: an empty memory.
        return_state: also return the state after each sequence's last step.
        cu_seqlens, lengths: sequences as in :func:`cema`.

    Returns:
        o (B, L, H, V), zero in a sequence's first chunk and at tokens in no sequence; with `return_state` also the
        :class:`WorkingMemoryState`.

    Raises:
        ValueError: a shape or a value is wrong. TypeError: a dtype is wrong. Second derivatives are not supported.

    Gradients go to every tensor but the state's k and v, which are constant in the backward. Softmax, M and z are float32
    (float64 for float64), factors of products are rounded to q's dtype. The op is a loop of torch's matrix products over
    chunks, on every device: 6 K V operations a step and head. Its inputs are all that is kept for the backward, which
    writes the memory again. On a GPU the host waits for the sequences' ends, where they are given, and the positions.


    Arrays of other libraries: see :mod:`megalodon_ops.ops.arrays`.

    Source: Gecko, arXiv 2601.06463, and the released code, where attention sees two chunks and the memory, therefore,
    those before them. The mathematics: :func:`megalodon_ops.reference.adaptive_working_memory`.

    Example:
        >>> import torch, megalodon_ops as mo
        >>> q = k = torch.zeros(1, 6, 1, 2)  # equal weights: the mean of all chunks before
        >>> v = torch.tensor([1.0, 3.0, 5.0, 5.0, 0.0, 0.0]).reshape(1, 6, 1, 1)
        >>> mo.adaptive_working_memory(q, k, v, chunk_size=2).flatten()
        tensor([0.0000, 0.0000, 2.0000, 2.0000, 2.5000, 2.5000])
    """
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
        return call_with_arrays(adaptive_working_memory, **locals())
    q, k, v = autocast(q, k, v)
    chunk_size = check_size(_NAME, "chunk_size", chunk_size)
    check_flag(_NAME, "return_state", return_state)
    cu_seqlens, lengths = int64_or_none(cu_seqlens), int64_or_none(lengths)
    _check(q, k, v, cu_seqlens, lengths)
    state = _checked(state, q, v, chunk_size, num_sequences(len(q), cu_seqlens))
    o, memory, mass = read_and_write(q, k, v, chunk_size, state, cu_seqlens, lengths)
    if not return_state:
        return o
    kept = (None,) * 3 if state is None else (state.k, state.v, state.position % chunk_size)
    k, v, _ = call(chunked_attention_state, k.detach(), v.detach(), *kept, chunk_size, cu_seqlens, lengths)
    return o, WorkingMemoryState(memory, mass, k, end_position(q, state, cu_seqlens, lengths), v)


def read_and_write(
    q: Tensor, k: Tensor, v: Tensor, chunk_size: int, state: WorkingMemoryState | None, cu_seqlens: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """o, memory and mass of arguments that were checked."""
    memory, mass, cache_k, position, cache_v = (None,) * 5 if state is None else state
    return call(
        adaptive_working_memory_fwd, q, k, v, memory, mass, cache_k, cache_v, position, chunk_size, cu_seqlens, lengths
    )


def end_position(
    q: Tensor, state: WorkingMemoryState | None, cu_seqlens: Tensor | None, lengths: Tensor | None
) -> Tensor:
    """(S,) the steps that each sequence has seen."""
    steps = torch.full((len(q),), q.shape[1], device=q.device) if lengths is None else lengths
    steps = steps if cu_seqlens is None else cu_seqlens.diff()
    return steps if state is None else state.position + steps


class _Turn(NamedTuple):
    """What is done with one chunk of each sequence that has as many: all read, the first ones are then written."""

    reads: int
    writes: int
    tokens: Tensor
    """(reads, W) the tokens that read"""
    is_token: Tensor | None
    """(reads, W) which of these there are; None: all"""
    steps: Tensor
    """(writes, C) the tokens that are written"""
    is_new: Tensor | None
    """(writes, C) which of these are tokens, and not steps that the state has kept; None: all"""


class _Plan:
    """The order in which sequences are computed, those of most chunks first, and what every turn takes."""

    def __init__(
        self, q: Tensor, C: int, position: Tensor | None, cu_seqlens: Tensor | None, lengths: Tensor | None
    ) -> None:
        B, L = q.shape[:2]
        if cu_seqlens is not None:
            offsets = cu_seqlens.tolist()
            spans = [*zip(offsets, offsets[1:])]
            if offsets != sorted(offsets) or not 0 <= offsets[0] <= offsets[-1] <= L:
                raise ValueError(
                    f"{_NAME}: `cu_seqlens` must be non-decreasing offsets in [0, {L}], got {shown(offsets)}."
                )
        else:
            ends = [L] * B if lengths is None else lengths.tolist()
            spans = [(row * L, row * L + end) for row, end in enumerate(ends)]
            if any(not 0 <= end <= L for end in ends):
                raise ValueError(f"{_NAME}: `lengths` must be row lengths in [0, {L}], got {shown(ends)}.")
        seen = [0] * len(spans) if position is None else position.tolist()
        if any(count < 0 for count in seen):
            raise ValueError(f"{_NAME}: `state.position` must be at least 0, got {shown(seen)}.")
        until = [count % C + end - begin for count, (begin, end) in zip(seen, spans)]  # counted from the open chunk
        order = sorted(range(len(spans)), key=lambda s: (-(-until[s] // C), until[s] // C), reverse=True)
        self.order = torch.tensor(order, dtype=torch.int64, device=q.device)
        self.has_mass = torch.tensor([seen[s] >= C for s in order], dtype=torch.bool, device=q.device)
        self.gets_mass = torch.tensor(
            [seen[s] // C * C + until[s] >= C for s in order], dtype=torch.bool, device=q.device
        )
        self._C, self._last = C, max(B * L - 1, 0)
        self._begin, self._end, self._before = (
            torch.tensor([(*spans[s], seen[s] % C) for s in order], dtype=torch.int64, device=q.device).view(-1, 3).T
        )
        until = [until[s] for s in order]
        of_tokens = [(seen[s] % C, until[at]) for at, s in enumerate(order)]
        self.turns = [self._turn(chunk * C, until, of_tokens) for chunk in range(-(-max(until, default=0) // C))]

    def _turn(self, start: int, until: list[int], of_tokens: list[tuple[int, int]]) -> _Turn:
        C, device = self._C, self.order.device
        reads, writes = sum(end > start for end in until), sum(end >= start + C for end in until)
        widths = [min(end, start + C) - max(begin, start) for begin, end in of_tokens[:reads]]
        first = self._begin - self._before + start
        tokens = torch.maximum(first, self._begin)[:reads, None] + torch.arange(max(widths), device=device)
        steps = first[:writes, None] + torch.arange(C, device=device)
        return _Turn(
            reads, writes,
            tokens.clamp(max=self._last),
            None if min(widths) == max(widths) else tokens < torch.minimum(first + C, self._end)[:reads, None],
            steps.clamp(min=0),
            steps >= self._begin[:writes, None] if start == 0 and any(begin for begin, _ in of_tokens[:writes]) else None,
        )  # fmt: skip

    def start(self, q: Tensor, v: Tensor, memory: Tensor | None, mass: Tensor | None) -> tuple[Tensor, Tensor]:
        """M (S, H, K, V) and z (S, H, K) before the first turn, to be written in place."""
        if memory is None:
            M = q.new_zeros(len(self.order), *q.shape[2:], v.shape[3], dtype=accumulation_dtype(q.dtype))
            return M, M.new_full(M.shape[:3], -torch.inf)
        M, z = self.ordered(memory), self.ordered(mass)
        return M, z.masked_fill_(~self.has_mass[:, None, None], -torch.inf)

    def ordered(self, x: Tensor) -> Tensor:
        """A copy of x (S, ...), contiguous whatever the strides of x."""
        return x.contiguous().index_select(0, self.order)

    def in_order_given(self, x: Tensor) -> Tensor:
        return torch.empty_like(x).index_copy_(0, self.order, x)


class _Tokens:
    """A tensor (B, L, H, E) by its tokens; of those that there are not, zeros are taken, and what is put is lost."""

    def __init__(self, x: Tensor, *, new: bool = False) -> None:
        self._shape, heads = x.shape, x.shape[2]
        self._head = torch.arange(heads, device=x.device)[:, None]
        self._nowhere = x.shape[0] * x.shape[1]
        lost = (self._nowhere + 1) * heads, x.shape[3]
        self._rows = x.new_zeros(lost) if new else x.contiguous().flatten(0, 2)

    def take(self, tokens: Tensor, there: Tensor | None, instead: Tensor | None = None) -> Tensor:
        """(n H, W, E) of tokens (n, W); `instead` (n, W, H, E) where a token is not there."""
        rows = tokens[:, None] * len(self._head) + self._head  # (n, H, W)
        x = self._rows.index_select(0, rows.flatten()).view(*rows.shape, self._shape[3])
        if there is not None:
            x = torch.where(there[:, None, :, None], x, 0 if instead is None else instead.transpose(1, 2))
        return x.flatten(0, 1)

    def put(self, tokens: Tensor, there: Tensor | None, x: Tensor) -> None:
        """What :meth:`take` would take."""
        at = tokens if there is None else tokens.masked_fill(~there, self._nowhere)
        rows = at[:, None] * len(self._head) + self._head
        self._rows.index_copy_(0, rows.flatten(), x.flatten(0, 1).to(self._rows.dtype))

    def result(self) -> Tensor:
        return self._rows[: self._nowhere * len(self._head)].view(self._shape)


class _Chunk(NamedTuple):
    """What is made of n sequences' chunks when they are written; of each head, in float32 but for U."""

    r: Tensor  # (n H, K)
    P: Tensor  # (n H, C, K)
    F: Tensor  # (n H, C, K)
    U: Tensor  # (n H, C, V)
    N: Tensor  # (n H, K, V)


def _write(
    M: Tensor, z: Tensor, turn: _Turn, plan: _Plan, k: _Tokens, v: _Tokens, cache_k: Tensor | None, cache_v: Tensor | None
) -> _Chunk | None:  # fmt: skip
    """Writes M (S, H, K, V) and z (S, H, K) of the sequences whose chunk is complete; None: there are none."""
    if not turn.writes:
        return None
    keys, values = (
        of.take(turn.steps, turn.is_new, None if turn.is_new is None else cache[plan.order[: turn.writes]])
        for of, cache in ((k, cache_k), (v, cache_v))
    )
    M, z, logits = M[: turn.writes].flatten(0, 1), z[: turn.writes].flatten(0, 1), keys.to(M.dtype)
    w = logits.logsumexp(1)
    total = torch.logaddexp(z, w)
    r, P, F = (w - total).exp(), (logits - w[:, None]).exp_(), logits.softmax(-1)
    U = torch.baddbmm(values, F.to(keys.dtype), M.to(keys.dtype), alpha=-1)
    N = (P.to(keys.dtype).mT @ U).to(M.dtype)
    M.lerp_(N, r[..., None].expand_as(N))
    z.copy_(total)
    return _Chunk(r, P, F, U, N)


def _fwd(q, k, v, memory, mass, cache_k, cache_v, position, chunk_size, cu_seqlens, lengths):
    plan = _Plan(q, chunk_size, position, cu_seqlens, lengths)
    M, z = plan.start(q, v, memory, mass)
    queries, keys, values, o = _Tokens(q), _Tokens(k), _Tokens(v), _Tokens(v, new=True)
    for turn in plan.turns:
        read = queries.take(turn.tokens, turn.is_token).to(M.dtype).softmax(-1).to(q.dtype)
        o.put(turn.tokens, turn.is_token, read @ M[: turn.reads].flatten(0, 1).to(q.dtype))
        _write(M, z, turn, plan, keys, values, cache_k, cache_v)
    z = z.masked_fill(~plan.gets_mass[:, None, None], 0)
    return o.result(), plan.in_order_given(M), plan.in_order_given(z)


def _fwd_fake(q, k, v, memory, mass, cache_k, cache_v, position, chunk_size, cu_seqlens, lengths):
    shape = num_sequences(len(q), cu_seqlens), *q.shape[2:]
    real = accumulation_dtype(q.dtype)
    return empty_like(v), q.new_empty((*shape, v.shape[3]), dtype=real), q.new_empty(shape, dtype=real)


def _bwd(
    do, dmemory_out, dmass_out, q, k, v, memory, mass, cache_k, cache_v, position, chunk_size, cu_seqlens, lengths
):  # fmt: skip
    """The formulas are those of reference/adaptive_working_memory.py."""
    plan, dtype = _Plan(q, chunk_size, position, cu_seqlens, lengths), q.dtype
    M, z = plan.start(q, v, memory, mass)
    queries, keys, values, grads = _Tokens(q), _Tokens(k), _Tokens(v), _Tokens(do)
    dq, dk, dv = (_Tokens(x, new=True) for x in (q, k, v))
    before = []
    for turn in plan.turns:
        before.append((M[: turn.reads].clone(), _write(M, z, turn, plan, keys, values, cache_k, cache_v)))
    G, g = plan.ordered(dmemory_out), plan.ordered(dmass_out).masked_fill_(~plan.gets_mass[:, None, None], 0)
    for turn, (M, chunk) in reversed([*zip(plan.turns, before)]):
        if chunk is not None:
            (r, P, F, U, N), M_ = chunk, M[: turn.writes].flatten(0, 1)
            G_, g_ = G[: turn.writes].flatten(0, 1), g[: turn.writes].flatten(0, 1)
            dN, dr = (r[..., None] * G_).to(dtype), (G_ * (N - M_)).sum(-1) * r * (1 - r)
            dP, dU = (U @ dN.mT).to(M.dtype), P.to(dtype) @ dN
            dF = (dU @ M_.to(dtype).mT).to(M.dtype).neg_()
            dlogits = torch._softmax_backward_data(dP, P, 1, M.dtype).addcmul_(P, (g_ * r + dr)[:, None])
            dk.put(turn.steps, turn.is_new, dlogits.add_(torch._softmax_backward_data(dF, F, 2, M.dtype)))
            dv.put(turn.steps, turn.is_new, dU)
            G_.mul_(1 - r[..., None]).sub_(F.to(dtype).mT @ dU)
            g_.mul_(1 - r).sub_(dr)
        read = queries.take(turn.tokens, turn.is_token).to(M.dtype).softmax(-1)
        do_ = grads.take(turn.tokens, turn.is_token)
        dread = (do_ @ M.flatten(0, 1).to(dtype).mT).to(M.dtype)
        dq.put(turn.tokens, turn.is_token, torch._softmax_backward_data(dread, read, 2, M.dtype))
        G[: turn.reads].flatten(0, 1).add_(read.to(dtype).mT @ do_)
    g = g.masked_fill(~plan.has_mass[:, None, None], 0)
    return dq.result(), dk.result(), dv.result(), plan.in_order_given(G), plan.in_order_given(g)


def _bwd_fake(
    do, dmemory_out, dmass_out, q, k, v, memory, mass, cache_k, cache_v, position, chunk_size, cu_seqlens, lengths
):  # fmt: skip
    return *map(empty_like, (q, k, v)), empty_like(dmemory_out), empty_like(dmass_out)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.chunk_size, cu_seqlens, lengths = inputs
    ctx.save_for_backward(*tensors, cu_seqlens, lengths)


def _backward(ctx, do, dmemory_out, dmass_out):
    *tensors, cu_seqlens, lengths = ctx.saved_tensors
    *grads, dmemory, dmass = call(
        adaptive_working_memory_bwd, do, dmemory_out, dmass_out, *tensors, ctx.chunk_size, cu_seqlens, lengths
    )
    has_state = tensors[3] is not None
    return *grads, *((dmemory, dmass) if has_state else (None, None)), *(None,) * 6


_TENSORS = (
    "Tensor q, Tensor k, Tensor v, Tensor? memory, Tensor? mass, Tensor? cache_k, Tensor? cache_v, Tensor? position, "
    "int chunk_size, Tensor? cu_seqlens, Tensor? lengths"
)
adaptive_working_memory_fwd = define_op(
    f"adaptive_working_memory_fwd({_TENSORS}) -> (Tensor o, Tensor memory_out, Tensor mass_out)",
    kernel=_fwd,
    fake=_fwd_fake,
    setup_context=_setup_context,
    backward=_backward,
)
adaptive_working_memory_bwd = define_op(
    f"adaptive_working_memory_bwd(Tensor do, Tensor dmemory_out, Tensor dmass_out, {_TENSORS}) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dmemory, Tensor dmass)",
    kernel=_bwd,
    fake=_bwd_fake,
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


def _checked(state: WorkingMemoryState | None, q: Tensor, v: Tensor, C: int, S: int) -> WorkingMemoryState | None:
    if state is None:
        return None
    state = WorkingMemoryState(*fields_of(_NAME, state, WorkingMemoryState))
    (H, K), V, real = q.shape[2:], v.shape[3], accumulation_dtype(q.dtype)
    wanted = {
        "memory": ((S, H, K, V), real), "mass": ((S, H, K), real), "k": ((S, C, H, K), q.dtype),
        "position": ((S,), torch.int64), "v": ((S, C, H, V), q.dtype),
    }  # fmt: skip
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
