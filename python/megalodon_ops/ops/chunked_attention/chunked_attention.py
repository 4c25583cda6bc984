"""`chunked_attention`: softmax attention inside chunks of C positions, causal or over whole chunks."""

from __future__ import annotations

import torch
from torch import Tensor

from . import dense_attention
from ..common.arrays import call_with_arrays
from ..common.definition import autocast, call, contiguous_or_none, define_op
from ..common.definition import empty_gradients, empty_like, launch
from ..common.spans import as_spans, num_sequences
from ..common.states import AttentionState, accumulation_dtype, state_fields
from .attention_flops import attention_bwd_flops, attention_flops, pairs_in_chunk
from .two_chunk_attention import empty_state, two_chunk_attention_fwd
from .two_chunk_attention import two_chunk_attention_state, two_chunk_attention_state_
from ..common.checks import LARGEST_BELOW_1, check_flag, check_number, check_size, check_tensor


def chunked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    chunk_size: int,
    visible_chunks: int = 1,
    causal: bool = True,
    scale: float = 1.0,
    state: AttentionState | None = None,
    return_state: bool = False,
    inplace_state: bool = False,
    dropkey: float = 0.0,
    dropkey_seed: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    lengths: Tensor | None = None,
    starts: Tensor | None = None,
    spans: Tensor | None = None,
) -> Tensor | tuple[Tensor, AttentionState]:
    r"""Softmax attention inside chunks: a position sees its chunk up to itself or, if not causal, its whole chunk.

    .. math:: o_i = \sum_{j \le i} \mathrm{softmax}_j(\mathrm{scale}\; q_i^\top k_j)\, v_j, \qquad i, j \text{ in one chunk}

    Args:
        q, k: (B, L, H, K) float32, float64, bfloat16 or float16.
        v: (B, L, H, V) in q's dtype; V may differ from K.
        chunk_size: C. Chunks are counted from each sequence's start; a call with a state first completes its chunk.
        visible_chunks: 2: a position also sees the previous chunk, as in Gecko (arXiv 2601.06463); only causal and
            without `dropkey`. The op computes attention in windows of 2 C positions twice: 4 pairs of a query and a key
            where 3 would suffice. The state has 2 C rows; rotary positions must not restart with each chunk. On a GPU
            the host waits for the state's positions and for the sequences'.
        causal: False: each position sees its whole chunk, as in an encoder; `state` and `return_state` are refused.
        scale: factor on the scores.
        state: keys and values of the unfinished chunk; None: empty. The state is constant in the backward. On the CPU
            the state's keys and values can have 8 bits if q is float32, bfloat16 or float16: each position is rounded
            when it enters the state, and the new state has 8 bits, too.
        return_state: also return the state after each sequence's last position.
        inplace_state: append to the tensors of `state` instead of copying them; for generation. A backward that needs
            the old values raises an error.
        dropkey: probability in [0, 1) that a key is hidden from a query: the score becomes -inf before the softmax, and
            no other score is rescaled. A row that loses all scores gives zeros. The mask depends on positions in the
            call, so a sequence that is read in pieces has another mask.
        dropkey_seed: (1,) int64, seed of the mask; None: drawn from the device's default generator.
        cu_seqlens, lengths, starts, spans: sequences as in :func:`cema`.

    Returns:
        o (B, L, H, V), zero at tokens in no sequence; with `return_state` also the :class:`AttentionState`.

    Raises:
        ValueError: a shape or a value is wrong. TypeError: a dtype is wrong. Second derivatives are not supported.

    Scores are computed in blocks that fit the cache, never as a C x C matrix; sums are float32 (float64 for float64).
    On CUDA, dense batches of the shapes listed in :mod:`megalodon_ops.ops.chunked_attention.dense_attention` use
    torch's libraries. The backward keeps q, k, v, o and one log-sum-exp for each position and head.

    Arrays of other libraries: see :mod:`megalodon_ops.ops.common.arrays`.

    Source: arXiv 2404.08801, section 3.3; DropKey: arXiv 2208.02646. The mathematics:
    :func:`megalodon_ops.reference.chunked_attention`.

    Example:
        >>> import torch, megalodon_ops as mo
        >>> q = k = torch.zeros(1, 4, 1, 2)  # equal scores: the mean of the chunk so far
        >>> v = torch.tensor([1.0, 3.0, 10.0, 20.0]).reshape(1, 4, 1, 1)
        >>> mo.chunked_attention(q, k, v, chunk_size=2).flatten()
        tensor([ 1.,  2., 10., 15.])
    """
    if not isinstance(q, Tensor):
        return call_with_arrays(chunked_attention, **locals())
    check_tensor("chunked_attention", "k", k)
    check_tensor("chunked_attention", "v", v)
    q, k, v = autocast(q, k, v)
    spans = as_spans("chunked_attention", q, cu_seqlens, lengths, starts, spans)
    chunk_size = check_size("chunked_attention", "chunk_size", chunk_size)
    scale = check_number("chunked_attention", "scale", scale, "a finite number")
    visible_chunks = check_size("chunked_attention", "visible_chunks", visible_chunks)
    dropkey = check_number("chunked_attention", "dropkey", dropkey, "a probability in [0, 1)", 0.0, LARGEST_BELOW_1)
    check_flag("chunked_attention", "causal", causal)
    check_flag("chunked_attention", "return_state", return_state)
    check_flag("chunked_attention", "inplace_state", inplace_state)
    if dropkey and dropkey_seed is None:
        dropkey_seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=q.device)
    if inplace_state and state is None:
        raise ValueError("chunked_attention: `inplace_state` needs a `state` to append to, got None.")
    if not causal and (state is not None or return_state):
        raise ValueError(
            "chunked_attention: `causal` must be True where a `state` is given or returned, got False: a query that sees "
            "its whole chunk needs the whole chunk in one call; leave the state out."
        )
    if visible_chunks > 2 or visible_chunks == 2 and (dropkey or not causal):
        raise ValueError(
            "chunked_attention: `visible_chunks` must be 1, or 2 where attention is causal and `dropkey` is 0, got "
            f"{visible_chunks}."
        )
    cache_k, cache_v, position = state_fields("chunked_attention", state, AttentionState)
    constants = state[:2] if state and torch.is_grad_enabled() else ()
    if any(cache.requires_grad for cache in constants):
        raise ValueError(
            "chunked_attention: `state` must not require gradients, it is constant in the backward; detach it."
        )
    if visible_chunks == 2:
        return _attend_two_chunks(q, k, v, state, chunk_size, scale, return_state, inplace_state, spans)
    before = (cache_k, cache_v, position, chunk_size)
    o, _ = call(chunked_attention_fwd, q, k, v, *before, causal, scale, dropkey, dropkey_seed, spans)
    if inplace_state:
        call(chunked_attention_state_, k.detach(), v.detach(), *state, chunk_size, spans)
        return (o, state) if return_state else o
    if return_state:
        return o, AttentionState(*call(chunked_attention_state, k.detach(), v.detach(), *before, spans))
    return o


def _attend_two_chunks(
    q: Tensor, k: Tensor, v: Tensor, state: AttentionState | None, chunk_size: int, scale: float, return_state: bool,
    inplace_state: bool, spans: Tensor | None,
) -> Tensor | tuple[Tensor, AttentionState]:  # fmt: skip
    before = (*(state or (None,) * 3), chunk_size)
    o, _ = call(two_chunk_attention_fwd, q, k, v, *before, scale, spans)
    new, after = (k.detach(), v.detach()), state
    if inplace_state:
        call(two_chunk_attention_state_, *new, *before, spans)
    elif return_state:
        after = AttentionState(*call(two_chunk_attention_state, *new, *before, spans))
    return (o, after) if return_state else o


def _library_path(direction, q, k, v, position, chunk_size, causal, scale, dropkey, spans):
    """Return the path through torch's libraries for a dense batch without a state; None: the kernels."""
    is_dense = not dropkey and position is None and spans is None
    return dense_attention.path_of(direction, q, k, v, chunk_size, causal, scale) if is_dense else None


def _fwd(q, k, v, cache_k, cache_v, position, chunk_size, causal, scale, dropkey, dropkey_seed, spans):
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    if path := _library_path("forward", q, k, v, position, chunk_size, causal, scale, dropkey, spans):
        return dense_attention.forward(path, q, k, v, chunk_size, causal, scale)
    o, lse = _fwd_fake(q, k, v)
    launch(
        "chunked_attention_fwd", q, k, v, contiguous_or_none(cache_k), contiguous_or_none(cache_v), contiguous_or_none(position), chunk_size,
        causal, scale, dropkey, dropkey_seed, spans, o, lse,
    )  # fmt: skip
    return o, lse


def _fwd_fake(q, k, v, *_):
    return empty_like(v), q.new_empty(q.shape[:-1], dtype=accumulation_dtype(q.dtype))


def _bwd(do, q, k, v, o, lse, cache_k, cache_v, position, chunk_size, causal, scale, dropkey, dropkey_seed, spans):
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    if path := _library_path("backward", q, k, v, position, chunk_size, causal, scale, dropkey, spans):
        return dense_attention.backward(path, do, q, k, v, o, lse, chunk_size, causal, scale)
    grads = empty_gradients(q, k, v)
    cached = contiguous_or_none(cache_k), contiguous_or_none(cache_v), contiguous_or_none(position)
    options = chunk_size, causal, scale, dropkey, dropkey_seed, spans
    outputs = o.contiguous(), lse.contiguous(), do.contiguous()
    launch("chunked_attention_bwd", q, k, v, *cached, *options, *outputs, *grads)
    return grads


def _state(k, v, cache_k, cache_v, position, chunk_size, spans):
    k, v = k.contiguous(), v.contiguous()
    outputs = _state_fake(k, v, cache_k, cache_v, position, chunk_size, spans)
    cache_k, cache_v, position = contiguous_or_none(cache_k), contiguous_or_none(cache_v), contiguous_or_none(position)
    launch("chunked_attention_state", k, v, cache_k, cache_v, position, chunk_size, spans, *outputs)
    return outputs


def _state_fake(k, v, cache_k, cache_v, position, chunk_size, spans):
    return empty_state(k, v, cache_k, cache_v, num_sequences(k.shape[0], spans), chunk_size)


def _state_inplace(k, v, cache_k, cache_v, position, chunk_size, spans):
    state = (cache_k, cache_v, position)
    launch("chunked_attention_state", k.contiguous(), v.contiguous(), *state, chunk_size, spans, *state)


def _state_inplace_fake(k, v, cache_k, cache_v, position, chunk_size, spans):
    return None


chunked_attention_bwd = define_op(
    "chunked_attention_bwd(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor? cache_k, "
    "Tensor? cache_v, Tensor? position, int chunk_size, bool causal, float scale, float dropkey, Tensor? dropkey_seed, "
    "Tensor? spans) -> (Tensor dq, Tensor dk, Tensor dv)",
    kernel=_bwd,
    flops=lambda q, v, position, chunk_size, causal, spans: attention_bwd_flops(
        q, v, pairs_in_chunk(q, position, chunk_size, causal, spans)
    ),
)
chunked_attention_fwd = define_op(
    "chunked_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor? cache_k, Tensor? cache_v, Tensor? position, "
    "int chunk_size, bool causal, float scale, float dropkey, Tensor? dropkey_seed, Tensor? spans) "
    "-> (Tensor o, Tensor lse)",
    kernel=_fwd,
    fake=_fwd_fake,
    backward=chunked_attention_bwd,
    flops=lambda q, v, position, chunk_size, causal, spans: attention_flops(
        q, v, pairs_in_chunk(q, position, chunk_size, causal, spans)
    ),
)
chunked_attention_state = define_op(
    "chunked_attention_state(Tensor k, Tensor v, Tensor? cache_k, Tensor? cache_v, Tensor? position, int chunk_size, "
    "Tensor? spans) -> (Tensor cache_k_out, Tensor cache_v_out, Tensor position_out)",
    kernel=_state,
    fake=_state_fake,
    flops=lambda: 0,
)
chunked_attention_state_ = define_op(
    "chunked_attention_state_(Tensor k, Tensor v, Tensor(a!) cache_k, Tensor(b!) cache_v, Tensor(c!) position, "
    "int chunk_size, Tensor? spans) -> ()",
    kernel=_state_inplace,
    fake=_state_inplace_fake,
    flops=lambda: 0,
)
