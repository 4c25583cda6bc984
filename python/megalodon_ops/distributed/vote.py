"""Processes agree before they exchange tensors, so that a fault in one of them is an error in all of them, at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist


def agree(
    group: dist.ProcessGroup, facts: Mapping[str, Any], fault: str | None = None, *, op: str = "Megalodon"
) -> None:
    """Raises the same ValueError in every rank of the group where a rank has a fault, or where facts differ.

    Args:
        facts: what must be the same in all ranks, by name.
        fault: what is wrong in this rank, as an error's text; None: nothing.
        op: begins an error about facts.
    """
    votes: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(votes, (dict(facts), fault), group=group)
    faults = {rank: of_rank for rank, (_, of_rank) in enumerate(votes) if of_rank is not None}
    if faults:
        rank, text = next(iter(faults.items()))
        if len(votes) == 1 or (len(faults) == len(votes) and len(set(faults.values())) == 1):
            raise ValueError(text)
        raise ValueError(f"on rank {dist.get_global_rank(group, rank)}: {text}")
    for name, first in votes[0][0].items():
        values = [of_rank.get(name) for of_rank, _ in votes]
        if all(value == first for value in values):
            continue
        odd = next(rank for rank, value in enumerate(values) if value != first)
        raise ValueError(
            f"{op}: `{name}` must be equal on all ranks, got {values[odd]} on rank {dist.get_global_rank(group, odd)} and "
            f"{first} on rank {dist.get_global_rank(group, 0)}."
        )
