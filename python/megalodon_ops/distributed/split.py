"""`split`: this rank's part of a batch."""

from bisect import bisect_right
from collections.abc import Sequence

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..ops.linear_cross_entropy.linear_cross_entropy import has_integers
from ..ops.common.checks import check_integer, check_size, check_tensor, describe


def split(
    tokens: Tensor, mesh: DeviceMesh, *, chunk_size: int, cu_seqlens: Tensor | None = None, position: int = 0
) -> Tensor:
    """Return this rank's rows of a batch, and its piece of their columns.

    Rows are divided over the mesh's dimension `data`, columns over `chunk`, in contiguous pieces of about equal length
    that end at chunk boundaries or at the row's end. Other dimensions of the mesh have no effect. If a sequence has
    fewer chunks than there are ranks, some pieces have no columns, which a model accepts.

    Args:
        tokens: (B, L, ...), the whole batch, on every rank.
        mesh: mesh with named dimensions.
        chunk_size: chunk size of the model.
        cu_seqlens: (S + 1,) offsets of sequences packed into one row, each with chunks of its own.
        position: tokens of every row's unfinished chunk before the batch, as in a state's `attention.position`.

    Returns:
        a view of `tokens`.

    Raises:
        ValueError: the mesh has no names, or `data` does not divide the rows. TypeError: a wrong type.

    Example:
        >>> import torch
        >>> from megalodon_ops.distributed import make_mesh, split
        >>> mesh = make_mesh("data=1,chunk=1", device_type="cpu")  # under torchrun: "data=2,chunk=4" and so on
        >>> split(torch.arange(6).view(2, 3), mesh, chunk_size=4).shape
        torch.Size([2, 3])
        >>> torch.distributed.destroy_process_group()
    """
    check_tensor("split", "tokens", tokens)
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"split: `mesh` must be a DeviceMesh with named dimensions, got {describe(mesh)}.")
    if mesh.mesh_dim_names is None:
        raise ValueError("split: `mesh` must have names of dimensions such as data and chunk, got none.")
    chunk_size = check_size("split", "chunk_size", chunk_size)
    if tokens.dim() < 2:
        raise ValueError(f"split: `tokens` must have shape (B, L, ...), got {tuple(tokens.shape)}.")
    position = check_integer("split", "position", position, "an integer in [0, chunk_size)", 0, chunk_size - 1)
    rank, size = rank_and_size(mesh, "data")
    if len(tokens) % size:
        raise ValueError(f"split: `tokens` must have a multiple of {size} rows, the size of `data`, got {len(tokens)}.")
    rows, length = len(tokens) // size, tokens.shape[1]
    offsets = [0, length]
    if cu_seqlens is not None:
        check_tensor("split", "cu_seqlens", cu_seqlens)
        offsets = cu_seqlens.tolist()
        ordered = has_integers(cu_seqlens) and offsets == sorted(offsets)
        if cu_seqlens.dim() != 1 or not ordered or not offsets or offsets[0] < 0 or offsets[-1] > length:
            raise ValueError(f"split: `cu_seqlens` must be ascending offsets in [0, {length}], got {offsets}.")
    tokens = tokens.narrow(0, rank * rows, rows)
    rank, size = rank_and_size(mesh, "chunk")
    begin, end = columns(rank, size, length, chunk_size, offsets, position)
    return tokens.narrow(1, begin, end - begin)


def columns(
    rank: int, ranks: int, length: int, chunk_size: int, offsets: Sequence[int], position: int | Sequence[int] = 0
) -> tuple[int, int]:
    """Return the columns [begin, end) of a rank's piece of sequences at `offsets`; position: of all, or of each one."""
    bounds = [0]
    for cut in range(1, ranks):
        bounds.append(max(_nearest_cut(cut * length / ranks, chunk_size, offsets, position), bounds[-1]))
    bounds.append(length)
    return bounds[rank], bounds[rank + 1]


def _nearest_cut(ideal: float, chunk_size: int, offsets: Sequence[int], position: int | Sequence[int]) -> int:
    """Return the chunk boundary nearest to the column `ideal`; outside of sequences, return the column."""
    s = bisect_right(offsets, ideal) - 1
    if s < 0 or s + 1 >= len(offsets):
        return round(ideal)
    begin, end = offsets[s], offsets[s + 1]
    position = position if isinstance(position, int) else position[s]
    chunk = (ideal - begin + position) // chunk_size
    before = max(begin + int(chunk) * chunk_size - position, begin)
    after = min(begin + int(chunk + 1) * chunk_size - position, end)
    return before if ideal - before <= after - ideal else after


def rank_and_size(mesh: DeviceMesh, name: str) -> tuple[int, int]:
    """This rank's index along a dimension of the mesh, and the size of this dimension."""
    if name not in mesh.mesh_dim_names:
        return 0, 1
    return mesh.get_local_rank(name), mesh.size(mesh.mesh_dim_names.index(name))
