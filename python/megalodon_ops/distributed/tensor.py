"""Tensor parallel: every rank of a group computes its own channels, norm groups, heads, values and hidden units.

The residual stream is split by channels; docs/tensor-parallel.md has the part of each rank, and what a block exchanges.
The inputs of a norm over all channels are gathered, so its kernel needs no change.

Parameters are DTensors on the mesh's dimension `tensor`, for FSDP2, the optimizer and checkpoints. Each module with
parameters is replaced by a `SplitLayer` (tensor_layers.py). Its forward replaces the parameters by plain tensors, the
rank's own parts. Depending on the arguments of its constructor, it also gathers the module's input or sums its output.
So the forward of a block is the same as in one process. All exchanges are redistributions of DTensor.

The embedding and the output matrix are split by channels, so they can be tied. In a model with `num_features`, every
rank standardises all input features and maps them to its own channels. For logits and losses, the output matrix and the
last hidden states are gathered, and each of n ranks computes 1/n of the tokens, so every loss is exact.
"""

import logging
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.utils._pytree import tree_map

from ..model.config import MegalodonConfig
from ..model.gecko_block import has_gecko_parts
from ..public_models import Megalodon, MegalodonState
from ..model.model_state import as_real, from_named, named_tensors
from .tensor_layers import SplitAttention, SplitComplexEMA, SplitEmbedding, SplitFFN, SplitInputMap, SplitLayerNorm
from .tensor_layers import SplitLinear, SplitOutput, SplitRMSNorm, SplitTimestepNorm, redistribute


# Hides torch's advice to merge an exchange of FSDP2 and one of DTensor, which every rank would print.
logging.getLogger("torch.distributed.tensor._redistribute").addFilter(
    lambda record: "sequential %s operations will be performed" not in str(record.msg)
)


def split_over(model: Megalodon, mesh: DeviceMesh) -> None:
    """Split every parameter of a model over the ranks of a mesh of one dimension, in place.

    Args:
        model: equal on all ranks, with plain parameters.
    """
    config, ranks = model.config, mesh.size()
    whole_heads = config.num_heads % ranks == 0
    first_head = mesh.get_local_rank() * config.num_heads // ranks
    heads, key_dim = max(config.num_heads // ranks, 1), config.z_dim // config.num_heads
    # A head that several ranks share: each of them has all of the head's channels of z.
    key_range = None if whole_heads else (first_head * key_dim, key_dim)  # (first channel, number of channels)
    own_config = replace(config, num_heads=heads, z_dim=heads * key_dim, value_dim=config.value_dim // ranks)
    for layer in model.layers:
        key_part = dict(part=key_range and (1, *key_range), config=own_config)
        mega = SplitAttention(layer.mega, mesh, 1 if whole_heads else None, **key_part)
        nffn = SplitFFN(layer.nffn, mesh, 0)
        layer.mega, layer.nffn = mega, nffn
        mega.timenorm = SplitTimestepNorm(mega.timenorm, mesh, 0)
        mega.cema = SplitComplexEMA(mega.cema, mesh, 0)
        mega.rmsnorm = SplitRMSNorm(mega.rmsnorm, mesh, None, gather_input=True)
        mega.wv = SplitLinear(mega.wv, mesh, 0, gather_input=True)
        mega.wz = SplitLinear(mega.wz, mesh, 0 if whole_heads else None, part=key_range and (0, *key_range))
        mega.wr = SplitLinear(mega.wr, mesh, 0)
        mega.wh1 = SplitLinear(mega.wh1, mesh, 0)
        mega.wh2 = SplitLinear(mega.wh2, mesh, 1, sum_output=True)
        nffn.norm = SplitLayerNorm(nffn.norm, mesh, None, gather_input=True)
        nffn.fc1 = SplitLinear(nffn.fc1, mesh, 0)
        nffn.fc2 = SplitLinear(nffn.fc2, mesh, 1, sum_output=True)
        if config.swiglu:
            nffn.fc3 = SplitLinear(nffn.fc3, mesh, 0)
    embed, output = model.embed, model.output
    model.embed = SplitEmbedding(embed, mesh, 1) if config.num_features is None else SplitInputMap(embed, mesh, 0)
    output.output = SplitOutput(output.output, mesh, 1)
    output.final_norm = SplitTimestepNorm(output.final_norm, mesh, 0)
    model.tie_weights()


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
    first = mesh.get_local_rank() * heads // mesh.size()
    count = max(heads // mesh.size(), 1)

    def split(tensor: Tensor, dim: int) -> Tensor:
        return redistribute(tensor, mesh, Replicate(), Shard(dim))

    return _map_state(state, split, lambda k: k.narrow(2, first, count), count)


def gather_state(state: MegalodonState, mesh: DeviceMesh, heads: int) -> MegalodonState:
    """Gather the whole state from the parts of all ranks."""
    copies = max(mesh.size() // heads, 1)

    def gather(tensor: Tensor, dim: int) -> Tensor:
        return redistribute(tensor, mesh, Shard(dim), Replicate())

    return tree_map(torch.clone, _map_state(state, gather, lambda k: gather(k, 2)[:, :, ::copies], heads))


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
