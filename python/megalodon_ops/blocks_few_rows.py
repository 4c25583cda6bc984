"""`blocks_few_rows_`: whole blocks for few rows without gradients, as in decoding, in one call on the CPU.

For one token, most of the time between the blocks' kernels goes to Python and torch's dispatcher. The same kernels run
here one after another, so results are those of the layers, bit for bit.
"""

from __future__ import annotations

from .library import accumulation_dtype, contiguous_or_none, define_op, launch
from .normalized_qk import rotary_table


def _blocks(x, parameters, state, caches, y, state_out, num_heads, num_groups, chunk_size, rope_base, eps):
    rotary = rotary_table(chunk_size, caches[0].shape[3], rope_base, accumulation_dtype(x.dtype), x.device)
    parameters, state = (tuple(map(contiguous_or_none, tensors)) for tensors in (parameters, state))
    launch(
        "blocks_few_rows", x.contiguous(), parameters, state, tuple(caches), rotary, num_heads, num_groups, eps, y,
        tuple(state_out),
    )  # fmt: skip


def _blocks_fake(x, parameters, state, caches, y, state_out, num_heads, num_groups, chunk_size, rope_base, eps):
    return None


# Of each block, in the order of cpp/blocks_few_rows_bind.cpp: `parameters`; `state` and `state_out`, count, mean, var,
# residual and cema; `caches`, the attention's keys, values and position.
blocks_few_rows_ = define_op(
    "blocks_few_rows_(Tensor x, Tensor?[] parameters, Tensor?[] state, Tensor(a!)[] caches, Tensor(b!) y, "
    "Tensor(c!)[] state_out, int num_heads, int num_groups, int chunk_size, float rope_base, float[] eps) -> ()",
    kernel=_blocks,
    fake=_blocks_fake,
)
