"""`decoding_model`: a decoder's copy of its model: constant CEMA coefficients, fused products, wrapped changed modules."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.common.definition import OWN_TYPES, observer
from ..model.blocks import Output
from ..model.layers import ComplexEMA, FusedLinear, StateSlot, has_own_forward


def decoding_model(
    module: nn.Module,
    reference: nn.Module,
    changed: list[str],
    name: str = "",
    *,
    fused_dtype: torch.dtype | None = None,
) -> nn.Module:
    """Return a copy of `module` with a :class:`FixedEMA` for each :class:`ComplexEMA`.

    It has a :class:`FusedLinear` for each :class:`Linear` of the dtype `fused_dtype`.

    Each changed module is wrapped in a :class:`ChangedModule` and, with all modules in it, not copied. Of the other
    modules, those that contain modules are copied; the copies share parameters and buffers with the originals.

    Args:
        reference: the same module as the configuration makes it; a changed module differs from it.
        changed: receives the names of the outermost changed modules.
        name: name of `module` in the model.
    """
    is_changed = _is_changed(module, reference)
    if is_changed:
        changed.append(name)
    if is_changed and not isinstance(reference, (Output, nn.ModuleList)):  # the model calls their submodules
        return ChangedModule(name, module) if isinstance(module, nn.Module) else module
    if isinstance(module, ComplexEMA):
        return FixedEMA(module)
    if has_own_forward(module) and {p.dtype for p in module.parameters()} == {fused_dtype}:
        return FusedLinear(module)
    if not module._modules:
        return module
    copied = copy.copy(module)
    copied._modules = {}
    for child, part in module._modules.items():
        path = f"{name}.{child}".removeprefix(".")
        if is_changed:
            copied._modules[child] = ChangedModule(path, part)
        else:
            copied._modules[child] = decoding_model(
                part, reference._modules[child], changed, path, fused_dtype=fused_dtype
            )
    return copied


def _is_changed(module: nn.Module | None, reference: nn.Module) -> bool:
    """Return True if a call of the module, apart from its submodules, may differ from that of the reference."""
    return not (
        type(module) is type(reference)
        and (has_own_forward(module) if has_own_forward(reference) else "forward" not in vars(module))
        and not (module._forward_hooks or module._forward_pre_hooks)
        and module._modules.keys() == reference._modules.keys()
        and all(parameter is None or type(parameter) in OWN_TYPES for parameter in module._parameters.values())
    )


class FixedEMA(ComplexEMA):
    """:class:`ComplexEMA` for inference, with the coefficients that its parameters gave when it was made."""

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
    """Wrapper of a changed module (hooked, quantised or replaced), which a recorded step calls in Python."""

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__()
        self._name, self.__dict__["_module"] = name, module  # no submodule: that would change the module's name

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_module"], name)

    def forward(self, *args: Any, new_state: StateSlot | None = None, **kwargs: Any) -> Any:
        slot = {} if new_state is None else {"new_state": new_state}
        if observer.recorder is None:
            return self._module(*args, **slot, **kwargs)
        result, state = observer.recorder.call(self._name, self._call, bool(slot), *args, **kwargs)
        if slot:
            new_state.state = state
        return result

    def _call(self, returns_state: bool, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Call the module with a copy of its input x, as a hook may keep the copy; also return the new state."""
        given, new_state = x.clone(), StateSlot()
        result = self._module(given, *args, **({"new_state": new_state} if returns_state else {}), **kwargs)
        x.copy_(given)  # a hook may have changed the input, which other modules read
        return result, new_state.state
