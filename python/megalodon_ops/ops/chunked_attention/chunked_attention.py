"""`chunked_attention`: softmax attention inside chunks of C positions, causal or over whole chunks."""

from functools import partial

import torch
from torch import Tensor

from . import dense_attention
from ..common.arrays import call_with_arrays
from ..common.definition import autocast, call, define_op, launch
from ..common.spans import as_spans
from ..common.states import AttentionState, state_fields
from .attention_flops import attention_bwd_flops, attention_flops, pairs_in_chunk
from .two_chunk_attention import attention_fake, state_fake, two_chunk_attention_fwd
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
        visible_chunks: 1, or 2: a position also sees the previous chunk, as in Gecko (arXiv 2601.06463). With 2:

            - attention must be causal and without `dropkey`, and rotary positions must not restart with each chunk
            - the state has 2 C rows
            - the op computes attention in windows of 2 C positions twice: 4 pairs of a query and a key where 3 would do
            - on a GPU the host waits for the state's positions and for the sequences'
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
            call, so a sequence that is split into calls has another mask.
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
    before = (*state_fields("chunked_attention", state, AttentionState), chunk_size)
    if torch.is_grad_enabled() and state and (state[0].requires_grad or state[1].requires_grad):
        raise ValueError(
            "chunked_attention: `state` must not require gradients, it is constant in the backward; detach it."
        )
    if visible_chunks == 2:
        o, _ = call(two_chunk_attention_fwd, q, k, v, *before, scale, spans)
    else:
        o, _ = call(chunked_attention_fwd, q, k, v, *before, causal, scale, dropkey, dropkey_seed, spans)
    if inplace_state:
        append_in_place(k, v, *before, visible_chunks, spans)
        return (o, state) if return_state else o
    return (o, AttentionState(*append(k, v, *before, visible_chunks, spans))) if return_state else o


def append(k, v, cache_k, cache_v, position, chunk_size, visible_chunks, spans):
    """Return the keys, values and position of the state after a call. The caches are those before it, or None."""
    op = chunked_attention_state if visible_chunks == 1 else two_chunk_attention_state
    return call(op, k.detach(), v.detach(), cache_k, cache_v, position, chunk_size, spans)


def append_in_place(k, v, cache_k, cache_v, position, chunk_size, visible_chunks, spans):
    """Write the keys, values and position after a call into the state's tensors."""
    op = chunked_attention_state_ if visible_chunks == 1 else two_chunk_attention_state_
    call(op, k.detach(), v.detach(), cache_k, cache_v, position, chunk_size, spans)


def _by_library(direction, kernel, *args):
    """Compute a dense batch without a state by torch's libraries if these suit its shapes, all else by the kernel."""
    *tensors, _, _, position, chunk_size, causal, scale, dropkey, _, spans = args
    if not dropkey and position is None and spans is None:
        q, k, v = tensors if direction == "forward" else tensors[1:4]
        if path := dense_attention.path_of(direction, q, k, v, chunk_size, causal, scale):
            return dense_attention.compute(direction, path, tensors, chunk_size, causal, scale)
    return kernel(*args)


def _state_inplace(k, v, cache_k, cache_v, position, chunk_size, spans):
    state = (cache_k, cache_v, position)
    launch("chunked_attention_state", k.contiguous(), v.contiguous(), *state, chunk_size, spans, *state)


chunked_attention_bwd = define_op(
    "chunked_attention_bwd(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor? cache_k, "
    "Tensor? cache_v, Tensor? position, int chunk_size, bool causal, float scale, float dropkey, Tensor? dropkey_seed, "
    "Tensor? spans) -> (Tensor dq, Tensor dk, Tensor dv)",
    wrapper=partial(_by_library, "backward"),
    flops=lambda q, v, position, chunk_size, causal, spans: attention_bwd_flops(
        q, v, pairs_in_chunk(q, position, chunk_size, causal, spans)
    ),
)
chunked_attention_fwd = define_op(
    "chunked_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor? cache_k, Tensor? cache_v, Tensor? position, "
    "int chunk_size, bool causal, float scale, float dropkey, Tensor? dropkey_seed, Tensor? spans) "
    "-> (Tensor o, Tensor lse)",
    wrapper=partial(_by_library, "forward"),
    fake=attention_fake,
    backward=chunked_attention_bwd,
    flops=lambda q, v, position, chunk_size, causal, spans: attention_flops(
        q, v, pairs_in_chunk(q, position, chunk_size, causal, spans)
    ),
)
chunked_attention_state = define_op(
    "chunked_attention_state(Tensor k, Tensor v, Tensor? cache_k, Tensor? cache_v, Tensor? position, int chunk_size, "
    "Tensor? spans) -> (Tensor cache_k_out, Tensor cache_v_out, Tensor position_out)",
    fake=state_fake,
    flops=lambda: 0,
)
chunked_attention_state_ = define_op(
    "chunked_attention_state_(Tensor k, Tensor v, Tensor(a!) cache_k, Tensor(b!) cache_v, Tensor(c!) position, "
    "int chunk_size, Tensor? spans) -> ()",
    kernel=_state_inplace,
    flops=lambda: 0,
)
