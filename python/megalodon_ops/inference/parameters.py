"""Parameters of a model as a whole: a model without values, its values, and the check that they are plain tensors."""

from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..model.config import MegalodonConfig
from .quantized_layers import replace_layers
from ..ops.common.definition import OWN_TYPES
from ..ops.common.memory import is_finite

Model = TypeVar("Model", bound=nn.Module)
"""A class of causal models or of encoders"""
WEIGHT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
Shapes = Iterable[tuple[str, tuple[int, ...]]]


def empty_model(
    kind: type[Model],
    config: MegalodonConfig,
    dtype: torch.dtype,
    quantization: str | None = None,
    activations: str | None = None,
) -> Model:
    """Build a model on the device meta."""
    with torch.device("meta"):
        model = kind(config).to(dtype)
        if quantization:
            replace_layers(model, quantization, activations)
            model.tie_weights()
    return model


def with_values(model: Model, values: dict[str, Tensor]) -> Model:
    """Give a model on the device meta its parameters; return it in evaluation mode."""
    if model.config.share_emb:
        values |= {f"output.output.{name}": values[f"embed.{name}"] for name, _ in model.embed.named_parameters()}
    model.load_state_dict(values, strict=True, assign=True)
    if model.config.share_emb:
        model.tie_weights()
    return model.eval()


def plain_tensors(
    model: nn.Module, shapes: Shapes, dtypes: Mapping[str, torch.dtype] = {}, *, caller: str
) -> dict[str, Tensor]:
    """Return the parameters in `shapes`; raise unless a file can hold them. dtypes: as in `StoredTensors.check`."""
    by_name = dict(model.named_parameters(remove_duplicate=False))
    tensors = {}
    for name, shape in shapes:
        tensor = by_name.get(name)
        if tensor is None:
            raise ValueError(
                f"{caller}: `model` must have the parameters of its configuration, got no `{name}`; merge adapters, "
                "and undo what wraps its layers"
            )
        if type(tensor) not in OWN_TYPES or tensor.dtype not in allowed_dtypes(name, dtypes) or tensor.is_meta:
            got = "a meta tensor" if tensor.is_meta else f"{type(tensor).__name__} of {tensor.dtype}"
            kind = dtypes.get(name, "floating-point numbers")
            raise ValueError(f"{caller}: `{name}` must be a tensor of {kind} with values, got {got}.")
        if tensor.shape != shape:
            raise ValueError(f"{caller}: `{name}` must have shape {shape}, got {tuple(tensor.shape)}.")
        if not is_finite(tensor):
            raise ValueError(f"{caller}: `{name}` must be finite, got NaN or infinity.")
        tensors[name] = tensor
    return tensors


def allowed_dtypes(name: str, dtypes: Mapping[str, torch.dtype]) -> tuple[torch.dtype, ...]:
    return (dtypes[name],) if name in dtypes else WEIGHT_DTYPES
