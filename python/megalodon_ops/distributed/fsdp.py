"""Data parallel by FSDP2: sharding, initialisation of the shards, and gathering of the whole model."""

import contextlib

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ..inference.parameters import empty_model, with_values
from ..model.layers import WideParameters, wide_parameters
from ..public_models import Megalodon, MegalodonEncoder
from ..storage.weights import set_whole

try:
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
except ImportError:  # torch 2.5
    fully_shard = None


def check_torch() -> None:
    """Raise an ImportError if this torch has no FSDP2, or one that cannot average gradients on CPUs, such as 2.7's."""
    if fully_shard is None or not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        raise ImportError(
            "parallelize: needs a torch whose torch.distributed.fsdp.fully_shard averages gradients with gloo, such as "
            f"2.13, got {torch.__version__}."
        )


def forget_ended_groups() -> None:
    """Clear DTensor's cache; otherwise a mesh equal to an earlier one would get the ended groups of the earlier one."""
    with contextlib.suppress(ImportError):  # older torch
        from torch.distributed.tensor.debug import _clear_sharding_prop_cache as clear_cache

        clear_cache()


def shard(model: Megalodon, mesh: DeviceMesh, param_dtype: torch.dtype | None) -> None:
    """Shard every parameter over a mesh's last dimension, in place; if there are two, replicate over the first.

    One exchange gathers a block's parameters, or two if the matrices are cast to another dtype than the few wide
    parameters. The model gathers embedding, output matrix and final norm, so the loss finds the whole output matrix.
    """
    wide = dict(mesh=mesh, reshard_after_forward=True, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    policy = MixedPrecisionPolicy(
        param_dtype=param_dtype,
        reduce_dtype=None if param_dtype is None else torch.float32,
        cast_forward_inputs=False,  # states must not be cast
    )
    matrices = {**wide, "mp_policy": policy}
    for block in model.layers:
        if not _has_one_dtype(block, param_dtype):
            owners = [module for module in block.modules() if [*module.parameters(recurse=False)]]
            fully_shard([module for module in owners if not isinstance(module, WideParameters)], **matrices)
        fully_shard(block, **wide)
    output = getattr(model, "output", model)
    if not _has_one_dtype(output, param_dtype):
        fully_shard(output.final_norm, **wide)
    fully_shard(model, **matrices)
    if mesh.device_type == "cpu":  # some versions of gloo cannot average
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)


def _has_one_dtype(module: nn.Module, param_dtype: torch.dtype | None) -> bool:
    """Return True if all parameters have one dtype and are not cast."""
    return param_dtype is None and len({parameter.dtype for parameter in module.parameters()}) <= 1


@torch.no_grad()
def initialise(model: Megalodon, plain: Megalodon, device: str) -> None:
    """Initialise the shards of a model that was on `meta`, with one whole module in memory at a time.

    The values are those of `megalodon_ops.Megalodon(config)` in one process with the random state of rank 0. The
    generators of all ranks stay unchanged. `plain` is a copy of the model from before the sharding.
    """
    model.to_empty(device=device)
    random = torch if device == "cpu" else torch.cuda
    generators = [random.get_rng_state()]
    dist.broadcast_object_list(generators)
    with torch.random.fork_rng([] if device == "cpu" else [torch.cuda.current_device()]):
        random.set_rng_state(generators[0])
        for name, part in plain.named_modules():
            if next(part.parameters(recurse=False), None) is None:
                continue
            part.to_empty(device=device, recurse=False)
            part.reset_parameters()
            if not (model.config.share_emb and name == "output.output"):  # the same matrix as the embedding
                for key, value in part.named_parameters(recurse=False):
                    set_whole(model.get_parameter(f"{name}.{key}"), value)
            part.to_empty(device="meta", recurse=False)


@torch.no_grad()
def gather_model(model: Megalodon, param_dtype: torch.dtype | None = None) -> Megalodon:
    """Return a model for one process with all parameters, matrices in `param_dtype`; every rank must call this."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    wide, values = wide_parameters(model), {}
    for name, parameter in model.named_parameters():
        if param_dtype is not None and name not in wide:
            parameter = parameter.to(param_dtype)
        values[name] = (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach()
    return whole_model(model, values)


def whole_model(model: Megalodon, values: dict[str, Tensor]) -> Megalodon:
    """Return a plain model with the configuration and mode of `model` and these values, which are not copied."""
    kind = MegalodonEncoder if isinstance(model, MegalodonEncoder) else Megalodon
    plain = empty_model(kind, model.config, torch.float32)
    if model.config.share_emb:
        values = {**values, "output.output.weight": values["embed.weight"]}
    if differing := sorted(plain.state_dict().keys() ^ values.keys()):
        raise ValueError(
            f"parallelize: `model` must have the parameters of its configuration, got others, such as {differing[0]}; "
            "merge adapters first."
        )
    return with_values(plain, values).requires_grad_(False).train(model.training)
