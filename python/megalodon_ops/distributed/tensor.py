"""Tensor parallel: every rank of a group computes its own channels, norm groups, heads, values and hidden units.

The residual stream is split by channels; docs/tensor-parallel.md has the part of each rank, and what a block exchanges.
The inputs of a norm over all channels are gathered, so its kernel needs no change.

Parameters are DTensors on the mesh's dimension `tensor`, for FSDP2, the optimizer and checkpoints. Each module with
parameters gets the base `SplitLayer` (tensor_layers.py). Its forward replaces the parameters by plain tensors, the
rank's own parts. Depending on the fields that `split_over` sets, it also gathers the module's input or sums its output.
So the forward of a block is the same as in one process. All exchanges are redistributions of DTensor.

The embedding and the output matrix are split by channels, so they can be tied. In a model with `num_features`, every
rank standardises all input features and maps them to its own channels. For logits and losses, the output matrix and the
last hidden states are gathered, and each of n ranks computes 1/n of the tokens, so every loss is exact.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.utils._pytree import tree_map

from ..model.config import MegalodonConfig
from ..model.gecko_block import has_gecko_parts
from ..model.layers import take_methods
from ..public_models import Megalodon, MegalodonState
from ..model.model_state import as_real, from_named, named_tensors
from .tensor_layers import SplitComplexEMA, SplitInputMap, SplitLayer, SplitOutput, redistribute


def _is_logged(record: logging.LogRecord) -> bool:
    return "sequential %s operations will be performed" not in str(record.msg)


logging.getLogger("torch.distributed.tensor._redistribute").addFilter(_is_logged)
"""Hides torch's advice to merge an exchange of FSDP2 and one of DTensor, which every rank would print"""


def split_over(model: Megalodon, mesh: DeviceMesh) -> None:
    """Split every parameter of a model over the ranks of a mesh of one dimension, in place.

    Args:
        model: equal on all ranks, with plain parameters.
    """
    config, ranks = model.config, mesh.size()
    whole_heads, first_head = config.num_heads % ranks == 0, mesh.get_local_rank() * config.num_heads // ranks
    heads, key_dim = max(config.num_heads // ranks, 1), config.z_dim // config.num_heads
    # A head that several ranks share: each of them has all of the head's channels of z.
    key_range = None if whole_heads else (first_head * key_dim, key_dim)  # (first channel, number of channels)
    own_config = replace(config, num_heads=heads, z_dim=heads * key_dim, value_dim=config.value_dim // ranks)
    split = partial(_split, mesh=mesh)
    for layer in model.layers:
        mega, nffn = layer.mega, layer.nffn
        split(mega, 1 if whole_heads else None, part=key_range and (1, *key_range))
        split(mega.timenorm, 0)
        split(mega.cema, 0, SplitComplexEMA)
        split(mega.rmsnorm, None, gather_input=True)
        split(mega.wv, 0, gather_input=True)
        split(mega.wz, 0 if whole_heads else None, part=key_range and (0, *key_range))
        split(mega.wr, 0)
        split(mega.wh1, 0)
        split(mega.wh2, 1, sum_output=True)
        split(nffn, 0)
        split(nffn.norm, None, gather_input=True)
        split(nffn.fc1, 0)
        split(nffn.fc2, 1, sum_output=True)
        if config.swiglu:
            split(nffn.fc3, 0)
        mega.config = own_config
        mega.timenorm.num_groups //= ranks
    if config.num_features is None:
        split(model.embed, 1)
    else:
        split(model.embed, 0, SplitInputMap)
    split(model.output.output, 1, SplitOutput)
    split(model.output.final_norm, 0)
    model.output.final_norm.num_groups //= ranks
    model.tie_weights()


def _split(
    module: nn.Module, dim: int | None, new_class: type[SplitLayer] | None = None, *, mesh: DeviceMesh, **fields: Any
) -> None:
    """Make a module a :class:`SplitLayer`, and its parameters DTensors, split along `dim` or replicated.

    Args:
        new_class: new class of the module; None: its own class with the base :class:`SplitLayer` in front.
        fields: values of :class:`SplitLayer`'s fields.
    """
    take_methods(module)  # a `Linear` has methods in its attributes, which would hide those of the new class
    old_class = type(module)
    # A new module would lose the given module's hooks and mode, and references to it.
    module.__class__ = new_class or type(f"Split{old_class.__name__}", (SplitLayer, old_class), {})
    vars(module).update(fields, mesh=mesh)
    for name, parameter in [*module.named_parameters(recurse=False)]:
        own = parameter.detach()
        if dim is not None:
            own = own.chunk(mesh.size(), dim)[mesh.get_local_rank()].clone(memory_format=torch.contiguous_format)
        placed = DTensor.from_local(own, mesh, [Replicate() if dim is None else Shard(dim)], run_check=False)
        module._parameters[name] = nn.Parameter(placed, requires_grad=parameter.requires_grad)


def check_can_split(caller: str, config: MegalodonConfig, ranks: int) -> None:
    """Raise a ValueError if a model cannot be split over this number of ranks."""
    if ranks == 1:
        return
    if has_gecko_parts(config):
        unsplit = "a working memory or attention to two chunks"
        raise ValueError(f"{caller}: `mesh` must have tensor = 1 for a model with {unsplit}, got {ranks}.")
    for field in ("norm_num_groups", "value_dim", "ffn_hidden_dim"):
        if (size := getattr(config, field)) % ranks:
            raise ValueError(
                f"{caller}: `mesh` must have a dimension `tensor` whose size divides {field} = {size}, got {ranks}."
            )
    if config.num_heads % ranks and ranks % config.num_heads:
        raise ValueError(
            f"{caller}: `mesh` must have a dimension `tensor` whose size divides num_heads = {config.num_heads} "
            f"or is a multiple of num_heads, got {ranks}."
        )
    for field in ("dropout", "hidden_dropout", "attention_dropout"):  # ranks would need the same masks
        if getattr(config, field):
            raise ValueError(f"{caller}: `mesh` must have tensor = 1 for a model with {field}, got {ranks}.")


def split_state(state: MegalodonState, mesh: DeviceMesh, heads: int) -> MegalodonState:
    """Return this rank's part of a whole state."""
    first, count = mesh.get_local_rank() * heads // mesh.size(), max(heads // mesh.size(), 1)
    split = partial(_redistributed, mesh=mesh, to_whole=False)
    return _map_state(state, split, lambda k: k.narrow(2, first, count), count)


def gather_state(state: MegalodonState, mesh: DeviceMesh, heads: int) -> MegalodonState:
    """Gather the whole state from the parts of all ranks."""
    gather, copies = partial(_redistributed, mesh=mesh, to_whole=True), max(mesh.size() // heads, 1)
    return tree_map(torch.clone, _map_state(state, gather, lambda k: gather(k, 2)[:, :, ::copies], heads))


def _redistributed(tensor: Tensor, dim: int, mesh: DeviceMesh, to_whole: bool) -> Tensor:
    source, target = (Shard(dim), Replicate()) if to_whole else (Replicate(), Shard(dim))
    return redistribute(tensor, mesh, source, target)


def _map_state(
    state: MegalodonState, map_tensor: Callable[[Tensor, int], Tensor], map_keys: Callable[[Tensor], Tensor], heads: int
) -> MegalodonState:
    """Apply functions to a state's keys and other tensors; `map_tensor` takes the dimension of channels or groups.

    heads: number of heads in the result.
    """

    def convert(name: str, tensor: Tensor) -> Tensor:
        field = name.rpartition(".")[2]
        if field in ("count", "position") or name.startswith("inputs."):  # the same on every rank
            return tensor
        if field == "k":
            return map_keys(tensor)
        if field == "v":
            return map_tensor(tensor.flatten(2), 2).unflatten(2, (heads, -1))
        return map_tensor(as_real(tensor), 2 if field == "residual" else 1)

    return from_named(type(state), {name: convert(name, tensor) for name, tensor in named_tensors(state).items()})
