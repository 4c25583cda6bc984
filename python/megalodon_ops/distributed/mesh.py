"""Meshes of processes: the ranks that split the batch, the sequence and the model."""

import math
import os
import re
from collections.abc import Mapping
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from .rank_checks import check_same_on_ranks
from .start import start
from ..ops.common.checks import check_number, describe, is_integer_between, short_text

DIMENSIONS = ("data", "chunk", "tensor")  # in a mesh's order; ranks along the last dimension are neighbours
_EXPECTED = 'sizes of data, chunk and tensor, such as "data=2,chunk=2"'


def make_mesh(
    sizes: str | Mapping[str, int], *, device_type: str | None = None, timeout: float | None = None
) -> DeviceMesh:
    """Make a `DeviceMesh` of all processes, with the dimension names that :func:`parallelize` expects.

    If there is no process group, this function starts one, from the environment that `torchrun` sets, or else with this
    process only. With GPUs, each process takes the GPU of its `LOCAL_RANK`. Every process of a run must call it.

    Args:
        sizes: number of ranks of `data`, `chunk` and `tensor`: "data=2,chunk=2" or {"data": 2, "chunk": 2}. The mesh
            always has the order data, chunk, tensor. Ranks along its last dimension are neighbours.
        device_type: "cpu" or "cuda"; None: "cuda" if there is a GPU. A new process group uses gloo on the CPU and NCCL
            on GPUs.
        timeout: seconds that processes wait for each other, in new groups and the mesh's; None: torch's defaults.

    Raises:
        ValueError: the product of the sizes is not the number of processes, a size or a name is wrong, or processes
            disagree. RuntimeError: some processes did not join within `timeout`.

    Example:
        >>> import torch
        >>> from megalodon_ops.distributed import make_mesh
        >>> mesh = make_mesh("data=1", device_type="cpu")          # under torchrun: as many as there are processes
        >>> mesh.mesh_dim_names, mesh.size()
        (('data',), 1)
        >>> torch.distributed.destroy_process_group()
    """
    if not isinstance(sizes, (str, Mapping)):
        raise TypeError(f"make_mesh: `sizes` must be {_EXPECTED}, or a dictionary, got {describe(sizes)}.")
    if timeout is not None:
        timeout = check_number("make_mesh", "timeout", timeout, "a positive number of seconds or None", 1e-3)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    if device_type not in (None, "cpu", default):
        expected = '"cpu", "cuda" or None' if default == "cuda" else '"cpu" or None without a GPU'
        raise ValueError(f"make_mesh: `device_type` must be {expected}, got {describe(device_type)}.")
    device_type = device_type or default
    started = not dist.is_initialized()
    if started:
        _start(device_type, timeout)
    try:
        shape = _shape(sizes)
        check_same_on_ranks("make_mesh", {"sizes": shape, "device_type": device_type}, dist.group.WORLD)
        mesh = init_device_mesh(device_type, tuple(shape.values()), mesh_dim_names=tuple(shape))
        _set_timeout(mesh, None if timeout is None else timedelta(seconds=timeout))
    except BaseException:
        if started:
            dist.destroy_process_group()
        raise
    return mesh


def check_mesh(caller: str, mesh: object) -> dict[str, int]:
    """Return the sizes of a mesh's dimensions by name; raise an error if the package cannot use the mesh."""
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"{caller}: `mesh` must be a torch.distributed DeviceMesh, got {describe(mesh)}.")
    names = mesh.mesh_dim_names
    if not names or tuple(name for name in DIMENSIONS if name in names) != tuple(names):
        got = "none" if not names else ", ".join(names)
        raise ValueError(
            f"{caller}: `mesh` must have dimensions named any of {', '.join(DIMENSIONS)}, in this order, got {got}."
        )
    if mesh.size() != dist.get_world_size():
        raise ValueError(f"{caller}: `mesh` must have all {dist.get_world_size()} processes, got {mesh.size()}.")
    return dict(zip(names, mesh.mesh.shape))


def batch_and_tensor_meshes(mesh: DeviceMesh, *, replicate: bool) -> tuple[DeviceMesh, DeviceMesh]:
    """Return two submeshes of one mesh: the ranks of data x chunk together, for FSDP2, and the ranks of `tensor`.

    The first has shape (ranks,), over which FSDP2 shards. With `replicate` it has shape (ranks, 1): FSDP2
    replicates over its first dimension and shards over its last.
    """
    tensor = mesh["tensor"].size() if "tensor" in mesh.mesh_dim_names else 1
    names = ("replicate", "shard") if replicate else ("shard",)
    ranks = mesh.mesh.reshape(-1, 1, tensor) if replicate else mesh.mesh.reshape(-1, tensor)
    whole = DeviceMesh(mesh.device_type, ranks, mesh_dim_names=(*names, "tensor"))
    options = getattr(mesh.get_group(0)._get_backend(torch.device(mesh.device_type)), "options", None)
    _set_timeout(whole, getattr(options, "_timeout", None))
    return whole[names], whole["tensor"]


def _shape(sizes: str | Mapping[str, int]) -> dict[str, int]:
    """Return the size of each dimension, in order; raise a ValueError if they do not fit the number of processes."""
    by_name = sizes
    if isinstance(sizes, str):
        parts = [part.partition("=") for part in sizes.split(",")]
        by_name = {name.strip(): int(size) for name, _, size in parts if re.fullmatch(r"\s*[0-9]{1,9}\s*", size)}
        by_name = by_name if len(by_name) == len(parts) else {}
    if not by_name or not all(
        name in DIMENSIONS and is_integer_between(size, 1, 2**31 - 1) for name, size in by_name.items()
    ):
        got = short_text(sizes) if len(sizes) > 64 else repr(sizes)
        raise ValueError(f"make_mesh: `sizes` must be {_EXPECTED}, got {got}.")
    shape = {name: int(by_name[name]) for name in DIMENSIONS if name in by_name}
    needed, world_size = math.prod(shape.values()), dist.get_world_size()
    if needed != world_size:
        product = " x ".join(f"{name} {size}" for name, size in shape.items())
        processes, fix = f"{world_size} processes", "change a size or the number of processes"
        if world_size == 1:
            processes, fix = "1 process", f"start it by torchrun --nproc-per-node {needed}"
        raise ValueError(
            f"make_mesh: `sizes` must have a product of {world_size} for {processes}, got {product} = {needed}; {fix}."
        )
    return shape


def _start(device_type: str, timeout: float | None) -> None:
    try:
        start(device_type, None if timeout is None else timedelta(seconds=timeout))
    except dist.DistError as error:
        waited = "the time-out" if timeout is None else f"{timeout:g} s"
        raise RuntimeError(
            f"make_mesh: expected {os.environ['WORLD_SIZE']} processes, but they did not find each other within "
            f"{waited}; this is rank {os.environ['RANK']}. {str(error).splitlines()[0]}"
        ) from error


def _set_timeout(mesh: DeviceMesh, timeout: timedelta | None) -> None:
    """Set the time-out of the mesh's groups, as new groups do not inherit that of the default group."""
    if timeout is None:
        return
    for group in mesh.get_all_groups():
        if hasattr(dist, "set_timeout"):  # torch 2.15
            dist.set_timeout(timeout, group)
        else:
            dist.distributed_c10d._set_pg_timeout(timeout, group)
