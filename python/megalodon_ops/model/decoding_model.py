"""`decoding_model`: a decoder's copy of its model, with CEMA's coefficients computed and changed modules marked."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.common.definition import OWN_TYPES, observer
from .blocks import Output
from .layers import ComplexEMA, has_own_forward


def decoding_model(module: nn.Module, reference: nn.Module, changed: list[str], name: str = "") -> nn.Module:
    """Return `module` with a :class:`FixedEMA` for each :class:`ComplexEMA`, and :class:`ChangedModule` for others.

    Modules that contain others are copied; the copies share parameters, buffers and all other modules with the
    originals. Changed modules stay as they are, as does everything in them.

    Args:
        reference: the module as the configuration makes it; a changed module differs from its counterpart there.
        changed: receives the names of the outermost changed modules.
        name: the module's own.
    """
    is_changed = _is_changed(module, reference)
    if is_changed:
        changed.append(name)
    if is_changed and not isinstance(reference, (Output, nn.ModuleList)):  # the model calls the parts of these
        return ChangedModule(name, module) if isinstance(module, nn.Module) else module
    if isinstance(module, ComplexEMA):
        return FixedEMA(module)
    if not module._modules:
        return module
    copied = copy.copy(module)
    copied._modules = {}
    for child, part in module._modules.items():
        path = f"{name}.{child}".removeprefix(".")
        marked = (
            ChangedModule(path, part) if is_changed else decoding_model(part, reference._modules[child], changed, path)
        )
        copied._modules[child] = marked
    return copied


def _is_changed(module: nn.Module | None, reference: nn.Module) -> bool:
    """Return True if a call of the module may do something else than the layers of this package, its parts apart."""
    return not (
        type(module) is type(reference)
        and (has_own_forward(module) if has_own_forward(reference) else "forward" not in vars(module))
        and not (module._forward_hooks or module._forward_pre_hooks)
        and module._modules.keys() == reference._modules.keys()
        and all(parameter is None or type(parameter) in OWN_TYPES for parameter in module._parameters.values())
    )


class FixedEMA(ComplexEMA):
    """A :class:`ComplexEMA` that keeps the coefficients of its construction, for inference."""

    def __init__(self, layer: ComplexEMA) -> None:
        nn.Module.__init__(self)
        self.bidirectional = layer.bidirectional
        for name, parameter in layer.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        with torch.inference_mode(False), torch.no_grad():
            self._coefficients = layer.coefficients()

    def coefficients(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self._coefficients


class ChangedModule(nn.Module):
    """A module that was wrapped, hooked, quantised or replaced; a recorded step calls it in Python."""

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__()
        self._name, self.__dict__["_module"] = name, module  # no submodule, which would have another name

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_module"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if observer.recorder is None:
            return self._module(*args, **kwargs)
        return observer.recorder.call(self._name, self._call, *args, **kwargs)

    def _call(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Call the module with a copy of its input x, which a hook may keep."""
        given = x.clone()
        result = self._module(given, *args, **kwargs)
        x.copy_(given)  # a hook may have changed the input, which other modules read
        return result
