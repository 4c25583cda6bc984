"""The pool of processes for other tests: results, failures and hangs are reported."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from ranks import RankError, Ranks


def sum_of_ranks(offset):
    total = torch.tensor([float(dist.get_rank() + offset)])
    dist.all_reduce(total)
    return dist.get_rank(), total.item()


def fails_on(rank):
    if dist.get_rank() == rank:
        raise ValueError("this rank has failed")


def hangs_on(rank):
    time.sleep(60 if dist.get_rank() == rank else 0)


def ends_on(rank):
    if dist.get_rank() == rank:
        os._exit(3)


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_rank_gives_its_result(ranks, world_size):
    total = sum(range(world_size)) + 10 * world_size
    assert ranks.run(sum_of_ranks, world_size, 10) == [(rank, total) for rank in range(world_size)]


@pytest.mark.parametrize(
    "function, message",
    [(fails_on, "this rank has failed"), (hangs_on, "no answer"), (ends_on, "the process has ended")],
)
def test_a_rank_that_fails_fails_the_test_and_the_next_test_runs(parallelize_runs, function, message):
    ranks = Ranks()
    try:
        with pytest.raises(RankError, match=f"rank 1: (.|\n)*{message}"):
            ranks.run(function, 2, 1, timeout=20 if function is not hangs_on else 2)
        assert ranks.run(sum_of_ranks, 2, 0) == [(0, 1.0), (1, 1.0)]
    finally:
        ranks.close()
