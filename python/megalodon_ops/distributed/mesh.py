"""Meshes of processes: which ranks split the batch, the sequence and the model, and how they are started."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from .start import start
from .vote import agree
from ..ops.values import check_number, described, is_whole, shown

DIMENSIONS = ("data", "chunk", "tensor")
"""What a mesh may split, in the order of its dimensions: neighbouring ranks are those of the last one"""
OF_BATCH = ("data", "chunk")
"""The dimensions whose ranks hold different tokens of one batch"""
"""Linux's name of the threads that run gloo's calls"""
_EXPECTED = 'sizes of data, chunk and tensor, such as "data=2,chunk=2"'


def make_mesh(
    sizes: str | Mapping[str, int], *, device_type: str | None = None, timeout: float | None = None
) -> DeviceMesh:
    """A `DeviceMesh` of all processes, whose dimensions are named as :func:`parallelize` wants them.

    Where there is no process group, one is started: from the environment that `torchrun` sets, or of this process alone.
    On GPUs, each process takes the one of its `LOCAL_RANK`. Every process of a run must call this function.

    Args:
        sizes: how many ranks `data`, `chunk` and `tensor` have: "data=2,chunk=2" or {"data": 2, "chunk": 2}. Dimensions
            come in the order data, chunk, tensor, whatever the order here; the ranks of the last one are neighbours.
        device_type: "cpu" or "cuda"; None: "cuda" where there is a GPU. A group that is started uses gloo for tensors on
            the CPU and NCCL for those on GPUs.
        timeout: seconds that processes wait for each other, in a group that is started here and in the mesh's groups;
            None: torch's defaults.

    Raises:
        ValueError: the product of the sizes is not the number of processes, a size or a name is wrong, or processes
            disagree; every process raises. RuntimeError: not all processes came within `timeout`.

    Example:
        >>> import torch
        >>> from megalodon_ops.distributed import make_mesh
        >>> mesh = make_mesh("data=1", device_type="cpu")          # under torchrun: as many as there are processes
        >>> mesh.mesh_dim_names, mesh.size()
        (('data',), 1)
        >>> torch.distributed.destroy_process_group()
    """
    if not isinstance(sizes, (str, Mapping)):
        raise TypeError(f"make_mesh: `sizes` must be {_EXPECTED}, or a dictionary, got {described(sizes)}.")
    if timeout is not None:
        timeout = check_number("make_mesh", "timeout", timeout, "a positive number of seconds or None", 1e-3)
    device_type = _device_type(device_type)
    started = not dist.is_initialized()
    if started:
        _start(device_type, timeout)
    try:
        shape, fault = _shape(sizes)
        agree(dist.group.WORLD, {"sizes": _written(shape), "device_type": device_type}, fault, op="make_mesh")
        mesh = init_device_mesh(device_type, tuple(shape.values()), mesh_dim_names=tuple(shape))
        if timeout is not None:
            for name in shape:
                _set_timeout(mesh.get_group(name), timedelta(seconds=timeout))
    except BaseException:
        if started:
            dist.destroy_process_group()
        raise
    return mesh


def check_mesh(caller: str, mesh: object) -> tuple[str, ...]:
    """The names of the mesh's dimensions, or an error where they are not what the package splits."""
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"{caller}: `mesh` must be a torch.distributed DeviceMesh, got {described(mesh)}.")
    names = mesh.mesh_dim_names
    if not names or tuple(name for name in DIMENSIONS if name in names) != tuple(names):
        got = "none" if not names else ", ".join(names)
        raise ValueError(
            f"{caller}: `mesh` must have dimensions named any of {', '.join(DIMENSIONS)}, in this order, got {got}."
        )
    return names


def batch_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The ranks that share one batch, data x chunk, as a mesh of one dimension."""
    names = tuple(name for name in OF_BATCH if name in mesh.mesh_dim_names)
    if len(names) == 1:
        return mesh if mesh.ndim == 1 else mesh[names[0]]
    flat = mesh[names]._flatten("_".join(names))
    if (timeout := _timeout_of(mesh.get_group(names[0]), mesh.device_type)) is not None:
        _set_timeout(flat.get_group(), timeout)
    return flat


def with_batch(mesh: DeviceMesh) -> DeviceMesh:
    """The mesh, with a dimension data of one rank where it has tensor alone."""
    if set(mesh.mesh_dim_names) & set(OF_BATCH):
        return mesh
    return DeviceMesh(mesh.device_type, mesh.mesh.unsqueeze(0), mesh_dim_names=("data", *mesh.mesh_dim_names))


def replicating_meshes(mesh: DeviceMesh) -> tuple[DeviceMesh, DeviceMesh]:
    """The ranks of :func:`batch_mesh` as copies of one shard: (ranks, 1), which FSDP2 replicates over.

    The second is that mesh with the dimension tensor: both are parts of one.
    """
    if mesh.size() != dist.get_world_size():
        raise ValueError(
            f'parallelize: `mesh` must have all {dist.get_world_size()} processes for data="replicate", got {mesh.size()}.'
        )
    others = mesh["tensor"].size() if "tensor" in mesh.mesh_dim_names else 1
    ranks = mesh.mesh.reshape(-1, 1, others)
    whole = DeviceMesh(mesh.device_type, ranks, mesh_dim_names=("replicate", "shard", "tensor"))
    return whole["replicate", "shard"], whole


def _device_type(wanted: str | None) -> str:
    if wanted is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not isinstance(wanted, str) or wanted not in ("cpu", "cuda"):
        raise ValueError(f'make_mesh: `device_type` must be "cpu", "cuda" or None, got {described(wanted)}.')
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError('make_mesh: `device_type` must be "cpu" or None without a GPU, got "cuda".')
    return wanted


def _shape(sizes: str | Mapping[str, int]) -> tuple[dict[str, int], str | None]:
    """The size of each dimension, in order, and what is wrong with them for the processes that there are."""
    shape = _parsed(sizes) if isinstance(sizes, str) else dict(sizes)
    if not shape or not all(name in DIMENSIONS and is_whole(size, 1, 2**31 - 1) for name, size in shape.items()):
        got = repr(sizes) if isinstance(sizes, str) or len(sizes) <= len(DIMENSIONS) else shown(sizes)
        return {}, f"make_mesh: `sizes` must be {_EXPECTED}, got {got}."
    shape = {name: int(shape[name]) for name in DIMENSIONS if name in shape}
    needed, there_are = math.prod(shape.values()), dist.get_world_size()
    if needed == there_are:
        return shape, None
    product = " x ".join(f"{name} {size}" for name, size in shape.items())
    fix = f"start it by torchrun --nproc-per-node {needed}" if there_are == 1 else "change a size, or their number"
    processes = "1 process" if there_are == 1 else f"{there_are} processes"
    return (
        shape,
        f"make_mesh: `sizes` must have a product of {there_are} for {processes}, got {product} = {needed}; {fix}.",
    )


def _parsed(text: str) -> dict[str, int]:
    """The sizes that a text names; empty where it is not of the form `name=size,name=size`."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (word.strip() for word in part.partition("="))
        if name in sizes or not size.isascii() or not size.isdigit() or len(size) > 10:
            return {}
        sizes[name] = int(size)
    return sizes


def _written(shape: Mapping[str, int]) -> str:
    return ",".join(f"{name}={size}" for name, size in shape.items())


def _start(device_type: str, timeout: float | None) -> None:
    """Starts the default process group."""
    try:
        start(device_type, None if timeout is None else timedelta(seconds=timeout))
    except dist.DistError as error:
        waited = "the time-out" if timeout is None else f"{timeout:g} s"
        raise RuntimeError(
            f"make_mesh: expected {os.environ['WORLD_SIZE']} processes, but they did not find each other within {waited}; "
            f"this is rank {os.environ['RANK']}. {str(error).splitlines()[0]}"
        ) from error


def _set_timeout(group: dist.ProcessGroup, timeout: timedelta) -> None:
    """Makes the group's calls give up after so long; new groups do not take this from the default group."""
    if hasattr(dist, "set_timeout"):  # torch 2.15
        dist.set_timeout(timeout, group)
    else:
        dist.distributed_c10d._set_pg_timeout(timeout, group)


def _timeout_of(group: dist.ProcessGroup, device_type: str) -> timedelta | None:
    options = getattr(group._get_backend(torch.device(device_type)), "options", None)
    return getattr(options, "_timeout", None)
