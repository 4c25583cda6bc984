"""`parallelize`: a model over the processes of a mesh."""

import copy

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from .rank_checks import check_same_on_ranks
from .fsdp import check_torch, forget_ended_groups, initialise, shard
from .mesh import batch_and_tensor_meshes, check_mesh
from .parallel_model import ParallelMegalodon, ParallelMegalodonEncoder, Ranks
from .tensor import check_can_split, split_over
from ..public_models import Megalodon, MegalodonEncoder
from ..ops.common.checks import describe, short_text


def parallelize(
    model: Megalodon | MegalodonEncoder,
    mesh: DeviceMesh,
    *,
    data: str = "shard",
    param_dtype: torch.dtype | None = None,
) -> ParallelMegalodon | ParallelMegalodonEncoder:
    """Move the modules of a model into a model that runs on all ranks of a mesh.

    Every rank calls this with its copy of the model, and then calls the result with its own rows of the batch: the loss
    and the gradients are those of the whole batch. Parameters become DTensors: make the optimizer afterwards.

    Args:
        model: equal on all ranks, on any device; it is moved to the mesh's device. A model on `meta` gets the values
            that one process would draw with rank 0's generator; a rank holds one whole module at a time.
        mesh: a mesh of all processes, as :func:`make_mesh` returns it. Rows of the batch are split over its dimension
            data, the sequence over chunk; parameters are sharded or replicated over data x chunk together. Layers are
            split over tensor, whose ranks have the same tokens. An encoder accepts only data.
        data: "shard": each rank keeps a part of every parameter, of its gradient and of the optimizer's state, and
            gathers a block when it runs (FSDP2). "replicate": each keeps all of them, and exchanges only gradients.
        param_dtype: dtype in which matrices are computed, such as torch.bfloat16, while the parameters, their gradients
            and the optimizer's state keep theirs; :func:`megalodon_ops.wide_parameters` are never cast. None: no cast.

    Returns:
        a :class:`ParallelMegalodon` or :class:`ParallelMegalodonEncoder`, which is also FSDP2's `FSDPModule`. It has
        the modules of `model`, its mode and its hooks; `model` is left without modules.

    Raises:
        ValueError: an argument is wrong, or differs between ranks; then all ranks raise it. TypeError: a wrong type.

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
    check_torch()
    sizes = check_mesh("parallelize", mesh)
    _check(model, sizes, data, param_dtype)
    compared = {f"model.config.{name}": value for name, value in model.config.to_dict().items()}
    compared |= {"data": data, "param_dtype": param_dtype}
    for name, parameter in model.named_parameters():
        compared |= {f"model.{name}": parameter, f"model.{name}.requires_grad": parameter.requires_grad}
    check_same_on_ranks("parallelize", compared, dist.group.WORLD)
    forget_ended_groups()
    on_meta = next(model.parameters()).is_meta
    plain = copy.deepcopy(model) if on_meta else None
    batch, tensor = batch_and_tensor_meshes(mesh, replicate=data == "replicate")
    splits_sequence, splits_layers = sizes.get("chunk", 1) > 1, sizes.get("tensor", 1) > 1
    if splits_layers:
        if not on_meta:
            model.to(mesh.device_type)
        split_over(model, tensor)
    ranks = Ranks(
        batch=batch.get_group(0),
        chunk=mesh.get_group("chunk") if splits_sequence else None,
        tensor=tensor if splits_layers else None,
        param_dtype=param_dtype,
    )
    model = (ParallelMegalodonEncoder if isinstance(model, MegalodonEncoder) else ParallelMegalodon)(model, ranks)
    # A block's parameters move to the mesh's device when the block is sharded.
    shard(model, batch, param_dtype)
    if on_meta:
        initialise(model, plain, mesh.device_type)
    for block in model.layers:
        block.mega._update_rotary()  # on the parameters' new device
    return model


def _check(model: nn.Module, sizes: dict[str, int], data: object, param_dtype: object) -> None:
    """Raise an error if an argument of this rank is wrong."""
    # A subclass would lose its forward. A model without modules has been passed to `parallelize` before.
    if type(model) not in (Megalodon, MegalodonEncoder) or not model._modules:
        raise TypeError(
            "parallelize: `model` must be a Megalodon or a MegalodonEncoder that is not parallel yet, got "
            f"{describe(model)}."
        )
    for name, size in sizes.items():
        if size > 1 and name != "data" and isinstance(model, MegalodonEncoder):
            raise ValueError(
                f"parallelize: `mesh` must have {name} = 1 for an encoder, got {size}; only rows are split."
            )
    if sizes.get("chunk", 1) > 1 and model.config.missing_values:
        raise ValueError(
            f"parallelize: `mesh` must have chunk = 1 for a model with missing_values, got {sizes['chunk']}; pieces do "
            "not exchange counts of single features."
        )
    if quantization := getattr(model, "quantization", None):
        raise ValueError(f"parallelize: `model` must have floating-point weights, got {quantization} weights.")
    check_can_split("parallelize", model.config, tensor := sizes.get("tensor", 1))
    if tensor > 1:
        names = {name for name, _ in model.config.parameter_shapes()}
        if differing := sorted({name for name, _ in model.named_parameters()} ^ names):
            raise ValueError(
                "parallelize: `model` must have the parameters of its configuration for tensor > 1, got others, such "
                f"as {differing[0]}; merge adapters first."
            )
    if not isinstance(data, str) or data not in ("shard", "replicate"):
        raise ValueError(f'parallelize: `data` must be "shard" or "replicate", got {describe(data)}.')
    if param_dtype not in (None, torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(
            f"parallelize: `param_dtype` must be torch.bfloat16, float16, float32 or None, got {short_text(param_dtype)}."
        )
