"""`layer_norm` and `rms_norm`: each row normalized by itself, with a gain of 1 + weight."""

import torch.nn.functional as F
from torch import Tensor

from ..common.definition import call, define_op, has_kernel
from ..common.states import accumulation_dtype
from ..common.checks import check_device, check_number, check_optional_tensor, check_tensor


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    r"""Layer norm over the last dimension. Forward and backward each read memory once.

    .. math:: y = (x - \mathrm{mean}(x)) / \sqrt{\mathrm{var}(x) + \epsilon} \cdot (1 + \mathrm{weight}) + \mathrm{bias}

    Statistics are float32 (float64 for float64); the result is rounded once. On devices without
    kernels torch computes the norm.

    Args:
        x: (..., D) float32, float64, bfloat16 or float16, arbitrary strides.
        weight, bias: (D,) float32, or float64 for a float64 `x`; None: zeros. The gain is 1 + weight.
        eps: added to the biased variance.

    Returns:
        y, with the shape and dtype of `x`.

    Raises:
        ValueError: a shape or a value is wrong. TypeError: a dtype is wrong. NotImplementedError: second derivatives
        are not supported by the kernels.

    x and weight are kept for the backward, which is deterministic.

    Source: arXiv 1607.06450. The mathematics: :func:`megalodon_ops.reference.layer_norm`.

    Example:
        >>> import torch, megalodon_ops as mo
        >>> mo.layer_norm(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 1.0]), torch.tensor([0.0, 5.0]), eps=0.0)
        tensor([-1.,  7.])
    """
    return _norm(x, weight, bias, eps, is_rms_norm=False)


def rms_norm(x: Tensor, weight: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    r"""RMS norm over the last dimension; everything else is as in :func:`layer_norm`.

    .. math:: y = x / \sqrt{\mathrm{mean}(x^2) + \epsilon} \cdot (1 + \mathrm{weight})

    Source: arXiv 1910.07467. The mathematics: :func:`megalodon_ops.reference.rms_norm`.

    Example:
        >>> import torch, megalodon_ops as mo
        >>> mo.rms_norm(torch.tensor([1.0, 7.0]), eps=0.0)
        tensor([0.2000, 1.4000])
    """
    return _norm(x, weight, None, eps, is_rms_norm=True)


def _norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, is_rms_norm: bool) -> Tensor:
    op = "rms_norm" if is_rms_norm else "layer_norm"
    check_tensor(op, "x", x)
    check_optional_tensor(op, "weight", weight)
    check_optional_tensor(op, "bias", bias)
    eps = check_number(op, "eps", eps, "a finite number of at least 0", 0.0)
    if not x.is_floating_point():
        raise TypeError(f"{op}: `x` must be floating point, got {x.dtype}; convert it with .to(torch.float32).")
    for name, parameter in ("weight", weight), ("bias", bias):
        if parameter is not None and not x.is_cpu:
            check_device(op, name, parameter, x)
    if has_kernel(x):
        return call(layer_norm_fwd, x, weight, bias, eps, is_rms_norm)
    wide = x.to(accumulation_dtype(x.dtype))
    gain = None if weight is None else 1 + weight
    if is_rms_norm:
        return F.rms_norm(wide, x.shape[-1:], gain, eps).to(x.dtype)
    return F.layer_norm(wide, x.shape[-1:], gain, bias, eps).to(x.dtype)


def _flops(x, weight, bias, is_rms_norm):
    return x.numel() * ((3 if is_rms_norm else 5) + (weight is not None) + (bias is not None))


def _bwd_flops(x, weight, bias, is_rms_norm):
    normalized, dx = (3, 5) if is_rms_norm else (5, 7)
    return x.numel() * (normalized + dx + 3 * (weight is not None) + (bias is not None))  # dweight, dbias


layer_norm_bwd = define_op(
    "layer_norm_bwd(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, float eps, bool is_rms_norm) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias)",
    flops=_bwd_flops,
)
layer_norm_fwd = define_op(
    "layer_norm_fwd(Tensor x, Tensor? weight, Tensor? bias, float eps, bool is_rms_norm) -> Tensor y",
    backward=layer_norm_bwd,
    flops=_flops,
)
