"""A long sequence on four processes, compared with one."""

from __future__ import annotations

import pytest
import torch
from chunk_parallel import Work, compare, worst

C = 512
TOKENS = 200_000
PIECES = (98 * C, 98 * C, 97 * C, TOKENS - 293 * C)


@pytest.mark.slow
def test_200_000_tokens_in_float32(ranks):
    """Where states and counts of norms would lose most to rounding."""
    config = dict(chunk_size=C, layerwise_ckpt=True)
    error, where = worst(ranks.run(compare, 4, Work(PIECES, dtype=torch.float32, config=config), timeout=1200))
    assert error < 1e-5, where
