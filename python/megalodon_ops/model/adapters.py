"""Adapters of low rank that the decoder's kernels compute: y = base(x) + scale up(down(x)), as the library PEFT makes them."""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .layers import is_plain_linear
from ..ops.library import OWN_TYPES


class LowRank(NamedTuple):
    """The parts of an adapter whose matrices all have one dtype."""

    base: nn.Linear
    down: Tensor
    """(rank, inputs)"""
    up: Tensor
    """(outputs, rank)"""
    scale: float

    def tensors(self, name: str, real: torch.dtype) -> dict[str, Tensor | None]:
        """The tensors as the decoder's kernels look for them; `name` is the layer's, `real` the dtype of accumulation."""
        scale = torch.full((len(self.up),), self.scale, dtype=real, device=self.up.device)
        tensors = {"weight": self.base.weight, "bias": self.base.bias, "scale": scale}
        tensors |= {"down.weight": self.down, "up.weight": self.up}
        return {f"{name}.{own}": None if t is None else t.detach().contiguous() for own, t in tensors.items()}


@torch.no_grad()
def low_rank_of(layer: nn.Module) -> LowRank | None:
    """The parts of a layer of PEFT's that is one plain LoRA adapter around a linear layer of ours; None for all others.

    That the layer computes nothing else shows in the bits of its result for one input.
    """
    peft = sys.modules.get("peft.tuners.lora.layer")
    if peft is None or type(layer) is not peft.Linear or not is_plain_linear(layer.base_layer):
        return None
    adapters = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(adapters) != 1 or layer.disable_adapters or layer.merged:
        return None
    if any(getattr(layer, variants, {}).get(adapters[0]) for variants in ("lora_variant", "use_dora")):
        return None
    base, scale = layer.base_layer, layer.scaling[adapters[0]]
    down, up, dropout = (parts[adapters[0]] for parts in (layer.lora_A, layer.lora_B, layer.lora_dropout))
    if not (_is_matrix(down, base) and _is_matrix(up, base) and isinstance(scale, float | int)):
        return None
    watched = any(
        "forward" in vars(part) or part._forward_hooks or part._forward_pre_hooks for part in (layer, dropout)
    )
    if watched or (dropout.training and not isinstance(dropout, nn.Identity)):
        return None
    x = torch.linspace(-1, 1, base.in_features, dtype=torch.float32, device=base.weight.device).to(base.weight.dtype)
    x = x.view(1, 1, -1)
    if not torch.equal(layer(x), base(x) + up(down(x)) * scale):
        return None
    return LowRank(base, down.weight, up.weight, float(scale))


def _is_matrix(layer: nn.Module, like: nn.Linear) -> bool:
    """Whether the layer is torch's linear layer without bias and hooks, its weight of the dtype and device of `like`."""
    if type(layer) is not nn.Linear or layer.bias is not None or type(layer.weight) not in OWN_TYPES:
        return False
    watched = "forward" in vars(layer) or layer._forward_hooks or layer._forward_pre_hooks
    return not watched and layer.weight.dtype == like.weight.dtype and layer.weight.device == like.weight.device
