"""Chunk parallel gives what one process gives: logits, losses, gradients, states."""

from __future__ import annotations

import pytest
import torch
from chunk_parallel import Work, compare, worst

EXACT, FLOAT32 = 1e-10, 1e-5
C = 8  # the tiny model's chunk

BATCHES = {
    "dense": Work((16, 8, 11), rows=2),
    "padded": Work((16, 8, 11), rows=4, lengths=(35, 20, 16, 0)),
    "packed": Work((16, 8, 11), cu_seqlens=(0, 5, 8, 8, 33)),
    "state": Work((8, 16, 5), rows=2, past=(C, 3 * C)),
    "state within a chunk": Work((5, 16, 5), rows=2, past=(3, C + 3)),
    "padded with a state": Work((13, 8, 5), rows=3, lengths=(26, 14, 0), past=(3, C + 3, 2)),
    "packed with a state": Work((12, 8, 10), cu_seqlens=(1, 6, 6, 29), past=(3, 5, 2)),
}


@pytest.mark.parametrize("batch", BATCHES)
def test_equals_one_process(ranks, batch):
    error, where = worst(ranks.run(compare, 3, BATCHES[batch]))
    assert error < EXACT, where
