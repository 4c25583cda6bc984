"""The paper's optimizer, and Muon: which parameters each takes, which decay, and how many threads a step takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.common.checks import check_number, check_size, described

PARALLEL_PARAMETER = 1 << 16
"""Numbers in a parameter, on average, from which the optimizer takes all threads: a guess between the default run's 2^13,
where one thread takes a quarter of the time of two, and a matrix's 2^20 and more"""


def parameter_groups(model: nn.Module, *, weight_decay: float = 0.1) -> list[dict[str, Any]]:
    """Two groups of the parameters to train: matrices, which decay, and norms, biases, CEMA and the attention's affine map.

    Any of torch's optimizers takes them. Parameters with requires_grad=False are left out.

    Example:
        >>> import torch, megalodon_ops as mo
        >>> from megalodon_ops.training import parameter_groups
        >>> config = mo.MegalodonConfig(num_layers=1, model_dim=32, z_dim=16, value_dim=32, ffn_hidden_dim=32, vocab_size=9)
        >>> groups = parameter_groups(mo.Megalodon(config), weight_decay=0.1)
        >>> optimizer = torch.optim.AdamW(groups, lr=1e-3)
        >>> [(group["weight_decay"], len(group["params"])) for group in groups]
        [(0.1, 9), (0.0, 18)]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"parameter_groups: `model` must be a module, got {described(model)}; give the model itself.")
    weight_decay = check_number("parameter_groups", "weight_decay", weight_decay, "a number of at least 0", 0.0)
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    matrices = {name for name, parameter in named if name.endswith("weight") and parameter.ndim == 2}
    decayed = [parameter for name, parameter in named if name in matrices]
    others = [parameter for name, parameter in named if name not in matrices]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def adamw(model: nn.Module, *, lr: float, weight_decay: float = 0.1) -> torch.optim.AdamW:
    """The paper's AdamW over :func:`parameter_groups`: betas 0.9 and 0.95, epsilon 1e-8.

    Example:
        >>> import megalodon_ops as mo
        >>> from megalodon_ops.training import adamw
        >>> config = mo.MegalodonConfig(num_layers=1, model_dim=32, z_dim=16, value_dim=32, ffn_hidden_dim=32, vocab_size=9)
        >>> adamw(mo.Megalodon(config), lr=3.5e-4).defaults["betas"]
        (0.9, 0.95)
    """
    groups = parameter_groups(model, weight_decay=weight_decay)
    return _adamw(groups, lr)


def _adamw(groups: list[dict[str, Any]], lr: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8, fused=True)


AT_ONCE = 1 << 24
"""Numbers in the matrices that Muon makes orthogonal together, which takes four times as much memory"""


class Muon(torch.optim.Optimizer):
    """Muon (https://kellerjordan.github.io/posts/muon/) for the matrices of the blocks, :func:`adamw` for all else.

    Muon moves a matrix by its momentum made orthogonal, all singular values of which are near 1:

        momentum <- 0.95 momentum + 0.05 gradient
        matrix   <- (1 - lr weight_decay) matrix - 0.2 sqrt(max(rows, columns)) lr orthogonal(0.95 momentum + 0.05 gradient)

    The factor makes its steps as large as AdamW's (arXiv 2502.16982), so that one learning rate serves all parameters.
    The matrices are those between the embedding and the output layer. Of a model that is sharded over processes, each
    matrix is gathered for its step.

    `torch.optim.Muon` does the same, but for bfloat16 in the place of float32 on the CPU, where most processors have no
    such products: a matrix of 256 x 128 takes it 39 ms with AVX2, and this class 2 ms.

    Example:
        >>> import megalodon_ops as mo
        >>> from megalodon_ops.training import Muon
        >>> config = mo.MegalodonConfig(num_layers=1, model_dim=32, z_dim=16, value_dim=32, ffn_hidden_dim=32, vocab_size=9)
        >>> optimizer = Muon(mo.Megalodon(config), lr=5e-3)
        >>> [(len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups]
        [(7, 0.1), (2, 0.1), (18, 0.0)]
    """

    MOMENTUM = 0.95

    def __init__(self, model: nn.Module, *, lr: float, weight_decay: float = 0.1):
        matrices, others = parameter_groups(model, weight_decay=weight_decay)
        inner = {parameter for name, parameter in model.named_parameters() if "layers" in name.split(".")}
        outside = [parameter for parameter in matrices["params"] if parameter not in inner]
        blocks = {**matrices, "params": [parameter for parameter in matrices["params"] if parameter in inner], "lr": lr}
        self._rest = _adamw([{**matrices, "params": outside}, others], lr)
        super().__init__([blocks, *self._rest.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Gives AdamW its part of this optimizer's groups, and the state of all."""
        self._rest.param_groups, self._rest.state = self.param_groups[1:], self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step_of_matrices(self.param_groups[0])
        self._rest.step()
        return loss

    def _step_of_matrices(self, group: dict[str, Any]) -> None:
        by_shape: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for matrix in group["params"]:
            if matrix.grad is not None:
                by_shape.setdefault(tuple(sorted(matrix.shape)), []).append(matrix)
        for (shorter, longer), matrices in by_shape.items():
            count = max(1, AT_ONCE // (shorter * longer))
            for first in range(0, len(matrices), count):
                some = matrices[first : first + count]
                directions = orthogonal(torch.stack([_wide(self._update(matrix)) for matrix in some]))
                for matrix, direction in zip(some, directions, strict=True):
                    direction = direction if direction.shape == matrix.shape else direction.mT
                    matrix.mul_(1 - group["lr"] * group["weight_decay"])
                    matrix.add_(_part_like(matrix, direction), alpha=-0.2 * longer**0.5 * group["lr"])

    def _update(self, matrix: nn.Parameter) -> Tensor:
        """What is to be made orthogonal, whole in every process."""
        state = self.state[matrix]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(matrix)
        momentum = state["momentum_buffer"].lerp_(matrix.grad, 1 - self.MOMENTUM)
        update = matrix.grad.lerp(momentum, self.MOMENTUM)
        return update.full_tensor() if hasattr(update, "full_tensor") else update


def orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """Matrices (B, M, N), M <= N, with singular values brought to about 0.7 to 1.2 by Newton-Schulz steps, all but tiny ones.

    Each step makes a singular value s into 3.4445 s - 4.775 s^3 + 2.0315 s^5. Products are in float32, or
    float64, and on GPUs in bfloat16.
    """
    x = matrices.to(torch.bfloat16 if matrices.is_cuda else torch.promote_types(matrices.dtype, torch.float32))
    x = x / x.flatten(1).norm(dim=1).clamp(min=1e-7)[:, None, None]  # no singular value above 1
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315), x, beta=3.4445)
    return x.to(matrices.dtype)


def _wide(matrix: Tensor) -> Tensor:
    """The matrix, or its transposed one, with no more rows than columns."""
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT


def _part_like(parameter: nn.Parameter, whole: Tensor) -> Tensor:
    """Of a tensor that all processes have whole, what this process has of the parameter."""
    if not hasattr(parameter, "full_tensor"):
        return whole
    from torch.distributed.tensor import DTensor, Replicate

    mesh = parameter.device_mesh
    return DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False).redistribute(
        placements=parameter.placements
    )


def optimizer_threads(model: nn.Module) -> int:
    """How many threads a step of the optimizer takes the least time with."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"optimizer_threads: `model` must be a module, got {described(model)}.")
    sizes = [parameter.numel() for parameter in model.parameters()]
    return 1 if sum(sizes) < PARALLEL_PARAMETER * len(sizes) else torch.get_num_threads()


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Inside the block, torch's operations take `count` threads."""
    count, before = check_size("threads", "count", count), torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
