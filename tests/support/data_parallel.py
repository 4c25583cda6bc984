"""A small training for tests of data parallel, on several ranks or in one process."""

import warnings

import torch
import torch.distributed as dist
from models import TINY, tiny_model

import megalodon_ops as mo
from megalodon_ops.distributed import make_mesh, parallelize

ROWS, LENGTH = 4, 21
WITH_ALL = dict(share_emb=True, swiglu=True, rescale_nffn=True, scale_emb=True, layerwise_ckpt=True)


def batch_of(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A global batch; each row has fewer targets that count than the one before, the last none in every 4th step."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(TINY["vocab_size"], (ROWS, LENGTH + 1), generator=generator)
    targets = tokens[:, 1:].clone()
    targets[torch.rand(ROWS, LENGTH, generator=generator) < torch.arange(ROWS)[:, None] / ROWS] = -100
    if step % 4 == 0:
        targets[-1] = -100
    return tokens[:, :-1], targets


def own_rows() -> slice:
    """This rank's rows of the global batch; all of them in one process."""
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    return slice(ROWS // ranks * rank, ROWS // ranks * (rank + 1))


def gather(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()


def parameters_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: gather(parameter) for name, parameter in model.named_parameters()}


def gradients_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: gather(parameter.grad) for name, parameter in model.named_parameters()}


def train(
    model: mo.Megalodon, steps: int, accumulate: int = 1, *, rows: slice | None = None, lr: float = 1e-3
) -> tuple[list[float], list[float], dict]:
    """Losses, norms of gradients and parameters of a short training by the paper's optimizer."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
    losses, norms = [], []
    rows = rows or own_rows()
    for step in range(steps):
        total = 0.0
        for part in range(accumulate):
            tokens, targets = batch_of(step * accumulate + part)
            last = part == accumulate - 1
            if hasattr(model, "set_requires_gradient_sync"):
                model.set_requires_gradient_sync(last)
            loss = model.loss(tokens[rows], targets[rows]) / accumulate
            loss.backward()
            if not last:
                assert not dist.is_initialized() or all(p.grad is None for p in model.parameters())
            total += loss.item()
        norms.append(gather(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, norms, parameters_of(model)


def mesh_of_all() -> torch.distributed.device_mesh.DeviceMesh:
    return make_mesh(f"data={dist.get_world_size()}", device_type="cpu")


def train_parallel(data: str, steps: int, accumulate: int, overrides: dict, options: dict):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # FSDP2 warns of single linear layers that are sharded
        model = parallelize(tiny_model(torch.float32, **overrides), mesh_of_all(), data=data, **options)
        return train(model, steps, accumulate)
