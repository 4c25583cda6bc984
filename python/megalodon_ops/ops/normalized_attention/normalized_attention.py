"""`normalized_attention`: attention over normalized queries and keys that share one z."""

from torch import Tensor

from ..common.arrays import call_with_arrays
from ..chunked_attention.chunked_attention import chunked_attention
from ..common.definition import autocast
from ..normalized_qk.normalized_qk import rotated_queries_and_keys
from ..common.states import AttentionState, state_fields
from ..common.checks import check_size, check_tensor, renamed
from ..common.spans import as_spans


def normalized_attention(
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
    return_state: bool = False,
    inplace_state: bool = False,
    dropkey: float = 0.0,
    dropkey_seed: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    lengths: Tensor | None = None,
    starts: Tensor | None = None,
    spans: Tensor | None = None,
) -> Tensor | tuple[Tensor, AttentionState]:
    r"""Attention inside chunks; queries and keys are two affine maps of one normalized z.

    .. math:: q, k = \mathrm{normalized\_qk}(z, \gamma, \beta), \qquad o = \mathrm{chunked\_attention}(q, k, v)

    Args:
        z: (B, L, H * K) float32, float64, bfloat16 or float16, K even; the op normalizes it.
        v: (B, L, H * V) in z's dtype.
        gamma, beta: (2, H * K) float32, or float64 for a float64 `z`; row 0 for queries, row 1 for keys. The gain is
            (1 + gamma) / sqrt(K); beta is not divided by sqrt(K).
        num_heads, chunk_size: H, C.
        rope_base, eps: as in :func:`normalized_qk`.
        causal, state, return_state, inplace_state, dropkey, dropkey_seed: as in :func:`chunked_attention`.
        cu_seqlens, lengths, starts, spans: sequences as in :func:`cema`.

    Returns:
        o (B, L, H * V), zero at tokens in no sequence; with `return_state` also the :class:`AttentionState`.

    Raises:
        ValueError: a shape or a value is wrong. TypeError: a dtype is wrong. Second derivatives are not supported.

    z, the rotated q and k, v, o and one log-sum-exp for each row and head are kept for the backward.

    Arrays of other libraries: see :mod:`megalodon_ops.ops.common.arrays`.

    Source: arXiv 2404.08801, section 3.3. The mathematics: :func:`megalodon_ops.reference.normalized_attention`.

    Example:
        >>> import torch, megalodon_ops as mo
        >>> z, v, affine = torch.randn(2, 10, 32), torch.randn(2, 10, 48), torch.zeros(2, 32)
        >>> whole = mo.normalized_attention(z, v, affine, affine, num_heads=4, chunk_size=8)
        >>> a, state = mo.normalized_attention(z[:, :3], v[:, :3], affine, affine, num_heads=4, chunk_size=8, return_state=True)
        >>> b = mo.normalized_attention(z[:, 3:], v[:, 3:], affine, affine, num_heads=4, chunk_size=8, state=state)
        >>> torch.allclose(torch.cat((a, b), 1), whole, atol=1e-6)
        True
    """
    if not isinstance(z, Tensor):
        return call_with_arrays(normalized_attention, **locals())
    check_tensor("normalized_attention", "v", v)
    spans = as_spans("normalized_attention", z, cu_seqlens, lengths, starts, spans)
    try:
        return attend(
            z, v, gamma, beta, None, num_heads=num_heads, chunk_size=chunk_size, causal=causal, rope_base=rope_base,
            eps=eps, state=state, return_state=return_state, inplace_state=inplace_state, dropkey=dropkey,
            dropkey_seed=dropkey_seed, spans=spans,
        )  # fmt: skip
    except (TypeError, ValueError) as error:
        raise renamed(error, "normalized_attention") from error


def attend(
    z: Tensor,
    v: Tensor,
    gamma: Tensor,
    beta: Tensor,
    rotary: Tensor | None,
    *,
    num_heads: int,
    chunk_size: int,
    causal: bool = True,
    rope_base: float,
    eps: float,
    state: AttentionState | None,
    return_state: bool,
    inplace_state: bool,
    dropkey: float,
    dropkey_seed: Tensor | None = None,
    spans: Tensor | None = None,
) -> Tensor | tuple[Tensor, AttentionState]:
    """Compute :func:`normalized_attention` with a rotary table, as :func:`rotated_queries_and_keys` takes it."""
    z, v = autocast(z, v)
    num_heads = check_size("normalized_attention", "num_heads", num_heads)
    if v.dim() != 3 or (z.dim() == 3 and v.shape[:2] != z.shape[:2]):
        raise ValueError(
            f"normalized_attention: `v` must have shape (B, L, H * V) with B, L of z {tuple(z.shape)}, got {tuple(v.shape)}."
        )
    if v.shape[-1] % num_heads:
        raise ValueError(
            f"normalized_attention: `num_heads` must divide v's last dimension {v.shape[-1]}, got {num_heads}."
        )
    q, k = rotated_queries_and_keys(
        z, gamma, beta, rotary, num_heads=num_heads, chunk_size=chunk_size, rope_base=rope_base, eps=eps,
        position=state_fields("normalized_attention", state, AttentionState)[2], spans=spans,
    )  # fmt: skip
    result = chunked_attention(
        q, k, v.unflatten(-1, (num_heads, -1)), chunk_size=chunk_size, causal=causal, state=state,
        return_state=return_state, inplace_state=inplace_state, dropkey=dropkey, dropkey_seed=dropkey_seed,
        spans=spans,
    )  # fmt: skip
    if return_state:
        o, state = result
        return o.flatten(-2), state
    return result.flatten(-2)
