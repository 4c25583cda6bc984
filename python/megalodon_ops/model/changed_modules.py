"""Modules of a decoder's model that are not as its configuration builds them. A recorded step calls them in Python."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from ..ops.common.checks import check_tensor
from ..ops.common.definition import OWN_TYPES
from ..ops.common.recorder import Recorder
from .layers import has_own_forward

OUTPUT_PARTS = {"output": ["output.final_norm", "output.output"]}  # the model calls these, not `output`
_REPLACING = threading.RLock()  # two threads that record steps of one model wait for each other
_IGNORED_ATTRIBUTES = ("training", "layer", "token_rows", "forward", "reset_parameters")
"""Attributes that only initialisation reads, that train() and eval() set, or that :func:`has_own_forward` compares"""


def changed_modules(module: nn.Module, reference: nn.Module, name: str = "") -> Iterator[str]:
    """Yield the names of the outermost modules that differ from their counterparts in `reference`."""
    if not isinstance(module, nn.Module):
        yield name
        return
    attributes = {k: v for k, v in vars(reference).items() if k[0] != "_" and k not in _IGNORED_ATTRIBUTES}
    parameters = module._parameters.values()
    same = (
        type(module) is type(reference)
        and (has_own_forward(module) if has_own_forward(reference) else "forward" not in vars(module))
        and not (module._forward_hooks or module._forward_pre_hooks)
        and module._modules.keys() == reference._modules.keys()
        and module._parameters.keys() == reference._parameters.keys()
        and module._buffers.keys() == reference._buffers.keys()
        and all(parameter is None or type(parameter) in OWN_TYPES for parameter in parameters)
        and all(getattr(module, key, None) == value for key, value in attributes.items())
    )
    if not same:
        yield name
        return
    for child, part in reference._modules.items():
        yield from changed_modules(module._modules[child], part, f"{name}.{child}".removeprefix("."))


@contextlib.contextmanager
def called_in_python(
    model: nn.Module, changed: dict[str, nn.Module], reference: nn.Module, recorder: Recorder
) -> Iterator[None]:
    """Replace each changed module, given by its name, by a :class:`_CalledModule` while a step is recorded."""
    places = []
    for name, module in changed.items():
        parent, _, child = name.rpartition(".")
        called = _CalledModule(name, module, reference.get_submodule(name), recorder)
        places.append((model.get_submodule(parent)._modules, child, module, called))
    with _REPLACING:
        for modules, child, _, called in places:
            modules[child] = called
        try:
            yield
        finally:
            for modules, child, module, _ in places:
                modules[child] = module


class _CalledModule(nn.Module):
    """A changed module that a recorded step calls in Python, between two kernels."""

    def __init__(self, name: str, module: nn.Module, plain: nn.Module, recorder: Recorder) -> None:
        super().__init__()
        self._run = functools.partial(_call_module, name, module.__call__, plain)
        self._recorder = recorder

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._recorder.call(self._run, *args, **kwargs)


def _call_module(name: str, call: Callable, plain: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Call a module with a copy of its input x, which a hook may keep; check a linear layer's result."""
    copied = x.clone()
    result = call(copied, *args, **kwargs)
    x.copy_(copied)  # a hook may have changed the input, which other modules read
    if isinstance(plain, nn.Linear):
        check_tensor("Decoder", f"{name}(x)", result)
        shape = (*x.shape[:-1], plain.out_features)
        if result.shape != shape or result.dtype != x.dtype:
            raise ValueError(
                f"Decoder: `{name}` must return {x.dtype} {shape} as the layer that it replaces, got "
                f"{result.dtype} {tuple(result.shape)}."
            )
    return result
