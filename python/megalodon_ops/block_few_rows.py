"""`block_few_rows_`: a whole block for few rows without gradients, as in decoding, in one call on the CPU.

For one token, most of the time between a block's kernels goes to Python and torch's dispatcher. The same kernels run
here one after another, so results are those of the layers, bit for bit.
"""

from __future__ import annotations

import torch

from .library import accumulation_dtype, contiguous_or_none, define_op, launch
from .normalized_qk import rotary_table


def _block(x, parameters, state, cache_k, cache_v, position, num_heads, num_groups, rope_base, eps):
    rotary = rotary_table(cache_k.shape[1], cache_k.shape[3], rope_base, accumulation_dtype(x.dtype), x.device)
    y, *state_out = _block_fake(x, parameters, state, cache_k, cache_v, position, num_heads, num_groups, rope_base, eps)
    parameters, state = (tuple(contiguous_or_none(t) for t in tensors) for tensors in (parameters, state))
    state = (*state, cache_k, cache_v, position)
    launch("block_few_rows", x.contiguous(), parameters, state, rotary, num_heads, num_groups, eps, y, tuple(state_out))
    return y, *state_out


def _block_fake(x, parameters, state, cache_k, cache_v, position, num_heads, num_groups, rope_base, eps):
    count, mean, var, _, cema = state
    empty = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, count, mean, var)]
    return *empty, mean.new_empty((2, *mean.shape)), torch.empty_like(cema, memory_format=torch.contiguous_format)


# What `parameters` and `state` hold, and in which order, is written in cpp/block_few_rows_bind.cpp.
block_few_rows_ = define_op(
    "block_few_rows_(Tensor x, Tensor?[] parameters, Tensor?[] state, Tensor(a!) cache_k, Tensor(b!) cache_v, "
    "Tensor(c!) position, int num_heads, int num_groups, float rope_base, float[] eps) "
    "-> (Tensor y, Tensor count, Tensor mean, Tensor var, Tensor residual, Tensor cema)",
    kernel=_block,
    fake=_block_fake,
)
