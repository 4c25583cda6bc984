"""`linear`: x weight^T + bias by the fastest of torch's two libraries of matrix products and two kernels."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _C
from .library import call, contiguous_or_none, define_op, in_forward_mode, launch

_CPUINFO = Path("/proc/cpuinfo")
_FEW_ROWS = 32  # up to which the kernel that reads the weights once is the fastest
_AMX_ROWS = 16  # from which the kernel for AMX is no slower than MKL
_FEW_AMX_ROWS = {torch.float32: _AMX_ROWS - 1, torch.bfloat16: 8}  # up to which it is where there is AMX
_WORTH = 1 << 26  # multiply-adds of a product from which the overhead of an op with gradients no longer counts


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, on the CPU in the fastest of four ways.

    Without gradients, products of at most 32 rows, as in decoding, take a kernel of our own, which reads the weights
    once. Where the processor has AMX (Intel's Xeons since 2023), that is for at most 15 in float32 and 8 in bfloat16,
    and other float32 products, if they are large or have at least 16 rows and need no gradients, take another, 1.2 to
    1.5 times as fast as MKL: a float32 is the sum of three bfloat16, and six products of those make one of float32,
    with no larger an error than torch's if I is at least 2. There alone an infinity, or a number above 3.38e38, gives
    NaN. Without AMX torch computes them with MKL, which takes a slow path on processors that are not Intel's; oneDNN,
    which torch also holds, does not. So they go to oneDNN where torch has MKL and the processor is another maker's, if
    they are large or need no gradients. Large bfloat16 products are torch's everywhere; but with AMX, for the gradient
    of the weights, one matrix is copied to the layout that oneDNN multiplies twice as fast.
    `MEGALODON_OPS_LINEAR` in the environment decides otherwise: `torch` leaves everything to torch, `onednn` takes
    oneDNN on any processor. Results differ by rounding alone; the choice depends on the machine and on sizes, never on
    a measurement.

    Args:
        x: (..., I). weight: (O, I). bias: (O,) or None.

    Returns:
        (..., O).

    Example:
        >>> import torch, megalodon_ops.linear as m
        >>> m.linear(torch.ones(2, 3), torch.ones(4, 3)).shape
        torch.Size([2, 4])
    """
    if takes_few_rows(x, weight, bias):
        return call(linear_few_rows, x, weight, bias)
    if _suits_linear_fwd(x, weight) and _is_plain(x, weight, bias):
        return call(linear_fwd, x, weight, bias)
    return F.linear(x, weight, bias)


def _suits_linear_fwd(x: Tensor, weight: Tensor) -> bool:
    """Whether the product takes AMX or oneDNN, or its gradient of the weights will take a copy."""
    if x.dtype == torch.bfloat16:
        return USES_AMX and torch.is_grad_enabled() and x.numel() * weight.shape[0] >= _WORTH
    if x.dtype != torch.float32:
        return False
    if torch.is_grad_enabled():
        return (USES_AMX or USES_ONEDNN) and x.numel() * weight.shape[0] >= _WORTH
    return (USES_AMX and x.numel() >= _AMX_ROWS * x.shape[-1] > 0) or USES_ONEDNN


def takes_few_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether the product goes to the kernel for few rows."""
    if torch.is_grad_enabled() or not USES_KERNELS or not 0 < x.numel() <= most_few_rows(x.dtype) * x.shape[-1]:
        return False
    return _is_plain(x, weight, bias)


def most_few_rows(dtype: torch.dtype) -> int:
    """So many rows are few."""
    return _FEW_AMX_ROWS.get(dtype, _FEW_ROWS) if USES_AMX else _FEW_ROWS


def _is_plain(x: Tensor, weight: Tensor, other: Tensor | None) -> bool:
    """On the CPU, in one floating dtype, which autocast does not change, and without tangents."""
    if in_forward_mode():
        return False
    same = x.dtype == weight.dtype and (other is None or other.dtype == x.dtype) and x.is_floating_point()
    return same and x.is_cpu and weight.is_cpu and not torch.is_autocast_enabled("cpu")


def choose(choice: str) -> bool:
    """Whether large float32 products go to oneDNN: "torch": no, "onednn": yes, "auto": where MKL is slow."""
    if choice not in ("auto", "torch", "onednn"):
        raise ImportError(f"megalodon_ops: MEGALODON_OPS_LINEAR must be auto, torch or onednn, got {choice}.")
    has = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if choice == "onednn" and not has:
        raise ImportError("megalodon_ops: MEGALODON_OPS_LINEAR is onednn, which this torch lacks; set it to torch.")
    return has and (choice == "onednn" or (choice == "auto" and torch.backends.mkl.is_available() and not _is_intel()))


def _is_intel() -> bool:
    """Also true where the system does not say: then MKL stays."""
    return not _CPUINFO.exists() or "GenuineIntel" in _CPUINFO.read_text()


_CHOICE = os.environ.get("MEGALODON_OPS_LINEAR", "auto")
USES_ONEDNN, USES_KERNELS = choose(_CHOICE), _CHOICE != "torch"
USES_AMX = _CHOICE == "auto" and _C.active_isa() == "v4_amx"


def _few_rows(x, weight, bias):
    y = _fwd_fake(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    launch("linear_few_rows", rows, weight.contiguous(), contiguous_or_none(bias), y.view(len(rows), -1))
    return y


def add_product_(y: Tensor, x: Tensor, weight: Tensor, rows: int) -> None:
    """y += x weight^T, outside autograd. Where that takes two steps, for `rows` of y at a time, as suits the cache."""
    if _runs_on_amx() and x.dtype == torch.float32 and _is_plain(x, weight, y):
        _amx(x, weight, None, y, add=True)
        return
    if USES_ONEDNN and x.dtype == torch.float32 and _is_plain(x, weight, y):
        x = _by_rows(x)  # whole, as its parts are not the transpose of contiguous ones
    for part, of_x in zip(y.split(rows), x.split(rows), strict=True):
        part.add_(linear(of_x, weight))


def _runs_on_amx() -> bool:
    return USES_AMX and _C.active_isa() == "v4_amx"  # which may be another than at import


def _fwd(x, weight, bias):
    if x.dtype == torch.bfloat16:
        return _bfloat16(x, weight, bias)
    if _runs_on_amx():
        y = _fwd_fake(x, weight, bias)
        _amx(x.reshape(-1, x.shape[-1]), weight, bias, y.view(-1, y.shape[-1]), add=False)
        return y
    if not USES_ONEDNN:
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(_by_rows(x), weight, bias, "none", [], "")


def _bfloat16(x, weight, bias):
    """By torch. Two transposed matrices, as for a gradient of weights, take it twice as long: the smaller is copied."""
    if bias is not None or not _is_transposed(x) or not _is_transposed(weight):
        return F.linear(x, weight, bias)
    if x.numel() <= weight.numel() + x.shape[0] * weight.shape[0]:
        return F.linear(_by_rows(x), weight)
    return _by_rows(F.linear(_by_rows(weight), x).t())


def _amx(x, weight, bias, y, add):
    matrices = *_contiguous_or_transposed(x), *_contiguous_or_transposed(weight)
    launch("linear_amx", *matrices, contiguous_or_none(bias), y, add)


def _contiguous_or_transposed(matrix: Tensor) -> tuple[Tensor, bool]:
    """A contiguous matrix, and whether it is the transpose of the one that is given."""
    transposed = _is_transposed(matrix)
    return (matrix.t() if transposed else matrix.contiguous()), transposed


def _is_transposed(matrix: Tensor) -> bool:
    return matrix.dim() == 2 and not matrix.is_contiguous() and matrix.t().is_contiguous()


def _by_rows(x: Tensor) -> Tensor:
    """Contiguous, as oneDNN wants it. The transposed matrix of a weight's gradient is copied faster than torch does."""
    if not _is_transposed(x):
        return x.contiguous()
    rows = torch.empty_like(x, memory_format=torch.contiguous_format)
    launch("transpose", x.t(), rows)
    return rows


def _fwd_fake(x, weight, bias):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _setup_context(ctx, inputs, output):
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, dy):
    x, weight = ctx.saved_tensors
    rows = dy.reshape(-1, dy.shape[-1])
    dx = call(linear_fwd, dy, weight.t(), None) if ctx.needs_input_grad[0] else None
    dweight = call(linear_fwd, rows.t(), x.reshape(-1, x.shape[-1]).t(), None) if ctx.needs_input_grad[1] else None
    return dx, dweight, rows.sum(0) if ctx.needs_input_grad[2] else None


linear_fwd = define_op(
    "linear_fwd(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    kernel=_fwd,
    fake=_fwd_fake,
    setup_context=_setup_context,
    backward=_backward,
)
linear_few_rows = define_op(
    "linear_few_rows(Tensor x, Tensor weight, Tensor? bias) -> Tensor", kernel=_few_rows, fake=_fwd_fake
)
