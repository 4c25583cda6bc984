"""The paper's AdamW, and Muon: parameter groups, and the number of threads of an optimizer step."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.common.checks import check_number, check_size, describe

PARALLEL_PARAMETER = 1 << 16
"""An optimizer step uses all threads if parameters have at least this many elements on average. A guess between 2^13
(the default run, where one thread takes a quarter of the time of two) and 2^20 (a large matrix)"""


def parameter_groups(model: nn.Module, *, weight_decay: float = 0.1) -> list[dict[str, Any]]:
    """Return two parameter groups: matrices decay; norms, biases, CEMA and the attention's affine map do not.

    All of torch's optimizers accept these groups. Parameters with requires_grad=False are skipped.

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
        raise TypeError(f"parameter_groups: `model` must be a module, got {describe(model)}; give the model itself.")
    weight_decay = check_number("parameter_groups", "weight_decay", weight_decay, "a number of at least 0", 0.0)
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    matrices = {name for name, parameter in named if name.endswith("weight") and parameter.ndim == 2}
    decayed = [parameter for name, parameter in named if name in matrices]
    others = [parameter for name, parameter in named if name not in matrices]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def adamw(model: nn.Module, *, lr: float, weight_decay: float = 0.1) -> torch.optim.AdamW:
    """Return the paper's AdamW over :func:`parameter_groups`: betas 0.9 and 0.95, epsilon 1e-8.

    Example:
        >>> import megalodon_ops as mo
        >>> from megalodon_ops.training import adamw
        >>> config = mo.MegalodonConfig(num_layers=1, model_dim=32, z_dim=16, value_dim=32, ffn_hidden_dim=32, vocab_size=9)
        >>> adamw(mo.Megalodon(config), lr=3.5e-4).defaults["betas"]
        (0.9, 0.95)
    """
    return _adamw(parameter_groups(model, weight_decay=weight_decay), lr)


def _adamw(groups: list[dict[str, Any]], lr: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8, fused=True)


STACKED_NUMBERS = 1 << 24
"""Maximum number of elements that Muon orthogonalizes at a time; it needs four times their memory"""


class Muon(torch.optim.Optimizer):
    """Muon (https://kellerjordan.github.io/posts/muon/) for the matrices of the blocks, :func:`adamw` for the rest.

    Muon moves a matrix by its orthogonalized momentum, with all singular values near 1:

        momentum <- 0.95 momentum + 0.05 gradient
        matrix   <- (1 - lr weight_decay) matrix - 0.2 sqrt(max(rows, columns)) lr orthogonal(0.95 momentum + 0.05 gradient)

    The factor 0.2 sqrt(max(rows, columns)) makes Muon's updates as large as AdamW's (arXiv 2502.16982), so one learning
    rate serves all parameters. AdamW updates embedding and output layer. Sharded matrices are gathered for the update.

    `torch.optim.Muon` differs in one point: on the CPU it multiplies in bfloat16, which most processors emulate. With
    AVX2, a matrix of 256 x 128 takes 39 ms there, and 2 ms here.

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
        self._adamw = _adamw([{**matrices, "params": outside}, others], lr)
        super().__init__([blocks, *self._adamw.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let AdamW share the state, and the parameter groups after the first."""
        self._adamw.param_groups, self._adamw.state = self.param_groups[1:], self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step_matrices(self.param_groups[0])
        self._adamw.step()
        return loss

    def _step_matrices(self, group: dict[str, Any]) -> None:
        by_shape: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for matrix in group["params"]:
            if matrix.grad is not None:
                by_shape.setdefault(tuple(sorted(matrix.shape)), []).append(matrix)
        for (shorter, longer), matrices in by_shape.items():
            count = max(1, STACKED_NUMBERS // (shorter * longer))
            for first in range(0, len(matrices), count):
                stacked = matrices[first : first + count]
                directions = orthogonal(torch.stack([_as_wide(self._update(matrix)) for matrix in stacked]))
                for matrix, direction in zip(stacked, directions, strict=True):
                    direction = direction if direction.shape == matrix.shape else direction.mT
                    matrix.mul_(1 - group["lr"] * group["weight_decay"])
                    matrix.add_(_local_part(matrix, direction), alpha=-0.2 * longer**0.5 * group["lr"])

    def _update(self, matrix: nn.Parameter) -> Tensor:
        """Update the momentum, and return the matrix to orthogonalize, whole in every process."""
        state = self.state[matrix]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(matrix)
        momentum = state["momentum_buffer"].lerp_(matrix.grad, 1 - self.MOMENTUM)
        update = matrix.grad.lerp(momentum, self.MOMENTUM)
        return update.full_tensor() if hasattr(update, "full_tensor") else update


def orthogonal(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Orthogonalize matrices (B, M, N), M <= N: Newton-Schulz brings all but tiny singular values to about 0.7 to 1.2.

    Each iteration maps a singular value s to 3.4445 s - 4.775 s^3 + 2.0315 s^5. On GPUs, products are in bfloat16.
    """
    x = matrices.to(torch.bfloat16 if matrices.is_cuda else torch.promote_types(matrices.dtype, torch.float32))
    x = x / x.flatten(1).norm(dim=1).clamp(min=1e-7)[:, None, None]  # no singular value above 1
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315), x, beta=3.4445)
    return x.to(matrices.dtype)


def _as_wide(matrix: Tensor) -> Tensor:
    """Return the matrix or its transpose, whichever has no more rows than columns."""
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT


def _local_part(parameter: nn.Parameter, whole: Tensor) -> Tensor:
    """Return this process's part of a tensor that is whole in every process, sharded as the parameter."""
    if not hasattr(parameter, "full_tensor"):
        return whole
    from torch.distributed.tensor import DTensor, Replicate

    mesh = parameter.device_mesh
    placed = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return placed.redistribute(placements=parameter.placements)


def optimizer_threads(model: nn.Module) -> int:
    """Return the number of threads with which an optimizer step is fastest."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"optimizer_threads: `model` must be a module, got {describe(model)}.")
    sizes = [parameter.numel() for parameter in model.parameters()]
    return 1 if sum(sizes) < PARALLEL_PARAMETER * len(sizes) else torch.get_num_threads()


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run torch's operations on `count` threads inside the block."""
    count, before = check_size("threads", "count", count), torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
