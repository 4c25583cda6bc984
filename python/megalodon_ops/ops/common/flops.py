"""How many floating-point operations each op counts in `torch.utils.flop_counter`, forward and backward.

Matrix products and attention count as torch counts its own ops: two for each multiply-add, none for a bias or softmax.
Attention counts the pairs of a query and a key that its chunks allow. Every other op counts one for each sum, product,
quotient, root, exponential, sine or cosine of an element in its definition, in :mod:`megalodon_ops.reference`; work
done once for a channel or a head does not count. Tokens in no sequence count nothing; where the sequences' ends cannot
be read, as those of fake tensors, whole rows count.

Example:
    >>> import torch, megalodon_ops as mo
    >>> from torch.utils.flop_counter import FlopCounterMode
    >>> q = k = v = torch.zeros(1, 4, 1, 8)
    >>> with FlopCounterMode(display=False) as counter:
    ...     o = mo.chunked_attention(q, k, v, chunk_size=2)
    >>> counter.get_total_flops()  # 6 pairs, each 8 multiply-adds for its score and 8 for its value
    192
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

_formulas: dict[str, Callable[..., int]] = {}


def register(op: Callable) -> None:
    """Tells torch this module's formula of a registered op."""
    arguments = [argument.name for argument in op._schema.arguments]
    formula = _formulas[op._schema.name.split("::")[1]]

    def count(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        return formula(*args, *(kwargs[name] for name in arguments[len(args) :]))

    register_flop_formula(op._overloadpacket, get_raw=True)(count)


def _formula(function: Callable[..., int]) -> Callable[..., int]:
    """Notes a function as the formula of the op whose name and arguments the function has."""
    _formulas[function.__name__] = function
    return function


def _values(tensor: Tensor | None, otherwise: list[int]) -> list[int]:
    """The integers in a tensor, or `otherwise` if the tensor is None or has no values to read."""
    readable = tensor is not None and type(tensor) in (Tensor, torch.nn.Parameter) and not tensor.is_meta
    return tensor.tolist() if readable else otherwise


def _steps(x: Tensor, cu_seqlens: Tensor | None, lengths: Tensor | None) -> list[int]:
    """The steps of each sequence."""
    batch, length = x.shape[:2]
    ends = None if cu_seqlens is None else cu_seqlens.diff()
    return _values(lengths if ends is None else ends, [length] * batch)


@_formula
def cema_fwd(x, p, q, gamma, omega, state, cu_seqlens, lengths, return_state):
    channels, modes = p.shape
    return sum(_steps(x, cu_seqlens, lengths)) * channels * (12 * modes + 2)


@_formula
def cema_bwd(dy, dstate_out, x, p, q, gamma, omega, state, cu_seqlens, lengths):
    channels, modes = p.shape
    h, g, dx, dp, dq, dgamma = 8, 10, 2, 2, 8, 4
    return sum(_steps(x, cu_seqlens, lengths)) * channels * ((h + g + dx + dp + dq + dgamma) * modes + 4)


@_formula
def cema_end_state_fwd(x, p, q, cu_seqlens, lengths):
    channels, modes = p.shape
    return sum(_steps(x, cu_seqlens, lengths)) * channels * 8 * modes


@_formula
def cema_end_state_bwd(dstate_out, x, p, q, cu_seqlens, lengths):
    channels, modes = p.shape
    h, g, dx, dp, dq = 8, 6, 2, 2, 8
    return sum(_steps(x, cu_seqlens, lengths)) * channels * (h + g + dx + dp + dq) * modes


@_formula
def timestep_norm_fwd(
    x, weight, bias, num_groups, eps, count, mean, var, residual, cu_seqlens, lengths, return_stats, return_state
):
    statistics, normalized = 4, 4
    return sum(_steps(x, cu_seqlens, lengths)) * x.shape[2] * (statistics + normalized)


@_formula
def timestep_norm_bwd(
    dy, dmean_out, dvar_out, x, weight, bias, num_groups, eps, count, mean, var, residual, cu_seqlens, lengths, stats
):
    sums, dx, dweight, dbias = 5, 4, 3, 1
    return sum(_steps(x, cu_seqlens, lengths)) * x.shape[2] * (sums + dx + dweight + dbias)


@_formula
def timestep_norm_end_state_fwd(x, num_groups, cu_seqlens, lengths):
    statistics = 4
    return sum(_steps(x, cu_seqlens, lengths)) * x.shape[2] * statistics


@_formula
def timestep_norm_end_state_bwd(dmean_out, dvar_out, x, mean_out, residual_out, num_groups, cu_seqlens, lengths):
    dx = 3
    return sum(_steps(x, cu_seqlens, lengths)) * x.shape[2] * dx


@_formula
def normalized_qk_fwd(z, gamma, beta, rotary, num_heads, chunk_size, rope_base, eps, position, cu_seqlens, lengths):
    normalized, affine, rotated = 3, 2, 3
    return sum(_steps(z, cu_seqlens, lengths)) * z.shape[2] * (normalized + 2 * (affine + rotated))


@_formula
def normalized_qk_bwd(
    dq, dk, z, gamma, beta, rotary, num_heads, chunk_size, rope_base, eps, position, cu_seqlens, lengths
):
    normalized, rotated, dgamma, dbeta, dnormalized, dz = 3, 3, 2, 1, 3, 5
    per_element = normalized + 2 * (rotated + dgamma + dbeta) + dnormalized + dz
    return sum(_steps(z, cu_seqlens, lengths)) * z.shape[2] * per_element


def _of_attention(q: Tensor, v: Tensor, pairs_of_sequences: Iterator[tuple[int, int]]) -> int:
    heads, K, V = q.shape[2], q.shape[3], v.shape[3]
    return sum(2 * pairs * heads * (K + V) for pairs, _ in pairs_of_sequences)


def _of_attention_bwd(q: Tensor, v: Tensor, pairs_of_sequences: Iterator[tuple[int, int]]) -> int:
    heads, K, V = q.shape[2], q.shape[3], v.shape[3]
    total = 0
    for pairs, cached in pairs_of_sequences:
        scores_dscores_and_dq, dk_and_dv = pairs * (2 * K + V), (pairs - cached) * (K + V)
        total += 2 * heads * (scores_dscores_and_dq + dk_and_dv)
    return total


@_formula
def two_chunk_attention_fwd(q, k, v, cache_k, cache_v, position, chunk_size, scale, cu_seqlens, lengths):
    return _of_attention(q, v, _pairs_of_two(q, position, chunk_size, cu_seqlens, lengths))


@_formula
def two_chunk_attention_bwd(do, q, k, v, o, lse, cache_k, cache_v, position, chunk_size, scale, cu_seqlens, lengths):
    return _of_attention_bwd(q, v, _pairs_of_two(q, position, chunk_size, cu_seqlens, lengths))


@_formula
def two_chunk_attention_state(k, v, cache_k, cache_v, position, chunk_size, cu_seqlens, lengths):
    return 0


def _pairs_of_two(
    q: Tensor, position: Tensor | None, C: int, cu_seqlens: Tensor | None, lengths: Tensor | None
) -> Iterator[tuple[int, int]]:
    """As :func:`_pairs`, where a query sees the chunk before its own, too."""
    own = _pairs(q, position, C, True, cu_seqlens, lengths)
    steps = _steps(q, cu_seqlens, lengths)
    for count, first, (pairs, _) in zip(steps, _values(position, [0] * len(steps)), own):
        end = first + count
        in_first_two, in_third = min(end, 2 * C) - first, max(min(end, 3 * C) - 2 * C, 0)
        cached = first * in_first_two + max(first - C, 0) * in_third
        yield pairs + C * (max(end - C, 0) - max(first - C, 0)), cached


def _pairs(
    q: Tensor, position: Tensor | None, chunk_size: int, causal: bool, cu_seqlens: Tensor | None, lengths: Tensor | None
) -> Iterator[tuple[int, int]]:
    """For each sequence, how many pairs of a query and a key its chunks allow, and how many pairs have a cached key."""

    def until(end: int) -> int:
        chunks, rest = end // chunk_size, end % chunk_size
        if not causal:
            return chunks * chunk_size**2 + rest**2
        return (chunks * chunk_size * (chunk_size + 1) + rest * (rest + 1)) // 2

    steps = _steps(q, cu_seqlens, lengths)
    for count, first in zip(steps, _values(position, [0] * len(steps))):
        yield until(first + count) - until(first), first * min(count, chunk_size - first)


@_formula
def chunked_attention_fwd(
    q, k, v, cache_k, cache_v, position, chunk_size, causal, scale, dropkey, dropkey_seed, cu_seqlens, lengths
):
    return _of_attention(q, v, _pairs(q, position, chunk_size, causal, cu_seqlens, lengths))


@_formula
def chunked_attention_bwd(
    do, q, k, v, o, lse, cache_k, cache_v, position, chunk_size, causal, scale, dropkey, dropkey_seed, cu_seqlens, lengths,
):  # fmt: skip
    return _of_attention_bwd(q, v, _pairs(q, position, chunk_size, causal, cu_seqlens, lengths))


@_formula
def chunked_attention_state(k, v, cache_k, cache_v, position, chunk_size, cu_seqlens, lengths):
    return 0  # the op only copies


@_formula
def chunked_attention_state_(k, v, cache_k, cache_v, position, chunk_size, cu_seqlens, lengths):
    return 0


def _of_memory(
    q: Tensor, position: Tensor | None, chunk_size: int, visible: int, cu_seqlens: Tensor | None, lengths: Tensor | None,
    to_end: bool,
) -> tuple[int, int, int]:  # fmt: skip
    """The steps that read a working memory, those that are compared with it before they write it, and all that write it.

    What no one reads is not written, and an empty memory not compared with.
    """
    steps = _steps(q, cu_seqlens, lengths)
    seen = _values(position, [0] * len(steps))
    ends = [before % chunk_size + own for before, own in zip(seen, steps)]
    written = [(end if to_end else max(end - 1, 0)) // chunk_size * chunk_size for end in ends]
    late = (visible - 1) * chunk_size  # steps at the end of a sequence that are not written yet
    written = [max(n - late, 0) if position is None else n for n in written]
    known = [max(n - chunk_size, 0) if position is None else n for n in written]
    return sum(steps), sum(known), sum(written)


@_formula
def adaptive_working_memory_fwd(
    q, k, v, memory, mass, cache_k, cache_v, position, chunk_size, visible_chunks, cu_seqlens, lengths, to_end
):  # fmt: skip
    read, compared, written = _of_memory(q, position, chunk_size, visible_chunks, cu_seqlens, lengths, to_end)
    return 2 * (read + compared + written) * q.shape[2] * q.shape[3] * v.shape[3]


@_formula
def adaptive_working_memory_bwd(
    do, dmemory_out, dmass_out, q, k, v, memory, mass, cache_k, cache_v, position, chunk_size, visible_chunks, cu_seqlens, lengths
):  # fmt: skip
    read, compared, written = _of_memory(
        q, position, chunk_size, visible_chunks, cu_seqlens, lengths, dmemory_out is not None
    )
    return 2 * (2 * read + 3 * (compared + written)) * q.shape[2] * q.shape[3] * v.shape[3]


@_formula
def layer_norm_fwd(x, weight, bias, eps, is_rms_norm):
    return x.numel() * ((3 if is_rms_norm else 5) + (weight is not None) + (bias is not None))


@_formula
def layer_norm_bwd(dy, x, weight, bias, eps, is_rms_norm):
    normalized, dx = (3, 5) if is_rms_norm else (5, 7)
    dweight, dbias = 0 if weight is None else 3, 0 if bias is None else 1
    return x.numel() * (normalized + dx + dweight + dbias)


@_formula
def gated_silu_fwd(x, value):
    return x.numel() * (4 if value is None else 5)


@_formula
def gated_silu_bwd(dy, x, value):
    return x.numel() * (8 if value is None else 11)


@_formula
def cema_coefficients_fwd(alpha, delta, theta, gamma):
    sigmoids, radius, angle, q, scaled = 6, 2, 1, 4, 2
    return alpha.numel() * (sigmoids + radius + angle + q + scaled)


@_formula
def cema_coefficients_bwd(dp, dq, dscaled, alpha, delta, theta):
    sigmoids, radius, angle, along_and_across, dalpha, ddelta, dtheta, dgamma = 6, 2, 1, 8, 5, 4, 3, 2
    return alpha.numel() * (sigmoids + radius + angle + along_and_across + dalpha + ddelta + dtheta + dgamma)


@_formula
def linear_fwd(x, weight, bias):
    return 2 * x.numel() * weight.shape[0]


@_formula
def linear_few_rows(x, weight, bias):
    return 2 * x.numel() * weight.shape[0]


@_formula
def linear_cross_entropy_fwd(x, weight, index, ignore_index):
    return 2 * x.numel() * weight.shape[0]


@_formula
def linear_cross_entropy_sum(x, weight, index, scales, wants_dx, wants_dweight):
    return 2 * x.numel() * weight.shape[0] * (1 + wants_dx + wants_dweight)
