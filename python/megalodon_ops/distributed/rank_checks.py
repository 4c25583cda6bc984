"""Comparison of values that must be equal on several ranks. If they are, each rank sends only two integers."""

import zlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the name before torch 2.13


def check_same_on_ranks(
    op: str, values: Mapping[str, Any], group: ProcessGroup, number: int = 0, fix: str = ""
) -> list[int]:
    """Raise the same ValueError on every rank of a group if a value differs between ranks; each rank must call this.

    Args:
        op: the beginning of the error text.
        values: values by name. Tensors are compared by shape, dtype and content, other values by their `str`.
        number: an integer that may differ between ranks.
        fix: the end of the error text.

    Returns:
        `number` of every rank, in order.
    """
    texts = {name: _text(value) for name, value in values.items()}
    own_row = torch.tensor([number, zlib.crc32(str(texts).encode())], device=device_of(group))
    table = own_row.new_empty((dist.get_world_size(group), 2))
    all_gather(table.view(-1), own_row, group=group)
    numbers, checksums = zip(*table.tolist())
    if len({*checksums}) > 1:
        all_texts: list[Any] = [None] * len(numbers)
        dist.all_gather_object(all_texts, texts, group=group)
        ranks = dist.get_process_group_ranks(group)
        names = dict.fromkeys(name for row in all_texts for name in row)
        columns = {name: [row.get(name, "nothing") for row in all_texts] for name in names}
        name, column = next((name, column) for name, column in columns.items() if len({*column}) > 1)
        other = next(i for i, text in enumerate(column) if text != column[0])
        found = f"{column[0]} on rank {ranks[0]} and {column[other]} on rank {ranks[other]}"
        found += f"; {fix}" if fix else ""
        raise ValueError(f"{op}: `{name}` must be the same on the ranks {', '.join(map(str, ranks))}, got {found}.")
    return list(numbers)


def device_of(group: ProcessGroup) -> torch.device:
    """Device for tensors that a group exchanges: the CPU if the group can, so that nothing waits for a GPU."""
    if "gloo" in dist.get_backend(group):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _text(value: Any) -> str:
    """Text of a value; for a tensor of floating-point or many numbers, a checksum of its bytes."""
    if not isinstance(value, Tensor):
        return str(value)
    kind = f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if value.is_meta or (value.numel() <= 8 and not value.is_floating_point()):
        return f"{kind} on meta" if value.is_meta else str(value.tolist())
    content = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return f"{kind} of checksum {zlib.crc32(content):08x}"
