"""`linear`: x weight^T + bias by torch or by one of two kernels, the fastest on the processor."""

import os
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ... import _C
from ..common.definition import OWN_TYPES, autocast, call, contiguous_or_none, define_op
from ..common.definition import in_forward_mode, is_exporting, launch
from ..common.checks import check_optional_tensor, check_tensor

_CPUINFO = Path("/proc/cpuinfo")
KERNEL_TYPES = (*OWN_TYPES, FakeTensor)  # types of tensors that the kernels or their fakes accept


class KernelChoice(NamedTuple):
    """Choice between torch and the kernels for products of one dtype on a processor.

    Without gradients, a product of few rows uses the kernel that reads the weights once. Products of many rows, and
    large products with gradients, use the op `linear_fwd` where that is faster than torch.
    """

    few_rows_to: int
    """most rows for which the kernel for few rows is faster than torch"""
    many_rows_from: int | None = None
    """fewest rows for which the kernel for many rows is faster than that for few; None: torch is faster than both"""
    training_from: int | None = None
    """fewest multiply-adds with gradients for which `linear_fwd`, with its call, is faster than torch; None: never"""
    casts_here: bool = False
    """True if, without gradients, the kernel for many rows gains more than autocast's cache of cast weights"""
    batches: bool = False
    """True if the kernel for many rows is faster than torch for batches of products"""


def choices(isa: str, mkl_is_slow: bool) -> dict[torch.dtype, KernelChoice]:
    """Return the choice for each dtype on a processor with this instruction set."""
    torch_is_fast = KernelChoice(few_rows_to=32)
    torch_is_slow = KernelChoice(few_rows_to=32, many_rows_from=64, training_from=1 << 20, casts_here=True)
    float16 = torch_is_slow if isa.startswith("v") and isa != "v4_amx" else torch_is_fast  # v3, v4, ...: x86
    float32, bfloat16 = torch_is_fast, float16
    if isa == "v4_amx":
        float32 = KernelChoice(few_rows_to=15, many_rows_from=16, training_from=1 << 26)
        bfloat16 = KernelChoice(few_rows_to=8)
    elif mkl_is_slow:
        float32 = KernelChoice(few_rows_to=32, many_rows_from=129, training_from=1 << 26, batches=True)
    if isa == "v4_bf16":
        bfloat16 = KernelChoice(few_rows_to=32, many_rows_from=129, training_from=1 << 29)
    return {torch.float32: float32, torch.bfloat16: bfloat16, torch.float16: float16, torch.float64: torch_is_fast}


def _mkl_is_slow() -> bool:
    """Return True if torch computes float32 products with MKL on a processor that is not Intel's."""
    has_mkl = torch.backends.mkl.is_available() and _CPUINFO.exists()
    return has_mkl and "GenuineIntel" not in _CPUINFO.read_text()


_ENVIRONMENT = os.environ.get("MEGALODON_OPS_LINEAR", "auto")
if _ENVIRONMENT not in ("auto", "torch"):
    raise ImportError(f"megalodon_ops: MEGALODON_OPS_LINEAR must be auto or torch, got {_ENVIRONMENT}.")
CHOICES = choices(_C.active_isa(), _mkl_is_slow()) if _ENVIRONMENT == "auto" else {}
"""Choices of this process; empty if torch computes everything"""
CUDA_FEW_ROWS = 8
"""Most rows for which a :class:`FusedLinear` uses the CUDA kernel, which reads the weights once for them"""
_ALL_BY_TORCH = KernelChoice(few_rows_to=0)
_READS_ON = bool(CHOICES) and "v4_amx" in _C.available_isas()
"""True if torch reads past the ends of bfloat16 rows: 32 values at a time, the excess times 0 (docs/numerics.md)"""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `torch.nn.functional.linear`; on the CPU by torch or one of two kernels, the fastest of them.

    Products of few rows, as in decoding, use a kernel that reads the weights once; products of many rows use another
    kernel if torch's libraries are slower on the processor. `docs/cpu.md` has a table of the choices. They depend on
    processor, dtype and sizes, never on a measurement. Results differ by rounding alone, except that with AMX an
    infinite float32, or one above 3.38e38, gives NaN. With `MEGALODON_OPS_LINEAR=torch` in the environment, torch
    computes every product.

    Under torch.autocast the tensors are cast first, unless torch, which caches cast weights, is faster. In a program of
    torch.export, the op `linear_fwd` chooses in each run, by the number of rows of that run.

    Args:
        x: (..., I). weight: (O, I). bias: (O,) or None.

    Returns:
        (..., O).

    Example:
        >>> import torch, megalodon_ops as mo
        >>> mo.linear(torch.ones(2, 3), torch.ones(4, 3)).shape
        torch.Size([2, 4])
    """
    check_tensor("linear", "x", x)
    check_tensor("linear", "weight", weight)
    check_optional_tensor("linear", "bias", bias)
    if type(weight) in KERNEL_TYPES and (weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]):
        raise ValueError(
            f"linear: `weight` must have shape (O, I) beside an x (..., I), got {tuple(weight.shape)} and {tuple(x.shape)}."
        )
    if bias is not None and type(bias) in KERNEL_TYPES and bias.shape != weight.shape[:1]:
        raise ValueError(f"linear: `bias` must have shape (O,) = {tuple(weight.shape[:1])}, got {tuple(bias.shape)}.")
    if is_exporting():
        return call(linear_fwd, x, weight, bias) if _is_plain(x, weight, bias) else F.linear(x, weight, bias)
    if takes_few_rows(x, weight, bias):
        return call(linear_few_rows, x, weight, bias)
    if CHOICES and x.is_cpu and torch.is_autocast_enabled("cpu") and _suits_casting(x, weight):
        x, weight, bias = autocast(x, weight, bias)
    if _suits_linear_fwd(x, weight) and _is_plain(x, weight, bias):
        return call(linear_fwd, x, weight, bias)
    return F.linear(_without_gaps(x), weight, bias)


def _choice_for(dtype: torch.dtype) -> KernelChoice:
    return CHOICES.get(dtype, _ALL_BY_TORCH)


def _has_rows(x: Tensor, count: int) -> bool:
    """Return True if x (..., I) has at least `count` rows."""
    return x.numel() >= count * x.shape[-1]


def _suits_casting(x: Tensor, weight: Tensor) -> bool:
    """Return True if this function should cast for autocast because a kernel may follow; torch caches cast weights."""
    dtype = torch.get_autocast_dtype("cpu")
    choice = _choice_for(dtype)
    if torch.is_grad_enabled():
        return choice.training_from is not None or _backward_reads_on(dtype, weight)
    return choice.casts_here and _has_rows(x, choice.many_rows_from)


def _backward_reads_on(dtype: torch.dtype, weight: Tensor) -> bool:
    """Return True if torch's own backward may read memory after the rows of dy (..., O)."""
    return _READS_ON and dtype == torch.bfloat16 and weight.shape[0] % 32 != 0


def _suits_linear_fwd(x: Tensor, weight: Tensor) -> bool:
    choice, size = _choice_for(x.dtype), x.numel() * weight.shape[0]
    if size == 0:
        return False
    if torch.is_grad_enabled():
        is_large = choice.training_from is not None and size >= choice.training_from
        return is_large or _backward_reads_on(x.dtype, weight)
    return choice.many_rows_from is not None


def takes_few_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Return True if the kernel for few rows computes the product."""
    if torch.is_grad_enabled() or x.numel() == 0:
        return False
    return x.numel() <= most_few_rows(x.dtype) * x.shape[-1] and _is_plain(x, weight, bias)


def most_few_rows(dtype: torch.dtype) -> int:
    """Most rows that the kernel for few rows takes; 0 if torch computes everything."""
    return _choice_for(dtype).few_rows_to


def _is_plain(x: Tensor, weight: Tensor, other: Tensor | None) -> bool:
    """Return True for CPU tensors of KERNEL_TYPES, without tangents, in one floating dtype that autocast keeps."""
    if in_forward_mode() or not all(t is None or type(t) in KERNEL_TYPES for t in (x, weight, other)):
        return False
    same = x.dtype == weight.dtype and (other is None or other.dtype == x.dtype) and x.is_floating_point()
    cast = torch.is_autocast_enabled("cpu") and x.dtype != torch.get_autocast_dtype("cpu")
    return same and x.is_cpu and weight.is_cpu and not cast


def _few_rows(x, weight, bias, silu=False, value=None, add=None):
    y = _fwd_fake(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    like_y = (None if t is None else t.reshape(-1, t.shape[-1]).contiguous() for t in (value, add))
    launch("linear_few_rows", rows, weight.contiguous(), contiguous_or_none(bias), silu, *like_y, y.view(len(rows), -1))
    return y


def put_product_(y: Tensor, x: Tensor, weight: Tensor, rows: int, *, add: bool) -> None:
    """Compute y = x weight^T, or y += x weight^T, outside autograd; y may be float32 for x and weight of 16 bits.

    If no kernel writes to y, torch computes `rows` rows of y at a time; the caller chooses rows that fit the cache.
    """
    has_kernel = _choice_for(x.dtype).many_rows_from is not None
    if has_kernel and _is_plain(x, weight, None) and y.dtype in (x.dtype, torch.float32):
        _many_rows(x, weight, None, y, add=add)
        return
    for y_rows, x_rows in zip(y.split(rows), x.split(rows), strict=True):
        product = linear(x_rows, weight)
        y_rows.add_(product) if add else y_rows.copy_(product)


def put_products_(y: Tensor, a: Tensor, b: Tensor, *, add: bool = False) -> None:
    """Compute y = a b, or y += a b, outside autograd, for n matrices a (n, R, I), b (n, I, O) and y (n, R, O)."""
    if _choice_for(y.dtype).batches and y.numel() > 0 and y.is_contiguous() and _is_plain(a, b, y):
        left = a if a.is_contiguous() else a.mT
        right = b if b.is_contiguous() else b.mT
        if left.is_contiguous() and right.is_contiguous():  # the kernel takes b^T: `right` is that if it is not b
            launch("linear_many_rows", left, left is not a, right, right is b, None, add, y)
            return
    y.baddbmm_(a, b) if add else torch.bmm(a, b, out=y)


def _fwd(x, weight, bias):
    few_rows_to, many_rows_from, *_ = _choice_for(x.dtype)
    if not x.is_cpu or x.numel() == 0:
        return F.linear(x, weight, bias)
    if weight.is_contiguous() and not _has_rows(x, many_rows_from or few_rows_to + 1):
        return _few_rows(x, weight, bias)
    if many_rows_from is None:
        return F.linear(_without_gaps(x), _without_gaps(weight), bias)
    y = _fwd_fake(x, weight, bias)
    _many_rows(x.reshape(-1, x.shape[-1]), weight, bias, y.view(-1, y.shape[-1]), add=False)
    return y


def _without_gaps(x: Tensor) -> Tensor:
    """Return x, or a contiguous copy if torch would read memory between its rows."""
    reads_on = _READS_ON and x.is_cpu and x.dtype == torch.bfloat16 and x.shape[-1] % 32
    return x.contiguous() if reads_on and not _is_transposed(x) else x


def _many_rows(x, weight, bias, y, add):
    matrices = *_contiguous_or_transposed(x), *_contiguous_or_transposed(weight)
    launch("linear_many_rows", *matrices, contiguous_or_none(bias), add, y)


def _contiguous_or_transposed(matrix: Tensor) -> tuple[Tensor, bool]:
    """Return a contiguous matrix, and True if it is the transpose of `matrix`."""
    transposed = _is_transposed(matrix)
    return (matrix.t() if transposed else matrix.contiguous()), transposed


def _is_transposed(matrix: Tensor) -> bool:
    return matrix.dim() == 2 and not matrix.is_contiguous() and matrix.t().is_contiguous()


def _fwd_fake(x, weight, bias, *_):
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


def _flops(x, weight):
    return 2 * x.numel() * weight.shape[0]


linear_fwd = define_op(
    "linear_fwd(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    kernel=_fwd,
    fake=_fwd_fake,
    setup_context=_setup_context,
    backward=_backward,
    flops=_flops,
)
linear_few_rows = define_op(
    "linear_few_rows(Tensor x, Tensor weight, Tensor? bias, bool silu=False, Tensor? value=None, Tensor? add=None) "
    "-> Tensor",
    kernel=_few_rows,
    fake=_fwd_fake,
    flops=_flops,
)
"""x weight^T + bias; on CUDA silu(x weight^T + bias) value + add, with the shape of the result, which is rounded once"""
