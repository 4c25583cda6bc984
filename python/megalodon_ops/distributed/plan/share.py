"""What one process of a mesh holds and computes: its rows, its piece of each sequence, its part of every matrix."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ...model.config import MegalodonConfig

_BLOCK = {"cpu": (1 << 23) - 1024, "cuda": 1 << 26}  # logits in a block of the loss: ops/loss.py
_SPLIT_BY_ROWS = ("cema.", "timenorm.", "final_norm.", "wv.", "wr.", "wh1.", "fc1.", "fc3.", "nffn.alpha")
_SPLIT_BY_COLUMNS = ("embed.", "output.output.", "wh2.", "fc2.")
_SPLIT_BY_HEADS = {"wz.": 0, "mega.gamma": 1, "mega.beta": 1}  # whole where heads are shared
WIDE = 4
"""bytes of a number that stays float32 beside 16-bit activations"""


class Parameter(NamedTuple):
    """One process's part of a parameter before it is sharded."""

    name: str
    shape: tuple[int, ...]
    is_wide: bool
    """whether it stays float32 under a 16-bit dtype: CEMA, norms, the attention's affine map"""

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def shard(self, ranks: int) -> int:
        """Numbers of the largest of the shards that FSDP2 makes along the first dimension, padded to be alike."""
        first, *rest = self.shape
        return -(-first // ranks) * math.prod(rest)


@dataclass(frozen=True)
class Share:
    """The work of the process that has most of it.

    `rows` sequences of `length` tokens each; `tensor` processes share every block: channels, norm groups, heads, value
    and hidden dimensions are split between them, and the tokens of the loss. Where they are more than the heads, some share one.
    """

    config: MegalodonConfig
    rows: int
    length: int
    tensor: int = 1
    dtype: torch.dtype = torch.float32
    """of matrix products and what they give"""
    autocast: bool = False
    """whether parameters and the residual stream stay float32 around products in `dtype`"""
    device: str = "cuda"

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @property
    def narrow(self) -> int:
        """bytes of a number that a matrix product gives"""
        return self.dtype.itemsize

    @property
    def residual(self) -> int:
        """bytes of a number of the residual stream and of what norms and CEMA give"""
        return WIDE if self.autocast else self.dtype.itemsize

    @property
    def widths(self) -> tuple[int, int, int, int, int, int]:
        """This process's channels, norm groups, heads, and widths of keys, values and the feed-forward half."""
        config = self.config
        whole = (config.model_dim, config.norm_num_groups, config.value_dim, config.ffn_hidden_dim)
        d, g, v, f = (size // self.tensor for size in whole)
        heads = max(config.num_heads // self.tensor, 1)
        return d, g, heads, heads * config.z_dim // config.num_heads, v, f

    @property
    def classes(self) -> int:
        """The vocabulary that logits are of."""
        return self.config.num_outputs

    @property
    def loss_tokens(self) -> int:
        """Tokens whose loss this process computes."""
        return -(-self.tokens // self.tensor)

    @property
    def gathered_output(self) -> int:
        """Bytes of the output matrix where it is gathered from the processes that share blocks."""
        width = WIDE if self.autocast else self.narrow
        return self.classes * self.config.model_dim * width * (self.tensor > 1)

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key that the chunks allow, in all rows; a piece begins at a chunk's boundary."""
        chunk = self.config.chunk_size
        whole, rest = divmod(self.length, chunk)
        return self.rows * (whole * chunk * (chunk + 1) + rest * (rest + 1)) // 2

    @property
    def loss_is_one_block(self) -> bool:
        """Whether all logits exist at once: see `linear_cross_entropy`."""
        return self.loss_tokens * self.classes <= _BLOCK[self.device] or 4 * self.classes <= self.config.model_dim

    @property
    def loss_rows(self) -> int:
        """Tokens in a block of the loss."""
        if self.loss_is_one_block:
            return self.loss_tokens
        return min(max(_BLOCK[self.device] // self.classes // 64, 1) * 64, self.loss_tokens)

    @property
    def keeps_fc2(self) -> bool:
        """Whether the backward of a block needs what comes after the last product: a gain's input, a mask of dropout."""
        return self.config.rescale_nffn or self.config.dropout > 0

    def parameters(self) -> Iterator[Parameter]:
        """Every parameter of the model, as much of it as this process has before sharding."""
        for name, shape in self.config.parameter_shapes():
            yield Parameter(name, self._split(name, shape), _is_wide(name, shape))

    def of_block(self) -> list[Parameter]:
        return [parameter for parameter in self.parameters() if parameter.name.startswith("layers.0.")]

    def matrices_of_block(self) -> list[Parameter]:
        return [parameter for parameter in self.of_block() if len(parameter.shape) == 2 and not parameter.is_wide]

    def around_blocks(self) -> list[Parameter]:
        """Embedding, final norm and output matrix."""
        return [parameter for parameter in self.parameters() if not parameter.name.startswith("layers.")]

    def whole_in_block(self) -> list[Parameter]:
        """The parameters of a block that every process which shares it has whole."""
        if self.tensor == 1:
            return []
        whole = dict(self.config.parameter_shapes())
        return [parameter for parameter in self.of_block() if parameter.shape == tuple(whole[parameter.name])]

    def _split(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        by_heads = next((dim for part, dim in _SPLIT_BY_HEADS.items() if part in name), None)
        if by_heads is not None:
            if self.config.num_heads % self.tensor:
                return shape
            return tuple(size // self.tensor if dim == by_heads else size for dim, size in enumerate(shape))
        if any(part in name for part in _SPLIT_BY_ROWS):
            return (shape[0] // self.tensor, *shape[1:])
        if any(part in name for part in _SPLIT_BY_COLUMNS):
            return (shape[0], shape[1] // self.tensor)
        return shape


def _is_wide(name: str, shape: tuple[int, ...]) -> bool:
    """Matrices and their biases follow the model's dtype; every other parameter stays float32."""
    of_linear = (".wv.", ".wz.", ".wr.", ".wh1.", ".wh2.", ".fc1.", ".fc2.", ".fc3.")
    return not (any(part in name for part in of_linear) or name in ("embed.weight", "output.output.weight"))
