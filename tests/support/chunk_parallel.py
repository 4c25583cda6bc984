"""Runs a model on pieces of a sequence, each in a process of its own, and compares it with one process; for tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from models import TINY, tiny_model
from torch import Tensor

import megalodon_ops as mo
from megalodon_ops.distributed.parallel_model import ParallelMegalodon, Ranks
from megalodon_ops.model.model_state import named_tensors


@dataclass(frozen=True)
class Work:
    """A batch, how ranks share its columns, and the model that reads it."""

    pieces: tuple[int, ...]
    rows: int = 1
    cu_seqlens: tuple[int, ...] | None = None
    lengths: tuple[int, ...] | None = None
    past: tuple[int, ...] | None = None
    """how many tokens each sequence has read before, into the state that is given"""
    dtype: torch.dtype = torch.float64
    config: dict[str, Any] = field(default_factory=dict)
    reduction: str = "mean"
    grad: bool = True
    state_counts: bool = True
    """whether the returned state is in what is differentiated"""

    @property
    def sequences(self) -> int:
        return self.rows if self.cu_seqlens is None else len(self.cu_seqlens) - 1


def compare(work: Work) -> dict[str, float]:
    """The largest error of each result and gradient on this rank, relative to the largest value of one process's."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model, alone = cut_over_all_ranks(_model(work)), _model(work)
    end = list(accumulate(work.pieces))[rank]
    mine = slice(end - work.pieces[rank], end)
    shared = [_results(work, alone, slice(None)) if rank == 0 else None]
    dist.broadcast_object_list(shared)
    (whole,) = shared
    piece = _results(work, model, mine)
    for name in ("logits", "losses"):
        whole[name] = whole[name][:, mine]
    for name, value in piece.items():
        if name.startswith("d ") and not name.startswith("d state"):
            dist.all_reduce(value)
            value /= ranks
    assert whole.keys() == piece.keys(), whole.keys() ^ piece.keys()
    return {name: _error(piece[name], value) for name, value in whole.items()}


def cut_over_all_ranks(model: mo.Megalodon) -> ParallelMegalodon:
    """A model of the same modules, called on a piece of the sequence by each rank, with all of its parameters as they are."""
    return ParallelMegalodon(model, Ranks(batch=dist.group.WORLD, chunk=dist.group.WORLD))


def worst(results: Sequence[dict[str, float]]) -> tuple[float, str]:
    return max(
        (error, f"{name} on rank {rank}") for rank, errors in enumerate(results) for name, error in errors.items()
    )


def _model(work: Work) -> mo.Megalodon:
    return tiny_model(torch.float64, **work.config).to(work.dtype).train(work.grad)


def _results(work: Work, model: mo.Megalodon, columns: slice) -> dict[str, Tensor]:
    """Logits, losses, state and gradients of a model that gets these columns of the batch."""
    gen = torch.Generator().manual_seed(3)
    length = sum(work.pieces)
    tokens, targets = torch.randint(TINY["vocab_size"], (2, work.rows, length), generator=gen)
    targets[:, ::5] = -100
    options = {
        name: torch.tensor(getattr(work, name))
        for name in ("cu_seqlens", "lengths") if getattr(work, name) is not None
    }  # fmt: skip
    state = None if work.past is None else _past(work, model.alone())
    tokens, targets = tokens[:, columns], targets[:, columns]
    results: dict[str, Tensor] = {}
    with torch.set_grad_enabled(work.grad):
        results["logits"] = model(tokens, state=state, **options).detach().where(_inside(work, columns), 0)
        loss, after = model.loss(tokens, targets, state=state, return_state=True, reduction=work.reduction, **options)
        losses = model.loss(tokens, targets, state=state, reduction="none", **options)
    results |= {"loss": loss.detach(), "losses": losses.detach()}
    results |= {f"state {name}": tensor.detach().clone() for name, tensor in named_tensors(after).items()}
    position = after.layers[0].attention.position
    for name in results:
        if name.endswith((".k", ".v", "_k")):  # rows from the position on hold nothing
            empty = torch.arange(results[name].shape[1]) >= position[:, None]
            results[name][empty] = 0
        if name.endswith(".residual"):  # counts with the values that it belongs to
            norm = name.removesuffix(".residual")
            for field, residual in zip(("mean", "var"), results[name].unbind(1)):
                results[f"{norm}.{field}"] = results[f"{norm}.{field}"].double() + residual.double()
            results[name] = torch.zeros(())
    if not work.grad:
        return results
    total = loss
    if work.state_counts:
        weights = torch.Generator().manual_seed(4)
        recurrent = {name: t for name, t in named_tensors(after).items() if t.requires_grad}
        for tensor in recurrent.values():
            real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
            total = total + (real * torch.randn(real.shape, generator=weights, dtype=torch.float64)).sum()
    model.zero_grad()
    total.backward()
    results |= {f"d {name}": parameter.grad.double() for name, parameter in model.named_parameters()}
    if state is not None:
        leaves = {name: t for name, t in named_tensors(state).items() if t.requires_grad}
        results |= {f"d state {name}": t.grad for name, t in leaves.items()}
    return results


def _past(work: Work, model: mo.Megalodon) -> mo.MegalodonState:
    """A state of sequences that have read some tokens; all that recurs in it takes gradients."""
    gen = torch.Generator().manual_seed(5)
    tokens = torch.randint(TINY["vocab_size"], (work.sequences, max(work.past)), generator=gen)
    with torch.no_grad():
        _, state = model(tokens, lengths=torch.tensor(work.past), return_state=True)
    if not work.grad:
        return state

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.clone().requires_grad_() if tensor.is_floating_point() or tensor.is_complex() else tensor

    layers = []
    for layer in state.layers:
        recurrent = {
            name: leaf(getattr(layer, name)) for name in ("cema", "memory", "memory_mass") if hasattr(layer, name)
        }
        layers.append(layer._replace(norm=_leaves(layer.norm, leaf), **recurrent))
    return mo.MegalodonState(tuple(layers), _leaves(state.norm, leaf))


def _leaves(norm, leaf):
    return norm._replace(mean=leaf(norm.mean), var=leaf(norm.var))


def _inside(work: Work, columns: slice) -> Tensor:
    """Which of the columns hold tokens of a sequence (B, L, 1)."""
    position = torch.arange(sum(work.pieces))
    inside = torch.ones(work.rows, len(position), dtype=torch.bool)
    if work.lengths is not None:
        inside = position < torch.tensor(work.lengths)[:, None]
    if work.cu_seqlens is not None:
        inside = ((position >= work.cu_seqlens[0]) & (position < work.cu_seqlens[-1]))[None]
    return inside[:, columns, None]


def _error(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape and got.dtype == expected.dtype, (got.shape, expected.shape, got.dtype)
    if not got.numel():
        return 0.0
    wide = torch.complex128 if expected.is_complex() else torch.float64
    got, expected = got.to(wide), expected.to(wide)
    alike = got.isnan() & expected.isnan()  # the mean of no loss
    got, expected = got.masked_fill(alike, 0), expected.masked_fill(alike, 0)
    difference = (got - expected).abs().max().item()
    scale = max(expected.abs().max().item(), 1e-3)
    return difference / scale if difference == difference else float("inf")
