"""What a model's pieces keep and compute in a training step, measured while their own code runs without memory.

Tensors on the device `meta` are shapes alone, and the model takes a GPU's way; fake tensors take the CPU's way.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from ..model.config import MegalodonConfig
from ..model.megalodon import Megalodon
from ..ops.linear_cross_entropy.linear_cross_entropy import linear_cross_entropy

PRODUCTS, OTHERS, AGAIN = "matrix products, attention", "CEMA, norms, gates", "computed again"
"""Kinds of operations: those of matrix units, those of a card's float32 units, and those of either for recomputation"""


class Piece(NamedTuple):
    """What a piece of the model takes on a device: a block, or the final norm and the loss."""

    kept: list[int]
    """bytes of each tensor that autograd keeps for the backward, parameters apart"""
    operations: dict[str, int]
    """of forward and backward, by kind, as `torch.utils.flop_counter` counts them"""


def measure(
    config: MegalodonConfig,
    rows: int,
    length: int,
    tensor: int = 1,
    dtype: torch.dtype = torch.float32,
    autocast: bool = False,
    on_cpu: bool = False,
    recompute: bool = False,
) -> tuple[Piece, Piece]:
    """A block, and the final norm with the loss, on a batch of (rows, length) tokens; see :func:`plan`.

    Of `tensor` devices that share a block each has a part of its operations and of what it keeps, but all channels that
    are gathered, which are those of norms and of what products read. For the loss, each has a part of the tokens.
    """
    stream, device = torch.float32 if autocast else dtype, "cpu" if on_cpu else "meta"
    with torch.device("meta"):
        model = Megalodon(dataclasses.replace(config, num_layers=1)).to(stream).train()
    with FakeTensorMode(allow_non_fake_inputs=True) if on_cpu else contextlib.nullcontext():
        (block,), output = model.to_empty(device=device).layers, model.output
        shapes = (rows, length, config.model_dim), (1, math.ceil(rows * length / tensor), config.model_dim)
        x, last = (torch.empty(*shape, dtype=stream, device=device, requires_grad=True) for shape in shapes)
        targets = torch.zeros(last.shape[1], dtype=torch.int64, device=device)
        given = [*model.parameters(), *model.buffers(), targets]

        def loss(x: Tensor) -> Tensor:
            hidden, weight = output.final_norm(x)[0].to(dtype), output.output.weight.to(dtype)
            return linear_cross_entropy(hidden, weight, targets)

        with torch.autocast("cpu", dtype, enabled=autocast) if on_cpu else _AsOnGpu(dtype, autocast):
            saved, saved_by_loss = _saved(block, x, given), _saved(loss, last, given)
        operations, of_loss = _operations(block, x), _operations(loss, last)

        def again(x: Tensor) -> Tensor:
            # given x, a checkpoint of torch 2.5 asks for the generators of its device, and `meta` has none
            if not recompute:
                return block(x)
            return checkpoint(lambda: block(x), use_reentrant=False, preserve_rng_state=False)

        added = sum(_operations(again, x).values()) - sum(operations.values())
    kept = [size if numbers == x.numel() else size // tensor for numbers, size in saved]
    own = {kind: count // tensor for kind, count in {**operations, AGAIN: added}.items()}
    return Piece(kept, own), Piece([size for _, size in saved_by_loss], of_loss)


def _saved(call: Callable[[Tensor], Tensor], x: Tensor, given: list[Tensor]) -> list[tuple[int, int]]:
    """Numbers and bytes of each piece of memory that autograd keeps for a function's backward, but of what is given."""
    found: dict[int, Tensor] = {}  # which keeps the tensors alive, so that an address stays one memory's
    with saved_tensors_hooks(lambda t: found.setdefault(t.untyped_storage()._cdata, t), lambda t: t):
        call(x)
    for tensor in given:
        found.pop(tensor.untyped_storage()._cdata, None)
    return [(tensor.numel(), tensor.untyped_storage().nbytes()) for tensor in found.values()]


def _operations(call: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, int]:
    """What a forward and a backward of a function compute, by kind."""
    with FlopCounterMode(display=False) as counter:
        call(x).sum().backward()
    counts = counter.get_flop_counts()["Global"].items()
    # How the ops' names begin.
    of_products = ("mm", "addmm", "linear", "chunked_attention", "two_chunk_attention", "adaptive_working_memory")
    products = sum(count for op, count in counts if op.__name__.startswith(of_products))
    return {PRODUCTS: products, OTHERS: sum(count for _, count in counts) - products}


class _AsOnGpu(TorchFunctionMode):
    """Makes tensors on `meta` take a GPU's way where torch does not: autocast, and one kernel for RMS norm."""

    def __init__(self, dtype: torch.dtype, autocast: bool) -> None:
        super().__init__()
        self.dtype, self.autocast = dtype, autocast

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        options = kwargs or {}
        if func is F.rms_norm:  # of which a GPU keeps one number a row less than of a layer norm
            return F.layer_norm(*args, weight=options["weight"], eps=options["eps"])
        if func is F.linear and self.autocast:
            args = tuple(None if tensor is None else tensor.to(self.dtype) for tensor in args)
        return func(*args, **options)
