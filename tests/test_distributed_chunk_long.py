"""A long sequence on four processes, compared with one."""

from __future__ import annotations

import pytest
import torch
from chunk_parallel import Work, compare, worst

C = 512
TOKENS = 200_000
PIECES = (98 * C, 98 * C, 97 * C, TOKENS - 293 * C)


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["float64", "float32"]
)
def test_200_000_tokens(ranks, dtype, tolerance):
    config = dict(chunk_size=C, layerwise_ckpt=True)
    error, where = worst(ranks.run(compare, 4, Work(PIECES, dtype=dtype, config=config), timeout=1200))
    assert error < tolerance, where
