"""Tensor parallel: every rank of a group computes its own channels, norm groups, heads, values and hidden units.

The residual stream is split by channels. With n ranks, D channels and T tokens, a block exchanges

    t = timestep_norm(x)          own groups
    v = silu(wv t)                t is gathered over channels; own values
    c = cema(t)                   own channels
    m = rms_norm(c)               c is gathered; every rank computes all of m
    z, r, wh1 m                   own heads, values, channels
    y = x + wh1 m + wh2(a r)      the sum over ranks of wh2's products is scattered; own channels
    n = layer_norm(y)             y is gathered; every rank computes all of n
    x + fc2(silu(fc1 n) ..)       own hidden units; the sum is scattered; own channels

so three all-gathers and two reduce-scatters of T D numbers, and in the backward the opposite of each. The inputs of a
norm over all channels are gathered, as its output would have to be; the kernels of norms stay as they are.

Parameters are DTensors on the mesh's dimension `tensor`, for FSDP2, the optimizer and checkpoints. Each module that has
some gets `OwnPart` (tensor_layers.py) as a base, whose forward puts plain tensors, the rank's own parts, in the place
of the parameters, and gathers the module's input or sums its output where this is said below. That is all the kernels
need: the forward of a block stays as it is written for one process. All exchanges are DTensor's redistributions.

The embedding and the output matrix are split by channels, too, so that they can be one. For logits and losses the
output matrix and the last hidden states are gathered, and each rank computes 1/n of the tokens, so every loss is exact.

Where the ranks are more than the heads, some ranks share a head: each computes the head's queries and keys, and its own
part of the head's values.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.utils._pytree import tree_map

from ..model.blocks import BlockState
from ..model.config import MegalodonConfig
from ..model.gecko_block import GeckoAttention
from ..model.megalodon import Megalodon
from ..model.model_state import MegalodonState
from ..ops.common.states import AttentionState, TimestepNormState
from .tensor_layers import OwnComplexEMA, OwnOutput, OwnPart, exchanged


def _is_heard(record: logging.LogRecord) -> bool:
    return "sequential %s operations will be performed" not in str(record.msg)


logging.getLogger("torch.distributed.tensor._redistribute").addFilter(_is_heard)
"""Says on every rank that FSDP2's and DTensor's own exchanges of norms and of whole tensors could be one, not two"""


def split_over(model: Megalodon, mesh: DeviceMesh) -> None:
    """Splits every parameter of a model over the ranks of a mesh of one dimension, in place.

    Args:
        model: equal on all ranks, with plain parameters.
    """
    config, ranks = model.config, mesh.size()
    whole_heads, first_head = config.num_heads % ranks == 0, mesh.get_local_rank() * config.num_heads // ranks
    heads, key_dim = max(config.num_heads // ranks, 1), config.z_dim // config.num_heads
    part = None if whole_heads else (first_head * key_dim, key_dim)  # of what ranks share that share a head
    own = replace(config, num_heads=heads, z_dim=heads * key_dim, value_dim=config.value_dim // ranks)
    split = partial(_split, mesh=mesh)
    for layer in model.layers:
        mega, nffn = layer.mega, layer.nffn
        split(mega, 1 if whole_heads else None, part=part and (1, *part))
        split(mega.timenorm, 0)
        split(mega.cema, 0, OwnComplexEMA)
        split(mega.rmsnorm, None, gathers=True)
        split(mega.wv, 0, gathers=True)
        split(mega.wz, 0 if whole_heads else None, part=part and (0, *part))
        split(mega.wr, 0)
        split(mega.wh1, 0)
        split(mega.wh2, 1, sums=True)
        split(nffn, 0)
        split(nffn.norm, None, gathers=True)
        split(nffn.fc1, 0)
        split(nffn.fc2, 1, sums=True)
        if config.swiglu:
            split(nffn.fc3, 0)
        mega.config = own
        mega.timenorm.num_groups //= ranks
    split(model.embed, 1)
    split(model.output.output, 1, OwnOutput)
    split(model.output.final_norm, 0)
    model.output.final_norm.num_groups //= ranks
    model.tie_weights()


def _split(
    module: nn.Module,
    dim: int | None,
    made: type[OwnPart] | None = None,
    *,
    mesh: DeviceMesh,
    gathers: bool = False,
    sums: bool = False,
    part: tuple[int, int, int] | None = None,
) -> None:
    """Makes a module an :class:`OwnPart`, and its parameters DTensors that are split along `dim`, or not at all.

    Args:
        made: the class that the module gets; None: its own with the base.
        gathers, sums, part: as of :class:`OwnPart`.
    """
    of_class = type(module)
    module.__class__ = made or type(f"Own{of_class.__name__}", (OwnPart, of_class), {})
    module.mesh, module.gathers, module.sums, module.part = mesh, gathers, sums, part
    for name, parameter in [*module.named_parameters(recurse=False)]:
        own = parameter.detach()
        if dim is not None:
            own = own.chunk(mesh.size(), dim)[mesh.get_local_rank()].clone(memory_format=torch.contiguous_format)
        placed = DTensor.from_local(own, mesh, [Replicate() if dim is None else Shard(dim)], run_check=False)
        module._parameters[name] = nn.Parameter(placed, requires_grad=parameter.requires_grad)


def check_can_split(caller: str, config: MegalodonConfig, ranks: int) -> None:
    """Raise a ValueError if a model cannot be split over so many ranks."""
    if ranks == 1:
        return
    if GeckoAttention.serves(config):
        unsplit = "a working memory or attention to two chunks"
        raise ValueError(f"{caller}: `mesh` must have tensor = 1 for a model with {unsplit}, got {ranks}.")
    for field in ("norm_num_groups", "value_dim", "ffn_hidden_dim"):
        if (size := getattr(config, field)) % ranks:
            raise ValueError(f"{caller}: `mesh` must have a size of tensor that divides {field} = {size}, got {ranks}.")
    if config.num_heads % ranks and ranks % config.num_heads:
        raise ValueError(
            f"{caller}: `mesh` must have a size of tensor that divides num_heads = {config.num_heads} or that it "
            f"divides, got {ranks}."
        )
    for field in ("dropout", "hidden_dropout", "attention_dropout"):  # whose masks ranks would have to agree on
        if getattr(config, field):
            raise ValueError(f"{caller}: `mesh` must have tensor = 1 for a model with {field}, got {ranks}.")


def split_state(state: MegalodonState, mesh: DeviceMesh, heads: int) -> MegalodonState:
    """What this rank's layers take of a whole state."""

    def own(tensor: Tensor, dim: int) -> Tensor:
        return exchanged(tensor, mesh, Replicate(), Shard(dim))

    def of_attention(whole: AttentionState) -> AttentionState:
        count = max(heads // mesh.size(), 1)
        k = whole.k.narrow(2, mesh.get_local_rank() * heads // mesh.size(), count)
        return AttentionState(k, own(whole.v.flatten(2), 2).unflatten(2, (count, -1)), whole.position)

    return _parts(state, own, of_attention)


def joined_state(state: MegalodonState, mesh: DeviceMesh, heads: int) -> MegalodonState:
    """The whole state of what the ranks' layers have returned."""

    def whole(tensor: Tensor, dim: int) -> Tensor:
        return exchanged(tensor, mesh, Shard(dim), Replicate())

    def of_attention(own: AttentionState) -> AttentionState:
        k, v = whole(own.k, 2), whole(own.v.flatten(2), 2).unflatten(2, (heads, -1))
        return AttentionState(k[:, :, :: max(mesh.size() // heads, 1)], v, own.position)

    return tree_map(torch.clone, _parts(state, whole, of_attention))


def _parts(
    state: MegalodonState,
    part: Callable[[Tensor, int], Tensor],
    of_attention: Callable[[AttentionState], AttentionState],
) -> MegalodonState:
    """A state whose tensors are exchanged: `part` takes a tensor and its dimension of channels or groups."""

    def of_norm(norm: TimestepNormState) -> TimestepNormState:
        residual = None if norm.residual is None else part(norm.residual, 2)
        return TimestepNormState(norm.count, part(norm.mean, 1), part(norm.var, 1), residual)

    def of_block(block: BlockState) -> BlockState:
        cema = torch.view_as_complex(part(torch.view_as_real(block.cema), 1))
        return BlockState(of_norm(block.norm), cema, of_attention(block.attention))

    return MegalodonState(tuple(map(of_block, state.layers)), of_norm(state.norm))
