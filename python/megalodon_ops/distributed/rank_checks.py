"""What must be alike on several ranks: a comparison that costs two integers of each rank where all is well."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the name before torch 2.13


def check_same_on_ranks(
    op: str, facts: Mapping[str, Any], group: ProcessGroup, own: int = 0, fix: str = ""
) -> list[int]:
    """Raises the same ValueError on every rank of a group where a fact is not the same on all; each rank calls this.

    Args:
        op: begins the error.
        facts: by name: tensors, of which shapes, types and values count, and what `str` tells apart.
        own: an integer that may differ.
        fix: ends the error.

    Returns:
        `own` of every rank, in order.
    """
    texts = {name: _text(fact) for name, fact in facts.items()}
    own_facts = torch.tensor([own, zlib.crc32(str(texts).encode())], device=device_of(group))
    table = own_facts.new_empty((dist.get_world_size(group), 2))
    all_gather(table.view(-1), own_facts, group=group)
    owns, checksums = zip(*table.tolist())
    if len({*checksums}) > 1:
        everyone: list[Any] = [None] * len(owns)
        dist.all_gather_object(everyone, texts, group=group)
        ranks, names = dist.get_process_group_ranks(group), dict.fromkeys(name for other in everyone for name in other)
        columns = {name: [other.get(name, "nothing") for other in everyone] for name in names}
        name, values = next((name, values) for name, values in columns.items() if len({*values}) > 1)
        other = next(i for i, value in enumerate(values) if value != values[0])
        found = f"{values[0]} on rank {ranks[0]} and {values[other]} on rank {ranks[other]}"
        found += f"; {fix}" if fix else ""
        raise ValueError(f"{op}: `{name}` must be the same on the ranks {', '.join(map(str, ranks))}, got {found}.")
    return list(owns)


def device_of(group: ProcessGroup) -> torch.device:
    """The device of tensors that the group can exchange; the CPU, where it can, as nothing then waits for a GPU."""
    if "gloo" in dist.get_backend(group):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _text(fact: Any) -> str:
    """What a fact is; a tensor of more than a few numbers by a checksum of its bytes."""
    if not isinstance(fact, Tensor):
        return str(fact)
    kind = f"{str(fact.dtype).removeprefix('torch.')} {tuple(fact.shape)}"
    if fact.is_meta or (fact.numel() <= 8 and not fact.is_floating_point()):
        return f"{kind} on meta" if fact.is_meta else str(fact.tolist())
    content = fact.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return f"{kind} of checksum {zlib.crc32(content):08x}"
