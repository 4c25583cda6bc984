"""`linear`: x weight^T + bias through the faster of torch's two libraries of matrix products."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .library import call, define_op

_CPUINFO = Path("/proc/cpuinfo")
# Multiply-adds of a product from which the overhead of the call no longer counts: with gradients, and without.
_WORTH_WITH_GRADIENTS, _WORTH = 1 << 26, 1 << 16


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, on the CPU through oneDNN where that is the faster way.

    torch computes float32 matrix products with MKL, which takes a slow path on processors that are not Intel's; oneDNN,
    which torch also holds, does not. So large float32 products go to oneDNN where torch has MKL and the processor is
    another maker's. `MEGALODON_OPS_LINEAR=torch` or `onednn` in the environment decides otherwise. Results differ by
    rounding alone; the choice depends on the machine, never on a measurement.

    Args:
        x: (..., I). weight: (O, I). bias: (O,) or None.

    Returns:
        (..., O).

    Example:
        >>> import torch, megalodon_ops.linear as m
        >>> m.linear(torch.ones(2, 3), torch.ones(4, 3)).shape
        torch.Size([2, 4])
    """
    worth = _WORTH_WITH_GRADIENTS if torch.is_grad_enabled() else _WORTH
    if USES_ONEDNN and x.numel() * weight.shape[0] >= worth and _is_plain(x, weight):
        return call(linear_fwd, x, weight, bias)
    return F.linear(x, weight, bias)


def _is_plain(x: Tensor, weight: Tensor) -> bool:
    float32 = x.dtype == weight.dtype == torch.float32
    return float32 and x.device.type == weight.device.type == "cpu" and not torch.is_autocast_enabled("cpu")


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


USES_ONEDNN = choose(os.environ.get("MEGALODON_OPS_LINEAR", "auto"))


def _fwd(x, weight, bias):
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _fwd_fake(x, weight, bias):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _setup_context(ctx, inputs, output):
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, dy):
    x, weight = ctx.saved_tensors
    rows = dy.reshape(-1, dy.shape[-1])
    dx = linear_fwd(dy, weight.t(), None) if ctx.needs_input_grad[0] else None
    dweight = linear_fwd(rows.t(), x.reshape(-1, x.shape[-1]).t(), None) if ctx.needs_input_grad[1] else None
    return dx, dweight, rows.sum(0) if ctx.needs_input_grad[2] else None


linear_fwd = define_op(
    "linear_fwd(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    kernel=_fwd,
    fake=_fwd_fake,
    setup_context=_setup_context,
    backward=_backward,
)
