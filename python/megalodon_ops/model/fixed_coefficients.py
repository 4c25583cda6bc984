"""`with_fixed_coefficients`: a model for inference that computes CEMA's coefficients once, not in each call."""

from __future__ import annotations

import copy
from collections.abc import Container

import torch
from torch import Tensor, nn

from .layers import ComplexEMA


class FixedEMA(ComplexEMA):
    """A :class:`ComplexEMA` for inference, with the coefficients that `layer` had at construction."""

    def __init__(self, layer: ComplexEMA) -> None:
        nn.Module.__init__(self)
        self.bidirectional = layer.bidirectional
        for name, parameter in layer.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        with torch.inference_mode(False), torch.no_grad():
            self._coefficients = layer.coefficients()

    def coefficients(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self._coefficients


def with_fixed_coefficients(module: nn.Module, kept: Container[str], name: str = "") -> nn.Module:
    """Return `module` with a :class:`FixedEMA` in place of each :class:`ComplexEMA`.

    Modules that contain a replaced layer are copied; the copies share parameters, buffers and all other modules with the
    originals. Modules whose names are in `kept` stay unchanged, with all modules inside them. `name` is the name of
    `module` itself.
    """
    if name in kept:
        return module
    if isinstance(module, ComplexEMA):
        return FixedEMA(module)
    parts = {
        child: part and with_fixed_coefficients(part, kept, f"{name}.{child}".removeprefix("."))
        for child, part in module._modules.items()
    }
    if all(part is module._modules[child] for child, part in parts.items()):
        return module
    copied = copy.copy(module)
    copied._modules = parts
    return copied
