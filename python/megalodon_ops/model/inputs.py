"""Checks and embeddings of a model's inputs, tokens or numbers."""

import torch
from torch import Tensor, nn

from .config import MegalodonConfig
from .layers import Embedding, Linear
from .model_state import CallOptions
from .scale import ScaleState, standardize
from .sequences import Sequences
from ..ops.common.checks import check_device, check_tensor
from ..ops.common.spans import argument_of, num_positions


def input_layer(config: MegalodonConfig) -> Embedding | Linear:
    """Build the layer from inputs to D channels: an embedding of tokens, or a linear layer of numbers."""
    if config.num_features is None:
        return Embedding(config.vocab_size, config.model_dim)
    return Linear(config.input_width, config.model_dim)


def embed_numbers(
    op: str, argument: str, numbers: Tensor, model: nn.Module, options: CallOptions
) -> tuple[Tensor, ScaleState]:
    """Scale and embed numbers (B, L, F) as (B, L, D); also return the scale's new state. Its old one: options.state."""
    config, weight, state = model.config, model.embed.weight, options.state
    check_device(op, argument, numbers, weight)
    if config.scale_inputs:
        numbers, state = standardize(numbers, config, state, options.return_state, options.sequences)
    return model.embed(numbers.to(weight.dtype)), state


def embed_tokens(op: str, argument: str, tokens: Tensor, model: nn.Module) -> Tensor:
    """Embed tokens (B, L) as (B, L, D)."""
    config = model.config
    try:
        x = model.embed(tokens)
    except IndexError as error:
        outside = tokens[(tokens < 0) | (tokens >= config.vocab_size)]
        if len(outside) == 0:
            raise
        raise IndexError(f"{op}: `{argument}` must be in [0, {config.vocab_size}), got {outside[0].item()}.") from error
    except RuntimeError as error:
        weight = own_weight(model.embed)
        if weight is None or weight.device == tokens.device:
            raise
        raise ValueError(
            f"{op}: `{argument}` must be on {weight.device} as the model, got {tokens.device}; move one of them."
        ) from error
    return x * config.embedding_scale if config.scale_emb else x


def check_inputs(op: str, argument: str, inputs: Tensor, model: nn.Module, sequences: Sequences) -> None:
    """Raise unless the `argument` of `op` is tokens or, for a model with `num_features`, numbers (B, L, F)."""
    check_tensor(op, argument, inputs)
    num_features = model.config.num_features
    if num_features is None:
        fits = inputs.dim() == 2 and inputs.dtype in (torch.int64, torch.int32)
        expected = "integers (B, L), int64 or int32"
    else:
        fits = inputs.dim() == 3 and inputs.shape[-1] == num_features and inputs.is_floating_point()
        expected = f"floating-point numbers (B, L, {num_features})"
    if not fits:
        raise ValueError(f"{op}: `{argument}` must be {expected}, got {inputs.dtype} {tuple(inputs.shape)}.")
    if inputs.is_meta and not any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(f"{op}: `{argument}` must have values, got a tensor on the device meta; move the model there.")
    if num_features is not None:
        _check_finite(op, argument, inputs, model.config.missing_values, sequences)


def _check_finite(op: str, argument: str, x: Tensor, missing_values: bool, sequences: Sequences) -> None:
    """Raise if x (B, L, F) on the CPU has an infinity or, without `missing_values`, a NaN in a sequence."""
    if torch.compiler.is_compiling() or not x.is_cpu or type(x) not in (Tensor, nn.Parameter):
        return
    is_wrong = x.detach().isinf() if missing_values else ~x.detach().isfinite()
    if not is_wrong.any():  # the usual case, without a mask
        return
    for row, position, feature in (is_wrong & sequences.mask(x)[..., None]).nonzero().tolist():
        fix = "" if missing_values else "; a model with missing_values=True takes NaN"
        got = f"{x[row, position, feature].item()} at [{row}, {position}, {feature}]"
        raise ValueError(f"{op}: `{argument}` must be finite, got {got}{fix}.")


def check_reads_tokens(op: str, config: MegalodonConfig) -> None:
    """Raise unless a model of this configuration reads tokens."""
    if config.num_features is not None:
        raise ValueError(
            f"{op}: `num_features` of the model must be None, got {config.num_features}; it reads numbers."
        )


def check_not_empty(op: str, argument: str, x: Tensor, sequences: Sequences) -> None:
    """Raise if a sequence of x (B, L, ...) is empty; an encoder has no result for it.

    Not checked: lengths on a GPU, for which the host would wait, and lengths in a compiled program.
    """
    if torch.compiler.is_compiling():
        return
    lengths = torch.full(x.shape[:1], x.shape[1])
    if sequences.spans is not None:
        argument, _ = argument_of(sequences.spans)
        lengths = num_positions(x, sequences.spans)
    if lengths.device.type == "cpu" and len(empty := (lengths == 0).nonzero()):
        raise ValueError(
            f"{op}: `{argument}` must give each row at least one position, got none for row {empty[0].item()}; leave the row out."
        )


def own_weight(module: nn.Module) -> nn.Parameter | None:
    """Return a module's parameter `weight`; None if it has none or recomputes it, as a parametrization does."""
    return module._parameters.get("weight")
