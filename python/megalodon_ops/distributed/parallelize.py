"""One entry: a model over the processes of a mesh."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from .fsdp import check_torch, forget_ended_groups, initialise, shard
from .mesh import batch_mesh, check_mesh, replicating_meshes, with_batch
from .model import ParallelMegalodon, enable
from .sharded import ShardedMegalodon, ShardedTensorMegalodon
from .tensor import TensorMegalodon, fault_of, split_over
from .vote import agree
from ..model.model import Megalodon
from ..ops.values import check_flag, described, shown

_PARAM_DTYPES = (None, torch.bfloat16, torch.float16, torch.float32)
_BLOCK = 1 << 22  # numbers of a parameter that are summed at a time


def parallelize(
    model: Megalodon,
    mesh: DeviceMesh,
    *,
    data: str = "shard",
    param_dtype: torch.dtype | None = None,
    reshard: bool = True,
) -> ShardedMegalodon:
    """Makes a model run on all ranks of a mesh, in place.

    Every rank calls this with its copy of the model, and then calls the model with its own rows of the batch: its loss and
    its gradients are those of the whole batch. Parameters become DTensors: make the optimizer afterwards.

    Args:
        model: equal in all ranks, on any device: it moves to the mesh's. One on `meta` begins as a new model of one process
            does whose generator is as that of the first rank is; no rank holds more than one whole module of it at a time.
        mesh: of dimensions named any of data, chunk and tensor, as :func:`make_mesh` makes it. The batch's rows are split
            over data; parameters are sharded or replicated over data x chunk together. The layers are split over tensor:
            its ranks have the same tokens.
        data: "shard": each rank keeps a part of every parameter, of its gradient and of the optimizer's state, and gathers a
            block when the block runs (FSDP2). "replicate": each keeps all of them, and only gradients are exchanged.
        param_dtype: computes with the matrices in this dtype, torch.bfloat16 for one, while the parameters, their gradients
            and the optimizer's state keep theirs; parameters of :func:`megalodon_ops.wide_parameters` are never cast.
            None: as they are.
        reshard: free a gathered block after its forward and gather it again for its backward. False takes more memory and
            less exchange.

    Returns:
        the model, whose class is :class:`ShardedMegalodon` now, and FSDP2's `FSDPModule`.

    Raises:
        ValueError: an argument is wrong in some rank, or ranks have other configurations, parameters or arguments; every
        rank raises. TypeError: an argument is of a wrong type.

    Example:
        >>> import torch, megalodon_ops as mo
        >>> from megalodon_ops.distributed import make_mesh, parallelize
        >>> config = mo.MegalodonConfig(num_layers=1, model_dim=32, z_dim=16, value_dim=32, ffn_hidden_dim=32, vocab_size=9)
        >>> mesh = make_mesh("data=1", device_type="cpu")          # under torchrun: "data=4" and so on
        >>> model = parallelize(mo.Megalodon(config), mesh)
        >>> tokens = torch.randint(9, (2, 21))
        >>> model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        >>> torch.distributed.destroy_process_group()
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"parallelize: `model` must be a Megalodon, got {described(model)}.")
    names = check_mesh("parallelize", mesh)
    check_torch()
    check_flag("parallelize", "reshard", reshard)
    fault = _fault(model, names, mesh, data, param_dtype)
    everyone = _group(mesh)
    agree(everyone, {} if fault else _facts(model, data, param_dtype, reshard), fault, op="parallelize")
    mesh = with_batch(mesh)
    forget_ended_groups()
    on_meta = next(model.parameters()).is_meta
    plain = copy.deepcopy(model) if on_meta else None
    batch = batch_mesh(mesh)
    over, tensor = (batch, mesh) if data == "shard" else replicating_meshes(mesh)
    is_split = "tensor" in names and mesh["tensor"].size() > 1
    if is_split:
        if not on_meta:
            model.to(mesh.device_type)
        model.__class__ = TensorMegalodon
        split_over(model, tensor["tensor"])
    enable(
        model, mesh.get_group("chunk") if "chunk" in names else None, batch.get_group(),
        tensor_mesh=mesh["tensor"] if is_split else None, everyone=everyone,
    )  # fmt: skip
    model.__class__ = ShardedTensorMegalodon if is_split else ShardedMegalodon
    model._param_dtype = param_dtype
    # A block's parameters move to the mesh's device when the block is sharded.
    shard(model, over, param_dtype=param_dtype, reshard=reshard)
    if on_meta:
        initialise(model, plain, _device(mesh))
    for block in model.layers:
        block.mega._keep_rotary()  # for the parameters' device
    return model


def _group(mesh: DeviceMesh) -> dist.ProcessGroup:
    """The group of all ranks of the mesh."""
    if mesh.size() == dist.get_world_size():
        return dist.group.WORLD
    return (mesh if mesh.ndim == 1 else batch_mesh(mesh)).get_group()


def _device(mesh: DeviceMesh) -> torch.device:
    return torch.device("cpu") if mesh.device_type == "cpu" else torch.device("cuda", torch.cuda.current_device())


def _fault(model: nn.Module, names: tuple[str, ...], mesh: DeviceMesh, data: object, param_dtype: object) -> str | None:
    """What is wrong with the arguments of this rank."""
    if isinstance(model, ParallelMegalodon):
        return "parallelize: `model` must be one of a single process, got one that is parallel already."
    if not isinstance(model, Megalodon):
        return f"parallelize: `model` must be a Megalodon, got {described(model)}."
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return "parallelize: `model` must have plain parameters, got some that are sharded already."
    if len({parameter.is_meta for parameter in model.parameters()}) > 1:
        return "parallelize: `model` must be on `meta` as a whole or not at all, got some parameters there."
    if "tensor" in names and mesh["tensor"].size() > 1:
        if mesh.size() != dist.get_world_size():
            return f"parallelize: `mesh` must have all {dist.get_world_size()} processes for tensor > 1, got {mesh.size()}."
        wanted = {name for name, _ in model.config.parameter_shapes()}
        if odd := sorted({name for name, _ in model.named_parameters()} ^ wanted):
            return (
                f"parallelize: `model` must have the parameters of its configuration for tensor > 1, got others, such as "
                f"{odd[0]}; merge adapters first."
            )
        if (fault := fault_of(model.config, mesh["tensor"].size())) is not None:
            return fault
    if not isinstance(data, str) or data not in ("shard", "replicate"):
        return f'parallelize: `data` must be "shard" or "replicate", got {described(data)}.'
    if param_dtype not in _PARAM_DTYPES:
        return f"parallelize: `param_dtype` must be torch.bfloat16, float16, float32 or None, got {shown(param_dtype)}."
    return None


def _facts(model: Megalodon, data: str, param_dtype: torch.dtype | None, reshard: bool) -> dict[str, object]:
    """What must be the same in all ranks."""
    facts = {f"model.config.{name}": value for name, value in model.config.to_dict().items()}
    facts |= dict(data=data, param_dtype=str(param_dtype), reshard=reshard)
    for name, parameter in model.named_parameters():
        about = f"{str(parameter.dtype).removeprefix('torch.')} {tuple(parameter.shape)}"
        about += " on meta" if parameter.is_meta else f" of checksum {_checksum(parameter):x}"
        facts[f"model.{name}"] = about if parameter.requires_grad else f"{about}, frozen"
    return facts


@torch.no_grad()
def _checksum(parameter: torch.Tensor) -> int:
    """A sum that depends on every bit of a parameter and on its place."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[parameter.element_size()]
    bits = parameter.detach().contiguous().view(integers).flatten()
    place = torch.arange(1, 2 * min(_BLOCK, max(len(bits), 1)), 2, device=bits.device)  # odd: no bit is lost
    total = 0
    for number, block in enumerate(bits.split(_BLOCK)):
        total = (total * 31 + int((block * place[: len(block)]).sum())) % 2**64
    return total
