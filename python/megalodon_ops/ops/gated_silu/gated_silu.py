"""`gated_silu`: SiLU of a tensor, optionally times another tensor."""

import torch.nn.functional as F
from torch import Tensor

from ..common.definition import call, define_op, has_cpu_kernel
from ..common.checks import check_device, check_optional_tensor, check_tensor


def gated_silu(x: Tensor, value: Tensor | None = None) -> Tensor:
    r"""SiLU of `x` times `value`. On the CPU, forward and backward each pass over memory once.

    .. math:: y = x \sigma(x) \cdot \mathrm{value}, \qquad \sigma(x) = 1 / (1 + e^{-x})

    The result is rounded once. On other devices, and if dtypes differ, torch computes `silu(x) * value`.

    Args:
        x: float32, float64, bfloat16 or float16, arbitrary shape and strides.
        value: shape and dtype of `x`; None: ones.

    Returns:
        y, with the shape of `x`; on the CPU with its dtype.

    Raises:
        ValueError: shapes differ. TypeError: a dtype is wrong. NotImplementedError: second derivatives are not
        supported on the CPU.

    x and value are kept for the backward.

    Source: arXiv 1702.03118 (SiLU), 2002.05202 (SwiGLU). The mathematics: :func:`megalodon_ops.reference.gated_silu`.

    Example:
        >>> import torch, megalodon_ops as mo
        >>> mo.gated_silu(torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([1.0, 1.0, 2.0]))
        tensor([-0.2689,  0.0000,  1.4621])
    """
    check_tensor("gated_silu", "x", x)
    check_optional_tensor("gated_silu", "value", value)
    for argument, tensor in ("x", x), ("value", value):
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"gated_silu: `{argument}` must be floating point, got {tensor.dtype}.")
    if value is not None and value.shape != x.shape:
        raise ValueError(
            f"gated_silu: `value` must have shape {tuple(x.shape)} as `x`, got {tuple(value.shape)}; expand it."
        )
    if value is not None:
        check_device("gated_silu", "value", value, x)
    if has_cpu_kernel(x) and (value is None or (value.is_cpu and value.dtype == x.dtype)):
        return call(gated_silu_fwd, x, value)
    return F.silu(x) if value is None else F.silu(x) * value


gated_silu_bwd = define_op(
    "gated_silu_bwd(Tensor dy, Tensor x, Tensor? value) -> (Tensor dx, Tensor dvalue)",
    flops=lambda x, value: x.numel() * (8 if value is None else 11),
)
gated_silu_fwd = define_op(
    "gated_silu_fwd(Tensor x, Tensor? value) -> Tensor y",
    backward=gated_silu_bwd,
    flops=lambda x, value: x.numel() * (4 if value is None else 5),
)
