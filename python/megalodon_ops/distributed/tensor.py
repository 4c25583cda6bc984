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

so three all-gathers and two reduce-scatters of T D numbers, and in the backward the opposite of each. A norm over all
channels could be computed on a rank's own ones with an exchange of one number a token; its output would have to be
gathered all the same, so the inputs are gathered instead and the norms' kernels stay as they are.

Parameters are DTensors on the mesh's dimension `tensor`, made by torch's `parallelize_module`; each module that has some
becomes one of the classes of tensor_layers.py, whose forward sees plain tensors, the rank's own parts, in the place of its
parameters. That is all the kernels need, the forward of a block stays as it is written for one process, and FSDP2,
the optimizer and checkpoints see DTensors. A change of class also serves a method that is no forward, such as
`ComplexEMA.coefficients`, which hooks on a forward do not reach. All exchanges are DTensor's redistributions.

The embedding and the output matrix are split by channels, too, so that they can be one. For logits and losses the output
matrix and the last hidden states are gathered, and each rank computes 1/n of the tokens: `linear_cross_entropy` stays as
it is, and every loss is exact.

Where the ranks are more than the heads, some ranks share a head: each computes the head's queries and keys, and its own
part of the head's values.

Dropout draws one mask on all ranks for m, which all ranks have, one on those that share a head for its keys, and another
on each rank for what is split. All come from the generator of the group's first rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module
from torch.utils._pytree import tree_map

from ..model.blocks import BlockState
from ..model.config import MegalodonConfig
from ..model.model import Megalodon, masked_targets
from ..model.states import MegalodonState
from ..ops.loss import linear_cross_entropy
from ..ops.states import AttentionState, TimestepNormState
from .tensor_layers import (
    GatheringLayerNorm, GatheringLinear, GatheringRMSNorm, OwnAttention, OwnComplexEMA, OwnEmbedding, OwnFFN, OwnLinear,
    OwnPart, OwnTimestepNorm, SharedOutput, SummingLinear, draws, exchanged, random_again, set_seed,
)  # fmt: skip


class _Style(ParallelStyle):
    """Splits a module's own parameters, each along a dimension or not at all, and makes it one of the classes of tensor_layers.py."""

    def __init__(self, of_class: type[OwnPart], dim: int | None, shared_head: tuple[int, int] | None = None) -> None:
        self.of_class, self.dim, self.shared_head = of_class, dim, shared_head

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module.__class__ = self.of_class
        module.mesh, module.of_shared_head = device_mesh, {}
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                own = _placed(parameter, device_mesh, self.dim)
                module._parameters[name] = nn.Parameter(own, requires_grad=parameter.requires_grad)
                if self.shared_head is not None:
                    module.of_shared_head[name] = (
                        parameter.dim() - 1 if self.of_class is OwnAttention else 0,
                        *self.shared_head,
                    )
        return module


def _placed(parameter: Tensor, mesh: DeviceMesh, dim: int | None) -> DTensor:
    """A DTensor of a parameter that all ranks have, without an exchange."""
    own = parameter.detach()
    if dim is not None:
        own = own.chunk(mesh.size(), dim)[mesh.get_local_rank()].clone(memory_format=torch.contiguous_format)
    return DTensor.from_local(own, mesh, [Replicate() if dim is None else Shard(dim)], run_check=False)


def fault_of(config: MegalodonConfig, ranks: int) -> str | None:
    """Why the sizes of a model cannot be split over so many ranks."""
    for field in ("norm_num_groups", "value_dim", "ffn_hidden_dim"):
        if (size := getattr(config, field)) % ranks:
            return f"parallelize: `mesh` must have a size of tensor that divides {field} = {size}, got {ranks}."
    if config.num_heads % ranks and ranks % config.num_heads:
        return (
            f"parallelize: `mesh` must have a size of tensor that divides num_heads = {config.num_heads} or that it divides, "
            f"got {ranks}."
        )
    return None


def split_over(model: Megalodon, mesh: DeviceMesh) -> None:
    """Splits every parameter of a model over the ranks of a mesh of one dimension, in place.

    Args:
        model: equal on all ranks, with plain parameters; of a class that :class:`TensorMegalodon` is a base of.
    """
    config, ranks, rank = model.config, mesh.size(), mesh.get_local_rank()
    whole_heads = config.num_heads % ranks == 0
    heads, key_dim = max(config.num_heads // ranks, 1), config.z_dim // config.num_heads
    shared = None if whole_heads else (rank * config.num_heads // ranks * key_dim, key_dim)
    half = {
        "timenorm": _Style(OwnTimestepNorm, 0),
        "cema": _Style(OwnComplexEMA, 0),
        "rmsnorm": _Style(GatheringRMSNorm, None),
        "wv": _Style(GatheringLinear, 0),
        "wz": _Style(OwnLinear, 0 if whole_heads else None, shared),
        "wr": _Style(OwnLinear, 0),
        "wh1": _Style(OwnLinear, 0),
        "wh2": _Style(SummingLinear, 1),
    }
    other_half = {
        "norm": _Style(GatheringLayerNorm, None),
        "fc1": _Style(OwnLinear, 0),
        "fc2": _Style(SummingLinear, 1),
        **({"fc3": _Style(OwnLinear, 0)} if config.swiglu else {}),
    }
    block = {"mega": _Style(OwnAttention, 1 if whole_heads else None, shared), "nffn": _Style(OwnFFN, 0)}
    block |= {f"mega.{name}": style for name, style in half.items()}
    block |= {f"nffn.{name}": style for name, style in other_half.items()}
    plan = {f"layers.*.{name}": style for name, style in block.items()}
    plan["embed"], plan["output.output"] = _Style(OwnEmbedding, 1), _Style(SharedOutput, 1)
    plan["output.final_norm"] = _Style(OwnTimestepNorm, 0)
    parallelize_module(model, mesh, plan)
    own = replace(config, num_heads=heads, z_dim=heads * key_dim, value_dim=config.value_dim // ranks)
    for layer in model.layers:
        layer.mega.config, layer.mega.heads_of_all = own, config.num_heads
        layer.mega.first_head = rank * config.num_heads // ranks
        layer.mega.timenorm.num_groups //= ranks
    model.output.final_norm.num_groups //= ranks
    model.tie_weights()
    model.tensor_mesh = mesh


class TensorMegalodon(Megalodon):
    """A model whose layers are split over the ranks of a group, all of which call it with the same arguments.

    Logits, losses and states are those of one process, the same on every rank.
    """

    tensor_mesh: DeviceMesh

    def forward(
        self, tokens: Tensor, targets: Tensor | None = None, *, state: MegalodonState | None = None,
        return_state: bool = False, **options: Any,
    ) -> Tensor | tuple[Tensor, MegalodonState]:  # fmt: skip
        """As :meth:`Megalodon.forward`."""
        if isinstance(state, MegalodonState):
            state = self._own_state(state)
        with self._one_generator() if draws(self) else contextlib.nullcontext():
            result = super().forward(tokens, targets, state=state, return_state=return_state, **options)
        return (result[0], self._whole_state(result[1])) if return_state else result

    def _cross_entropy(
        self, hidden: Tensor, targets: Tensor, reduction: str, ignore_index: int, cu_seqlens: Tensor | None,
        lengths: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """The loss of a rank's own channels (B, L, D / n) of the normalized last layer."""
        output, targets = self.output.output, masked_targets(targets, ignore_index, cu_seqlens, lengths)
        loss = linear_cross_entropy(
            output.own_tokens(hidden), output.whole_weight(), output.share(targets.flatten(), ignore_index),
            reduction="sum" if reduction == "mean" else reduction, ignore_index=ignore_index,
        )  # fmt: skip
        if reduction == "none":
            return output.all_tokens(loss, targets.shape)
        total = exchanged(loss, self.tensor_mesh, Partial(), Replicate()).clone()
        return total / (targets != ignore_index).sum() if reduction == "mean" else total

    @contextlib.contextmanager
    def _one_generator(self) -> Iterator[None]:
        """Makes torch's generators draw on every rank what they draw on the group's first rank."""
        device = self.embed.weight.device
        with random_again(device) as seed:
            shared = torch.tensor(seed, device=device)
            group = self.tensor_mesh.get_group()
            dist.broadcast(shared, dist.get_global_rank(group, 0), group=group)
            set_seed(device, int(shared), 0)
            yield

    def _own_state(self, state: MegalodonState) -> MegalodonState:
        """What this rank's layers take of a whole state."""
        mesh, heads = self.tensor_mesh, self.config.num_heads

        def own(tensor: Tensor, dim: int) -> Tensor:
            return exchanged(tensor, mesh, Replicate(), Shard(dim))

        def of_attention(whole: AttentionState) -> AttentionState:
            ranks, rank = mesh.size(), mesh.get_local_rank()
            count = max(heads // ranks, 1)
            k = whole.k.narrow(2, rank * heads // ranks, count)
            v = own(whole.v.flatten(2), 2).unflatten(2, (count, -1))
            return AttentionState(k, v, whole.position)

        return _parts(state, own, of_attention)

    def _whole_state(self, state: MegalodonState) -> MegalodonState:
        """The whole state of what the ranks' layers have returned."""
        mesh, heads = self.tensor_mesh, self.config.num_heads

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
        return BlockState(of_norm(block.norm), cema, None if block.attention is None else of_attention(block.attention))

    return MegalodonState(tuple(map(of_block, state.layers)), of_norm(state.norm))
