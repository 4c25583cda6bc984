"""Philox4x32-10 (Salmon et al., SC 2011), a counter-based random generator, and the DropKey mask that it generates.

The four words of a counter depend on the counter and the key alone. So a mask is the same on every device, for every
number of threads and every tiling, and the backward recomputes the mask instead of storing it.
"""

import torch
from torch import Tensor

MASK_32 = 0xFFFFFFFF


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int | Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four 32-bit words of each counter, in int64. The key is the (low, high) half of the 64-bit seed.

    A tensor of seeds, int64, is broadcast against the counters.

    >>> zero = torch.zeros((), dtype=torch.int64)
    >>> [hex(int(word)) for word in philox((zero, zero, zero, zero), seed=0)]
    ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    c0, c1, c2, c3 = counter
    key_low, key_high = seed & MASK_32, seed >> 32 & MASK_32
    for _ in range(10):
        product_0, product_2 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # int64 wraps around, which keeps the 64 bits
        c0, c1, c2, c3 = (
            (product_2 >> 32 & MASK_32) ^ c1 ^ key_low,
            product_2 & MASK_32,
            (product_0 >> 32 & MASK_32) ^ c3 ^ key_high,
            product_0 & MASK_32,
        )
        key_low, key_high = key_low + 0x9E3779B9 & MASK_32, key_high + 0xBB67AE85 & MASK_32
    return c0, c1, c2, c3


def dropkey_mask(dropkey: float, seed: int, sequence: int, num_heads: int, rows: Tensor, columns: Tensor) -> Tensor:
    """Return the mask (H, rows, columns), True where the score is dropped.

    Counter (column / 4, row, head, sequence) gives four words, one for each of four neighbouring columns; a score is
    dropped if its word, as an unsigned integer, is below floor(dropkey * 2^32).
    """
    heads = torch.arange(num_heads, device=rows.device)
    sequences = torch.full_like(heads, sequence)
    counter = (columns // 4, rows[:, None], heads[:, None, None], sequences[:, None, None])
    words = torch.stack(philox(torch.broadcast_tensors(*counter), seed), dim=-1)  # (H, rows, columns, 4)
    place = (columns % 4)[None, None, :, None]  # of a column's word among the four
    return words.take_along_dim(place, dim=-1).squeeze(-1) < int(dropkey * 2**32)


def draw_seed(device: torch.device | str = "cpu") -> Tensor:
    """Draw a DropKey seed (1,) int64 from torch's generator."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), device=device)
