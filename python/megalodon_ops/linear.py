"""`linear`: x weight^T + bias by torch or by a kernel of our own, whichever is the fastest on the processor."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from . import _C
from .library import autocast, call, contiguous_or_none, define_op, in_forward_mode, launch
from .memory import OWN_TYPES, empty, empty_like

_CPUINFO = Path("/proc/cpuinfo")
KERNEL_TYPES = (*OWN_TYPES, FakeTensor)  # that the kernels, or their fakes, take
_FEW_ROWS = 32  # up to which the kernel that reads the weights once is the fastest
_AMX_ROWS = 16  # from which the kernel for AMX is no slower than MKL
_FEW_AMX_ROWS = {torch.float32: _AMX_ROWS - 1, torch.bfloat16: 8}  # up to which it is where there is AMX
_MANY_ROWS = {torch.float32: 129, torch.bfloat16: 64, torch.float16: 64}  # from which the other is, without AMX
_WORTH = 1 << 26  # multiply-adds of a product from which the overhead of an op with gradients no longer counts
_WORTH_OF_DOTS = 1 << 29  # the same, where torch is nearly as fast: in bfloat16 with instructions for it
_WORTH_WHERE_SLOW = 1 << 20  # where torch is many times slower


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, on the CPU in the fastest of three ways.

    Without gradients, products of at most 32 rows (where there is AMX, 15 in float32 and 8 in bfloat16), as in
    decoding, take a kernel of our own, which reads the weights once. Others, if they are large or need no gradients,
    take another where torch's libraries are slower:

    - In float32 on processors that are not Intel's, where MKL takes a slow path, and on Intel's that have AMX (Xeons
      since 2023): there a float32 is the sum of three bfloat16, and six products of those make one of float32, 1.2 to
      1.5 times as fast as MKL and with no larger an error than torch's if I is at least 2. There alone an infinity, or
      a number above 3.38e38, gives NaN. Without AMX errors are, in the mean square, up to a fifth larger than MKL's.
    - In bfloat16 and float16 on all x86 processors without AMX. Where there is AVX512-BF16, torch's bfloat16 products
      take 1.03 to 1.1 times as long; elsewhere, and in float16, 2.6 to more than 100 times. Sums are float32.

    Under torch.autocast the tensors are cast first. Without gradients that is left to torch, which keeps weights that
    it has cast, for few rows and where its products are nearly as fast. All else is torch's; but with AMX, for the
    bfloat16 gradient of the weights, one matrix is copied to the layout that oneDNN multiplies twice as fast. In the
    environment, `MEGALODON_OPS_LINEAR=torch` leaves everything to torch. Results differ by rounding alone; the choice
    depends on the machine and on sizes, never on a measurement.

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
    if USES_KERNELS and x.is_cpu and torch.is_autocast_enabled("cpu") and _suits_casting(x):
        x, weight, *given = autocast(x, weight, *(() if bias is None else (bias,)))
        bias = given[0] if given else None
    if _suits_linear_fwd(x, weight) and _is_plain(x, weight, bias):
        return call(linear_fwd, x, weight, bias)
    return F.linear(x, weight, bias)


def _suits_casting(x: Tensor) -> bool:
    """Whether to cast for autocast here.

    Torch keeps weights that it has cast: without gradients, that gains more for few rows, and where it is nearly as
    fast.
    """
    dtype = torch.get_autocast_dtype("cpu")
    if torch.is_grad_enabled():
        return True
    return _has_many_rows(dtype) and not _has_dots(dtype) and x.numel() >= _MANY_ROWS[dtype] * x.shape[-1]


def _suits_linear_fwd(x: Tensor, weight: Tensor) -> bool:
    """Whether the product takes the kernel for many rows, or its gradient of the weights will take a copy."""
    size, dots = x.numel() * weight.shape[0], _has_dots(x.dtype)
    if size == 0:
        return False
    if not _has_many_rows(x.dtype):
        return USES_AMX and dots and torch.is_grad_enabled() and size >= _WORTH
    if torch.is_grad_enabled():
        worth = _WORTH if x.dtype == torch.float32 else _WORTH_OF_DOTS if dots else _WORTH_WHERE_SLOW
        return size >= worth
    return x.numel() >= (_AMX_ROWS if USES_AMX else 1) * x.shape[-1]


def _has_many_rows(dtype: torch.dtype) -> bool:
    """Whether there is a kernel for many rows that is faster than torch."""
    return USES_MANY_ROWS if dtype == torch.float32 else USES_SHORT_MANY_ROWS and dtype in _MANY_ROWS


def _has_dots(dtype: torch.dtype) -> bool:
    """Whether the processor has instructions for it, which torch's libraries use as well."""
    return dtype == torch.bfloat16 and _HAS_BFLOAT16


def takes_few_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether the product goes to the kernel for few rows."""
    if torch.is_grad_enabled() or not USES_KERNELS or x.shape[-1] == 0:
        return False
    return 0 < x.numel() // x.shape[-1] <= most_few_rows(x.dtype) and _is_plain(x, weight, bias)


def most_few_rows(dtype: torch.dtype) -> int:
    """So many rows are few."""
    return _FEW_AMX_ROWS.get(dtype, _FEW_ROWS) if USES_AMX else _FEW_ROWS


def _is_plain(x: Tensor, weight: Tensor, other: Tensor | None) -> bool:
    """On the CPU, in one floating dtype, which autocast does not change, without tangents and of no other type."""
    if in_forward_mode() or not all(t is None or type(t) in KERNEL_TYPES for t in (x, weight, other)):
        return False
    same = x.dtype == weight.dtype and (other is None or other.dtype == x.dtype) and x.is_floating_point()
    cast = torch.is_autocast_enabled("cpu") and x.dtype != torch.get_autocast_dtype("cpu")
    return same and x.is_cpu and weight.is_cpu and not cast


def _mkl_is_slow() -> bool:
    """Whether torch computes float32 products with MKL and the processor is not one of its maker's."""
    has_mkl = torch.backends.mkl.is_available() and _CPUINFO.exists()
    return has_mkl and "GenuineIntel" not in _CPUINFO.read_text()


_CHOICE = os.environ.get("MEGALODON_OPS_LINEAR", "auto")
if _CHOICE not in ("auto", "torch"):
    raise ImportError(f"megalodon_ops: MEGALODON_OPS_LINEAR must be auto or torch, got {_CHOICE}.")
USES_KERNELS = _CHOICE == "auto"
USES_AMX = USES_KERNELS and _C.active_isa() == "v4_amx"
USES_MANY_ROWS = USES_AMX or (USES_KERNELS and _mkl_is_slow())  # in float32
USES_SHORT_MANY_ROWS = USES_KERNELS and _C.active_isa() not in ("v4_amx", "generic")  # in bfloat16 and float16
_HAS_BFLOAT16 = _C.active_isa() in ("v4_bf16", "v4_amx")


def _few_rows(x, weight, bias):
    y = _fwd_fake(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    launch("linear_few_rows", rows, weight.contiguous(), contiguous_or_none(bias), y.view(len(rows), -1))
    return y


def put_product_(y: Tensor, x: Tensor, weight: Tensor, rows: int, *, add: bool) -> None:
    """y = x weight^T, or y += x weight^T, outside autograd; y may be float32 where they are shorter.

    Where that takes two steps, for `rows` of y at a time, as suits the cache.
    """
    if _has_many_rows(x.dtype) and _is_plain(x, weight, None) and y.dtype in (x.dtype, torch.float32):
        _many_rows(x, weight, None, y, add=add)
        return
    for part, of_x in zip(y.split(rows), x.split(rows), strict=True):
        product = linear(of_x, weight)
        part.add_(product) if add else part.copy_(product)


def _fwd(x, weight, bias):
    if not _has_many_rows(x.dtype):
        return _by_torch(x, weight, bias)
    if weight.is_contiguous() and not USES_AMX and x.numel() < _MANY_ROWS[x.dtype] * x.shape[-1]:
        return _few_rows(x, weight, bias)
    y = _fwd_fake(x, weight, bias)
    _many_rows(x.reshape(-1, x.shape[-1]), weight, bias, y.view(-1, y.shape[-1]), add=False)
    return y


def _by_torch(x, weight, bias):
    """Two transposed bfloat16 matrices, as for a gradient of weights, take it twice as long: the smaller is copied."""
    if x.dtype != torch.bfloat16 or bias is not None or not _is_transposed(x) or not _is_transposed(weight):
        return F.linear(x, weight, bias)
    if x.numel() <= weight.numel() + x.shape[0] * weight.shape[0]:
        return F.linear(_by_rows(x), weight)
    return _by_rows(F.linear(_by_rows(weight), x).t())


def _many_rows(x, weight, bias, y, add):
    matrices = *_contiguous_or_transposed(x), *_contiguous_or_transposed(weight)
    launch("linear_many_rows", *matrices, contiguous_or_none(bias), y, add)


def _contiguous_or_transposed(matrix: Tensor) -> tuple[Tensor, bool]:
    """A contiguous matrix, and whether it is the transpose of the one that is given."""
    transposed = _is_transposed(matrix)
    return (matrix.t() if transposed else matrix.contiguous()), transposed


def _is_transposed(matrix: Tensor) -> bool:
    return matrix.dim() == 2 and not matrix.is_contiguous() and matrix.t().is_contiguous()


def _by_rows(x: Tensor) -> Tensor:
    """Contiguous. The transposed matrix of a weight's gradient is copied faster than torch does."""
    if not _is_transposed(x):
        return x.contiguous()
    rows = empty_like(x)
    launch("transpose", x.t(), rows)
    return rows


def _fwd_fake(x, weight, bias):
    return empty(x, (*x.shape[:-1], weight.shape[0]))


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
