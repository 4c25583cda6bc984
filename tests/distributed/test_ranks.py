"""The pool of processes for other tests: failures and hangs are reported, as other tests do not show."""

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


@pytest.mark.parametrize("function, message", [(fails_on, "this rank has failed"), (hangs_on, "no answer")])
def test_a_rank_that_fails_fails_the_test_and_the_next_test_runs(parallelize_runs, function, message):
    ranks = Ranks()
    try:
        with pytest.raises(RankError, match=f"rank 1: (.|\n)*{message}"):
            ranks.run(function, 2, 1, timeout=2 if function is hangs_on else 20)
        assert ranks.run(sum_of_ranks, 2, 0) == [(0, 1.0), (1, 1.0)]
    finally:
        ranks.close()
