"""Data parallel by FSDP2: which parameters are gathered together, where they begin, and the whole model again."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ..model.layers import WideParameters
from ..model.model import Megalodon

try:
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
except ImportError:  # torch 2.5
    fully_shard = None


def check_torch() -> None:
    """Raises where this torch has no FSDP2, or one that adds gradients up on CPUs, as 2.7's does, instead of averaging them."""
    if fully_shard is None or not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        raise ImportError(
            "parallelize: needs a torch whose torch.distributed.fsdp.fully_shard averages gradients with gloo, such as "
            f"2.13, got {torch.__version__}."
        )


def forget_ended_groups() -> None:
    """Makes DTensors find their groups anew: torch keeps those of a mesh for an equal one, though a process group has ended."""
    try:
        from torch.distributed.tensor.debug import _clear_sharding_prop_cache as forget
    except ImportError:  # this torch offers no way
        return
    forget()


def shard(model: Megalodon, mesh: DeviceMesh, *, param_dtype: torch.dtype | None, reshard: bool) -> None:
    """Shards every parameter over the last dimension of the mesh, in place, and copies the shards over the first of two.

    A block's parameters are gathered by one exchange. Where its matrices are computed with in another dtype than its
    wide parameters, the matrices are gathered by one exchange and the wide parameters, which are few, by another. The
    embedding, the output matrix and the final norm are gathered by the model itself, so the loss multiplies with the
    output matrix as it does without shards.
    """
    wide = dict(mesh=mesh, reshard_after_forward=reshard, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    policy = MixedPrecisionPolicy(
        param_dtype=param_dtype,
        reduce_dtype=None if param_dtype is None else torch.float32,
        cast_forward_inputs=False,  # a state among the inputs stays as it is
    )
    matrices = {**wide, "mp_policy": policy}
    for block in model.layers:
        if not _has_one_dtype(block, param_dtype):
            fully_shard([module for module in _owners(block) if not isinstance(module, WideParameters)], **matrices)
        fully_shard(block, **wide)
    if not _has_one_dtype(model.output, param_dtype):
        fully_shard(model.output.final_norm, **wide)
    fully_shard(model, **matrices)
    if mesh.device_type == "cpu":  # not every gloo has an average
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)
    if not reshard:  # without a backward, nothing else would free what was gathered
        model.register_forward_hook(_reshard_without_backward)


def _owners(module: nn.Module) -> Iterator[nn.Module]:
    """The modules inside that own parameters."""
    return (part for part in module.modules() if next(part.parameters(recurse=False), None) is not None)


def _has_one_dtype(module: nn.Module, param_dtype: torch.dtype | None) -> bool:
    """Whether all parameters inside are computed with in the dtype that they are kept in."""
    return param_dtype is None and len({parameter.dtype for parameter in module.parameters()}) <= 1


def _reshard_without_backward(model: nn.Module, args: tuple, output: object) -> None:
    if not torch.is_grad_enabled():
        reshard(model)


def reshard(model: nn.Module) -> None:
    """Frees what was gathered, so that every parameter of the model is its shard."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def forget_call(model: nn.Module) -> None:
    """Makes the model ready for a next call after one that has raised before its end, in all ranks alike."""
    if hasattr(model, "reset_iter_state"):  # an older torch cannot go on after an error
        model.reset_iter_state()


@torch.no_grad()
def initialise(model: Megalodon, plain: Megalodon, device: torch.device) -> None:
    """Gives the shards of a model that was on `meta` the values of a new model, one module in memory at a time.

    The values are those of `megalodon_ops.Megalodon(config)` in one process whose generator is as that of the first rank
    is now. The generators of all ranks stay as they are.

    Args:
        plain: the model on `meta` as it was before it was sharded.
    """
    model.to_empty(device=device)
    generators = [torch.get_rng_state() if device.type == "cpu" else torch.cuda.get_rng_state(device)]
    dist.broadcast_object_list(generators)
    filled: set[int] = set()
    with torch.random.fork_rng([] if device.type == "cpu" else [device]), device:
        if device.type == "cpu":
            torch.set_rng_state(generators[0])
        else:
            torch.cuda.set_rng_state(generators[0], device)
        for name, part in plain.named_modules():
            own = dict(part.named_parameters(recurse=False))
            if not own:
                continue
            for key, parameter in own.items():
                part._parameters[key] = nn.Parameter(torch.empty_like(parameter, device=device))
            part.reset_parameters()
            for key, parameter in own.items():
                target = model.get_parameter(f"{name}.{key}".removeprefix("."))
                if id(target) not in filled:  # a tied matrix begins as the first module that has it begins
                    target.to_local().copy_(local_part(part._parameters[key], target))
                filled.add(id(target))
                part._parameters[key] = parameter


def local_part(full: Tensor, like: DTensor) -> Tensor:
    """This rank's part of a tensor that is whole in every rank, split as `like` is: by the mesh's last dimension first."""
    for dimension, placement in reversed(list(enumerate(like.placements))):
        if not placement.is_replicate():
            parts = full.chunk(like.device_mesh.size(dimension), placement.dim)
            rank = like.device_mesh.get_coordinate()[dimension]  # asks for no group, which may be one that has ended
            full = parts[rank] if rank < len(parts) else full.narrow(placement.dim, 0, 0)
    return full


@torch.no_grad()
def gathered(model: Megalodon, param_dtype: torch.dtype | None) -> Megalodon:
    """A model of this process alone with all parameters, in the dtypes that they are computed with in.

    Every rank must call this function.
    """
    reshard(model)
    short = {
        f"{name}.{key}".removeprefix(".")
        for name, part in model.named_modules()
        if not isinstance(part, WideParameters)
        for key, _ in part.named_parameters(recurse=False)
    }
    values = {}
    for name, parameter in model.named_parameters():
        values[name] = _whole(parameter.to(param_dtype) if param_dtype is not None and name in short else parameter)
    return whole_model(model, values)


def _whole(parameter: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return parameter.detach()
    local = parameter.to_local()
    return local.detach() if local.shape == parameter.shape else parameter.full_tensor().detach()


def whole_model(model: Megalodon, values: dict[str, Tensor]) -> Megalodon:
    """A plain model of the configuration and mode of `model` with these values, which are not copied."""
    with torch.device("meta"):
        plain = Megalodon(model.config)
    wanted = plain.state_dict().keys()
    if model.config.share_emb:
        values = {**values, "output.output.weight": values["embed.weight"]}
    if wanted != values.keys():
        odd = sorted(wanted ^ values.keys())[0]
        raise ValueError(
            f"parallelize: `model` must have the parameters of its configuration, got others, such as {odd}; merge adapters first."
        )
    plain.load_state_dict(values, strict=True, assign=True)
    plain.tie_weights()
    return plain.requires_grad_(False).train(model.training)
