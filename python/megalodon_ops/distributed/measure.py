"""Saved bytes and operations of a model's parts in a training step, measured by running their code without memory.

Tensors on the device `meta` have no memory and take the code paths of a GPU; fake tensors take those of the CPU.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable
from functools import partial
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
from ..public_models import Megalodon
from ..ops.linear_cross_entropy.linear_cross_entropy import linear_cross_entropy

PRODUCTS, OTHERS, RECOMPUTED = "matrix products, attention", "CEMA, norms, gates", "computed again"
"""Kinds of operations: on a GPU's matrix units, on its float32 units, and recomputed operations on either"""


class Cost(NamedTuple):
    """Cost of a part of the model on a device: a block, or the final norm and the loss."""

    saved: list[int]
    """bytes of each tensor that autograd saves for the backward, without parameters"""
    operations: dict[str, int]
    """operations of forward and backward, by kind, as `torch.utils.flop_counter` counts them"""


def measure(
    config: MegalodonConfig, rows: int, length: int, tensor: int = 1, dtype: torch.dtype = torch.float32,
    autocast: bool = False, on_cpu: bool = False, recompute: bool = False,
) -> tuple[Cost, Cost]:  # fmt: skip
    """Measure a block, and the final norm with the loss, on a batch of (rows, length) tokens; see :func:`plan`.

    `tensor` devices share a block. Each device has a part of the operations and saved tensors, but all channels of
    gathered tensors (inputs of norms and products). For the loss, each device has a part of the tokens.
    """
    stream = torch.float32 if autocast else dtype  # dtype of the residual stream
    device = "cpu" if on_cpu else "meta"
    with torch.device("meta"):
        model = Megalodon(dataclasses.replace(config, num_layers=1, layerwise_ckpt=False)).to(stream).train()
    with FakeTensorMode(allow_non_fake_inputs=True) if on_cpu else contextlib.nullcontext():
        (block,), output = model.to_empty(device=device).layers, model.output
        empty = partial(torch.empty, dtype=stream, device=device, requires_grad=True)
        x = empty(rows, length, config.model_dim)
        last_hidden = empty(1, math.ceil(rows * length / tensor), config.model_dim)
        targets = torch.zeros(last_hidden.shape[1], dtype=torch.int64, device=device)
        inputs = [*model.parameters(), *model.buffers(), targets]

        def loss(x: Tensor) -> Tensor:
            hidden, weight = output.final_norm(x)[0].to(dtype), output.output.weight.to(dtype)
            return linear_cross_entropy(hidden, weight, targets)

        with torch.autocast("cpu", dtype, enabled=autocast) if on_cpu else _GpuPaths(dtype if autocast else None):
            saved, saved_by_loss = _saved(block, x, inputs), _saved(loss, last_hidden, inputs)
        operations, loss_operations = _operations(block, x), _operations(loss, last_hidden)

        def recomputed_block(x: Tensor) -> Tensor:
            # torch 2.5's checkpoint looks for the generators of its arguments' device, and `meta` has none
            return checkpoint(lambda: block(x), use_reentrant=False, preserve_rng_state=False)

        whole_operations = _operations(recomputed_block, x) if recompute else operations
        recomputed = sum(whole_operations.values()) - sum(operations.values())
    own_saved = [size if numbers == x.numel() else size // tensor for numbers, size in saved]
    own_operations = {kind: count // tensor for kind, count in {**operations, RECOMPUTED: recomputed}.items()}
    return Cost(own_saved, own_operations), Cost([size for _, size in saved_by_loss], loss_operations)


def _saved(call: Callable[[Tensor], Tensor], x: Tensor, inputs: list[Tensor]) -> list[tuple[int, int]]:
    """Elements and bytes of each storage that autograd saves for the backward of `call`, except those of `inputs`."""
    by_storage: dict[int, Tensor] = {}  # keeps the tensors alive, so no address is used twice
    with saved_tensors_hooks(lambda t: by_storage.setdefault(t.untyped_storage()._cdata, t), lambda t: t):
        call(x)
    for tensor in inputs:
        by_storage.pop(tensor.untyped_storage()._cdata, None)
    return [(tensor.numel(), tensor.untyped_storage().nbytes()) for tensor in by_storage.values()]


def _operations(call: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, int]:
    """Operations of a function's forward and backward, by kind."""
    with FlopCounterMode(display=False) as counter:
        call(x).sum().backward()
    counts = counter.get_flop_counts()["Global"].items()
    prefixes = ("mm", "addmm", "linear", "chunked_attention", "two_chunk_attention", "adaptive_working_memory")
    products = sum(count for op, count in counts if op.__name__.startswith(prefixes))
    return {PRODUCTS: products, OTHERS: sum(count for _, count in counts) - products}


class _GpuPaths(TorchFunctionMode):
    """Make tensors on `meta` take a GPU's code path under autocast, which torch has not for them."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        """dtype: that of products under autocast; None: no autocast."""
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is F.linear and self.dtype is not None:
            args = tuple(None if tensor is None else tensor.to(self.dtype) for tensor in args)
        return func(*args, **(kwargs or {}))
