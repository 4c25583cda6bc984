"""Hand-over: ranks hold consecutive pieces of a sequence; each waits for the state of the rank before and sends its own on.

This is the method of the paper's released code, here as hooks around this package's ops, for comparison with chunk
parallel. Gradients travel back from rank to rank in the same way.
"""

from typing import Any

import torch
import torch.distributed as dist
from megalodon_ops.distributed.merge import norm_in_float64
from torch import Tensor, nn

import megalodon_ops as mo


class HandOver:
    """Hooks of a model whose piece begins at position `before` of a row of one sequence."""

    def __init__(self, model: mo.Megalodon, before: int) -> None:
        self.rank = dist.get_rank()
        self.ranks = dist.get_world_size()
        self.before = before
        for norm in (*(block.mega.timenorm for block in model.layers), model.output.final_norm):
            norm.register_forward_pre_hook(self.before_norm, with_kwargs=True)
            norm.register_forward_hook(self.after_norm)
        for block in model.layers:
            block.mega.cema.register_forward_pre_hook(self.before_cema, with_kwargs=True)
            block.mega.cema.register_forward_hook(self.after_cema)

    def before_norm(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        if self.rank == 0:
            return None
        x = args[0]
        wide = _Receive.apply(x, x.new_empty((len(x), 2, module.num_groups), dtype=torch.float64))
        mean, var = wide.float().unbind(1)
        rounding = (wide - wide.float()).float().detach()
        count = torch.full((len(x),), self.before)
        return args, kwargs | {"state": mo.TimestepNormState(count, mean, var, rounding)}

    def after_norm(self, module: nn.Module, args: tuple, output: tuple) -> tuple | None:
        if self.rank == self.ranks - 1:
            return None
        y, state = output
        return _Send.apply(y, norm_in_float64(state)), state

    def before_cema(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        if self.rank == 0:
            return None
        x = args[0]
        D, N, _ = module.alpha.shape
        h = _Receive.apply(x, x.new_empty((len(x), D, N, 2), dtype=torch.float32))
        return args, kwargs | {"state": torch.view_as_complex(h)}

    def after_cema(self, module: nn.Module, args: tuple, output: tuple) -> tuple | None:
        if self.rank == self.ranks - 1:
            return None
        y, state = output
        return _Send.apply(y, torch.view_as_real(state)), state


class _Receive(torch.autograd.Function):
    """Receive a state; `x` only connects it to the graph, so that the backward runs and sends its gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, into: Tensor) -> Tensor:
        dist.recv(into, dist.get_rank() - 1)
        return into

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, None]:
        dist.send(grad.contiguous(), dist.get_rank() - 1)
        return None, None


class _Send(torch.autograd.Function):
    """Send a state and return `y`; the backward of `y` receives the state's gradient."""

    @staticmethod
    def forward(ctx, y: Tensor, state: Tensor) -> Tensor:
        ctx.like = state
        dist.send(state.contiguous(), dist.get_rank() + 1)
        return y.view_as(y)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor]:
        grad = torch.empty_like(ctx.like, memory_format=torch.contiguous_format)
        dist.recv(grad, dist.get_rank() + 1)
        return dy, grad
