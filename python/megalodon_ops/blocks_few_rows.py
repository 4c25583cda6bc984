"""`blocks_few_rows_`: whole blocks, or a model, for few rows without gradients, as in decoding, in one call on the CPU.

For one token, most of the time between the blocks' kernels goes to Python and torch's dispatcher. The same kernels run
here one after another, so results are those of the layers, bit for bit.
"""

from __future__ import annotations

from .library import accumulation_dtype, define_op, launch
from .normalized_qk import rotary_table


def _blocks(x, parameters, state, y, num_heads, num_groups, chunk_size, rope_base, eps, embedding_scale):
    head_dim = state[5].shape[3]
    rotary = rotary_table(chunk_size, head_dim, rope_base, accumulation_dtype(y.dtype), x.device)
    launch("blocks_few_rows", x.contiguous(), parameters, state, rotary, num_heads, num_groups, eps, embedding_scale, y)


def _blocks_fake(x, parameters, state, y, num_heads, num_groups, chunk_size, rope_base, eps, embedding_scale):
    return None


# x (B, L, D) through blocks. Of each, `parameters` in the order of cpp/blocks_few_rows_bind.cpp and eight of `state`:
# count, mean, var, residual, cema, and the attention's keys, values and position. Tokens x (B, L) go through a whole
# model, and y are logits: the first of `parameters` is the embedding, whose rows are scaled, the last are those of the
# final norm, whose state comes last, and of the output matrix.
blocks_few_rows_ = define_op(
    "blocks_few_rows_(Tensor x, Tensor?[] parameters, Tensor(a!)[] state, Tensor(b!) y, int num_heads, int num_groups, "
    "int chunk_size, float rope_base, float eps, float embedding_scale) -> ()",
    kernel=_blocks,
    fake=_blocks_fake,
)
