"""`quantize`: a model with weights of 8 or 4 bits, for inference."""

import torch

from ..ops.common.checks import describe
from ..ops.quantized_linear.quantized_linear import check_activations, check_kind, quantize_weight
from ..model.megalodon import MegalodonBase
from .parameters import Model, empty_model, plain_tensors, with_values
from .quantized_layers import computing_dtype, kind_of, stored_shapes


def quantize(model: Model, kind: str, activations: str | None = "int8") -> Model:
    """Return a model whose embedding and linear layers have weights of 8 or 4 bits, for inference.

    Decoding a token reads every weight once, so smaller weights make it faster. The model also takes less memory.
    Outputs change by the rounding of the weights. docs/cpu.md has times and errors. int8 has a scale for each row of a
    weight, int4 for each 32 numbers of a row; an int4 model's embedding is int8. int8 changes a loss by less than 0.1 %.
    int4 costs about 1 %, and pays where the weights do not stay in the cache: at 25M parameters a token took 0.39 times
    as long as with int8, at 4M as long, at 0.7M 1.2 times. CEMA's parameters, norms, biases,
    states and the map of numbers (`num_features`) to channels keep their dtypes.

    Args:
        model: a Megalodon in float32, bfloat16 or float16, unchanged by the call.
        kind: "int8" or "int4".
        activations: "int8" lets calls of 17 or more tokens in all rows, as prompts are, be computed by products of
            integers on the CPU: layers round their inputs to 8 bits (:func:`quantized_linear`). A loss rises by at
            most 0.02 % with int8 weights, 0.07 % with int4. None keeps the inputs.

    Returns:
        a new model in evaluation mode, in the dtype of `model`, with :class:`QuantizedLinear` layers. `generate`,
        :class:`Decoder`, `save` and `load` accept it; the backward through its layers raises an error.

    Raises:
        TypeError: `model` is no Megalodon, or `parallelize` has split it. ValueError: an unknown kind, adapters that
        are not merged, weights that are not finite, a float64 model, or a model that is quantised already.

    Example:
        >>> import torch, megalodon_ops as mo
        >>> config = mo.MegalodonConfig(num_layers=1, model_dim=32, z_dim=16, value_dim=32, ffn_hidden_dim=32, vocab_size=9)
        >>> small = mo.quantize(mo.Megalodon(config), "int8")
        >>> small(torch.tensor([[1, 2, 3]])).shape, small.quantization
        (torch.Size([1, 3, 9]), 'int8')
    """
    plain_type = type(model._reference()) if isinstance(model, MegalodonBase) else None
    if type(model) is not plain_type:
        raise TypeError(f"quantize: `model` must be a Megalodon that is not parallel, got {describe(model)}.")
    check_kind("quantize", kind)
    check_activations("quantize", activations)
    if model.quantization:
        raise ValueError(f"quantize: `model` must have floating-point weights, got {model.quantization} weights.")
    dtype = computing_dtype(model)
    values = plain_tensors(model, model.config.parameter_shapes(), caller="quantize")
    if dtype == torch.float64:
        raise ValueError("quantize: `model` must be float32, bfloat16 or float16, got float64; call .float() on it.")
    result = empty_model(plain_type, model.config, dtype, kind, activations)
    _, quantised_dtypes = stored_shapes(model.config, kind)
    copies = {}
    for name, value in values.items():
        if name in quantised_dtypes:
            weight, scale = quantize_weight(value, kind_of(name, kind, model.config))
            copies |= {name: weight, f"{name.removesuffix('weight')}scale": scale}
        else:
            copies[name] = value.detach().clone()
    return with_values(result, copies)
