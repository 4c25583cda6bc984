"""`quantized_linear`: x w^T + bias for weights of 8 or 4 bits, for inference."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ... import _C
from ..common.checks import check_device, check_optional_tensor, check_rank, check_tensor, short_text
from ..common.definition import autocast, call, contiguous_or_none, define_op, has_cpu_kernel, in_forward_mode, launch
from ..common.quantized_rows import round_rows
from ..linear.linear import linear

KINDS = ("int8", "int4")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_GROUP, _BLOCK = 32, 128
"""int4: inputs per scale, and inputs per block of 64 bytes"""
_MAX_KERNEL_ROWS = {torch.float32: 64, torch.bfloat16: 32, torch.float16: 32}
"""Maximum rows of x for the kernel that reads the integers without rounding x; with more, a dequantised copy is faster"""
_FEWEST_ROUNDED_ROWS = 17
"""Fewest rows of x for products of integers, where they gain and the caller allows them (times: docs/cpu.md)"""
_COPY = 1 << 22
"""Maximum elements of the dequantised copy"""


class QuantizedWeight(NamedTuple):
    """Integers and scales of a matrix, as :func:`quantize_weight` describes them."""

    weight: Tensor
    scale: Tensor


def quantize_weight(weight: Tensor, kind: str) -> QuantizedWeight:
    """Round a matrix to 8 or 4 bits.

    int8: the scale of a row is its largest absolute value / 127. int4: each group of 32 inputs has a bfloat16 scale,
    with which the element of the largest absolute value becomes -8.

    Args:
        weight: (O, I), float32, bfloat16 or float16, finite.
        kind: "int8" or "int4".

    Returns:
        weight and scale. int8: (O, I) int8 and (O,) float32. int4: (O, 64 ceil(I / 128)) uint8 and (O, 4 ceil(I / 128))
        bfloat16. A block of 64 bytes holds 128 inputs of a row, padded with zeros: bits 4 j to 4 j + 3 of 16-bit word i
        are input 32 j + i, in two's complement.

    Raises:
        ValueError: the shape, dtype or kind is wrong, or a value is not finite.

    Example:
        >>> import torch, megalodon_ops as mo
        >>> weight, scale = mo.quantize_weight(torch.randn(9, 256), "int4")
        >>> weight.shape, scale.shape
        (torch.Size([9, 128]), torch.Size([9, 8]))
    """
    check_rank("quantize_weight", "weight", weight, "(O, I)", 2)
    check_kind("quantize_weight", kind)
    _check_dtype("quantize_weight", "weight", weight)
    weight = weight.detach().float()
    if not weight.is_meta and not bool(weight.isfinite().all()):
        raise ValueError("quantize_weight: `weight` must be finite, got NaN or infinity.")
    return QuantizedWeight(*round_rows(weight)) if kind == "int8" else _to_int4(weight)


def empty_weight(outputs: int, inputs: int, kind: str) -> QuantizedWeight:
    """Return an uninitialised weight of the given kind."""
    if kind == "int8":
        scale = torch.empty(outputs, dtype=torch.float32)
        return QuantizedWeight(torch.empty(outputs, inputs, dtype=torch.int8), scale)
    blocks = -(-inputs // _BLOCK)
    scale = torch.empty(outputs, blocks * _BLOCK // _GROUP, dtype=torch.bfloat16)
    return QuantizedWeight(torch.empty(outputs, blocks * _BLOCK // 2, dtype=torch.uint8), scale)


def _to_int4(weight: Tensor) -> QuantizedWeight:
    O, blocks = len(weight), -(-weight.shape[1] // _BLOCK)  # noqa: E741
    padded = torch.nn.functional.pad(weight, (0, blocks * _BLOCK - weight.shape[1]))
    groups = padded.view(O, blocks, _BLOCK // _GROUP, _GROUP)
    scale = (groups.gather(3, groups.abs().argmax(3, keepdim=True)) / -8).bfloat16()
    integers = (groups / scale.float()).nan_to_num(0, 0, 0).round().clamp(-8, 7)
    return QuantizedWeight(_pack(integers), scale.flatten(1))


def _pack(integers: Tensor) -> Tensor:
    """Pack (O, Q, 4, 32) integers of 4 bits as (O, 64 Q) uint8."""
    shifts = torch.arange(0, 16, 4, dtype=torch.int32, device=integers.device)[:, None]
    words = ((integers.int() & 15) << shifts).sum(2, dtype=torch.int32)
    return words.to(torch.int16).view(torch.uint8).flatten(1)


def dequantize_by_torch(weight: Tensor, scale: Tensor, inputs: int, dtype: torch.dtype) -> Tensor:
    """Return the matrix (O, `inputs`) that the integers and scales represent. Works on every device."""
    if weight.dtype == torch.int8:
        return (weight * scale[:, None]).to(dtype)
    words = weight.view(torch.int16).unflatten(1, (-1, 1, _GROUP))
    shifts = torch.arange(12, -1, -4, dtype=torch.int16, device=weight.device)[:, None]
    integers = (words << shifts) >> 12  # four of each word, with their signs
    return (integers * scale.float().unflatten(1, (-1, 4, 1))).flatten(1)[:, :inputs].to(dtype)


def check_kind(caller: str, kind: object) -> None:
    """Raise a ValueError unless `kind` is "int8" or "int4"."""
    if kind not in KINDS or not isinstance(kind, str):
        raise ValueError(f'{caller}: `kind` must be "int8" or "int4", got {short_text(kind)}.')


def check_activations(caller: str, activations: object) -> None:
    """Raise a ValueError unless `activations` is None or "int8"."""
    if activations is not None and (activations != "int8" or not isinstance(activations, str)):
        raise ValueError(f'{caller}: `activations` must be None or "int8", got {short_text(activations)}.')


def gains_from_rounding(isa: str) -> bool:
    """Return True if products of integers are faster with this instruction set than those of floating point.

    AVX-512 without VNNI and NEON without dot products multiply integers no faster than float32.
    """
    return isa not in ("v4", "generic")


def _check_dtype(op: str, argument: str, tensor: Tensor) -> None:
    if tensor.dtype not in _DTYPES:
        raise ValueError(f"{op}: `{argument}` must be float32, bfloat16 or float16, got {tensor.dtype}.")


def quantized_linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, *, activations: str | None = None
) -> Tensor:
    r"""Linear layer with a weight of 8 or 4 bits, for inference: there are no gradients.

    .. math:: y_{to} = \sum_i x_{ti} \, s_{og} q_{oi} + b_o

    q are the integers of `weight`, s the scales of each row (int8) or each group g of 32 inputs (int4). On the CPU, few
    rows of x use a kernel that reads the integers and converts them to floating point in registers; sums are float32.
    More rows, and other devices, use a product with a dequantised copy of the weights in the dtype of x, or in float32
    for float16, at most 16 MiB at a time. Under torch.autocast, x and bias are cast first.

    With `activations="int8"`, 17 or more rows on the CPU are rounded to 8 bits where sums of integers are faster. Each
    row of x has a scale :math:`a_t`, its largest absolute value / 127. Weights of 4 bits are then rounded to 8, with a
    scale for each row. A row of x with NaN or an infinity gives NaN.

    .. math:: y_{to} = a_t s_o \sum_i \mathrm{round}(x_{ti} / a_t) \, q_{oi} + b_o

    Args:
        x: (..., I), float32, bfloat16 or float16.
        weight, scale: as :func:`quantize_weight` returns them.
        bias: (O,) in x's dtype, or None.
        activations: "int8", or None to keep x as it is.

    Returns:
        y (..., O) in x's dtype.

    Raises:
        ValueError: a shape or a dtype is wrong. NotImplementedError: gradients are not supported.

    The mathematics: :func:`megalodon_ops.reference.quantized_linear`.

    Example:
        >>> import torch, megalodon_ops as mo
        >>> x, weight = torch.randn(2, 64), torch.randn(5, 64)
        >>> y = mo.quantized_linear(x, *mo.quantize_weight(weight, "int8"))
        >>> torch.allclose(y, mo.linear(x, weight), atol=0.5)
        True
    """
    for argument, tensor in ("x", x), ("weight", weight), ("scale", scale):
        check_tensor("quantized_linear", argument, tensor)
    check_optional_tensor("quantized_linear", "bias", bias)
    check_activations("quantized_linear", activations)
    if x.is_floating_point():
        x, bias = autocast(x, bias)
    _check(x, weight, scale, bias)
    if in_forward_mode():
        raise NotImplementedError(f"quantized_linear: {_NO_GRADIENTS}")
    return call(quantized_linear_fwd, x, weight, scale, bias, activations)


def _check(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
    _check_dtype("quantized_linear", "x", x)
    if weight.dtype not in (torch.int8, torch.uint8):
        raise ValueError(f"quantized_linear: `weight` must be int8, or uint8 for int4, got {weight.dtype}.")
    if x.dim() == 0:
        raise ValueError("quantized_linear: `x` must have shape (..., I), got ().")
    inputs, outputs = x.shape[-1], weight.shape[0] if weight.dim() else 0
    blocks = -(-inputs // _BLOCK)
    if weight.dtype == torch.int8:
        weight_shape, scale_shape, scale_dtype = (outputs, inputs), (outputs,), torch.float32
    else:
        weight_shape, scale_shape = (outputs, _BLOCK // 2 * blocks), (outputs, _BLOCK // _GROUP * blocks)
        scale_dtype = torch.bfloat16
    expected = [
        ("weight", weight, weight_shape, weight.dtype),
        ("scale", scale, scale_shape, scale_dtype),
        ("bias", bias, (outputs,), x.dtype),
    ]
    for argument, tensor, shape, dtype in expected:
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(
                f"quantized_linear: `{argument}` must have shape {shape} for x (..., {inputs}) and a weight of "
                f"{weight.dtype}, got {tuple(tensor.shape)}."
            )
        if tensor.dtype != dtype:
            raise ValueError(f"quantized_linear: `{argument}` must be {dtype}, got {tensor.dtype}.")
        check_device("quantized_linear", argument, tensor, x)


def dequantize(weight: Tensor, scale: Tensor, inputs: int, dtype: torch.dtype, rows: Tensor | None = None) -> Tensor:
    """Return the matrix (O, `inputs`) of the integers and scales, or its `rows` (T,), rounded to `dtype`."""
    return call(dequantize_fwd, weight, scale, rows, inputs, dtype)


def _dequantize(weight, scale, rows, inputs, dtype):
    if not weight.is_cpu:
        selected = (weight, scale) if rows is None else (weight[rows], scale[rows])
        return dequantize_by_torch(*selected, inputs, dtype)
    y = _dequantize_fake(weight, scale, rows, inputs, dtype)
    launch("dequantize", weight.contiguous(), scale.contiguous(), contiguous_or_none(rows), y)
    return y


def _dequantize_fake(weight, scale, rows, inputs, dtype):
    return weight.new_empty(((weight if rows is None else rows).shape[0], inputs), dtype=dtype)


def _fwd(x, weight, scale, bias, activations):
    y = _fwd_fake(x, weight, scale, bias, activations)
    count = math.prod(x.shape[:-1])
    rows = x.reshape(count, x.shape[-1]).contiguous()
    outputs = y.view(count, y.shape[-1])
    rounds = activations is not None and count >= _FEWEST_ROUNDED_ROWS and gains_from_rounding(_C.active_isa())
    if has_cpu_kernel(x) and (rounds or count <= _MAX_KERNEL_ROWS[x.dtype]):
        kernel = "quantized_many_rows" if rounds else "quantized_linear"
        launch(kernel, rows, weight.contiguous(), scale.contiguous(), contiguous_or_none(bias), outputs)
        return y
    dtype = torch.float32 if x.dtype == torch.float16 else x.dtype  # float16 does not hold every weight
    rows = rows.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    step = max(1, _COPY // max(1, x.shape[-1]))  # rows of the weight that are copied at a time
    with torch.no_grad():
        for begin in range(0, len(weight), step):
            part = slice(begin, begin + step)
            copy = _dequantize(weight[part], scale[part], None, x.shape[-1], dtype)
            outputs[:, part] = linear(rows, copy, None if bias is None else bias[part])
    return y


def _fwd_fake(x, weight, scale, bias, activations):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


_NO_GRADIENTS = "gradients are not supported, as weights of 8 and 4 bits are for inference; train the original model."


def _backward(ctx, *grads):
    raise NotImplementedError(f"quantized_linear: {_NO_GRADIENTS}")


quantized_linear_fwd = define_op(
    "quantized_linear_fwd(Tensor x, Tensor weight, Tensor scale, Tensor? bias, str? activations) -> Tensor y",
    kernel=_fwd,
    fake=_fwd_fake,
    setup_context=lambda ctx, inputs, output: None,
    backward=_backward,
    flops=lambda x, weight: 2 * x.numel() * weight.shape[0],
)
dequantize_fwd = define_op(
    "dequantize_fwd(Tensor weight, Tensor scale, Tensor? rows, int inputs, ScalarType dtype) -> Tensor y",
    kernel=_dequantize,
    fake=_dequantize_fake,
    flops=lambda weight, rows, inputs: (weight if rows is None else rows).shape[0] * inputs,
)
