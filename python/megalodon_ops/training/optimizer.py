"""The paper's optimizer: which parameters decay, and how many threads a step takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..ops.values import check_number, described

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
        raise TypeError(f"parameter_groups: `model` must be a module, got {described(model)}.")
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
    lr = check_number("adamw", "lr", lr, "a number of at least 0", 0.0)
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8, fused=True)


def optimizer_threads(model: nn.Module) -> int:
    """How many threads a step of the optimizer takes the least time with."""
    sizes = [parameter.numel() for parameter in model.parameters()]
    return 1 if sum(sizes) < PARALLEL_PARAMETER * len(sizes) else torch.get_num_threads()


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Inside the block, torch's operations take `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
