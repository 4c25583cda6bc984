"""Comparison of a model on pieces of a sequence, each in a process of its own, with one process."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from case import sequence_options
from models import TINY, tiny_model
from torch import Tensor

import megalodon_ops as mo
from megalodon_ops.distributed.parallel_model import ParallelMegalodon, Ranks
from megalodon_ops.model.model_state import named_tensors


@dataclass(frozen=True)
class Work:
    """A batch, its split over ranks, and the model that reads it."""

    pieces: tuple[int, ...]
    """columns of each rank"""
    rows: int = 1
    cu_seqlens: tuple[int, ...] | None = None
    lengths: tuple[int, ...] | None = None
    past: tuple[int, ...] | None = None
    """number of tokens of each sequence in the initial state"""
    dtype: torch.dtype = torch.float64
    config: dict[str, Any] = field(default_factory=dict)
    """with `num_features`, the loss is the sum of squared outputs"""
    reduction: str = "mean"
    grad: bool = True

    @property
    def sequences(self) -> int:
        return self.rows if self.cu_seqlens is None else len(self.cu_seqlens) - 1


def compare(work: Work) -> dict[str, float]:
    """The largest error of each result and gradient on this rank, relative to the largest value of one process's."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model, unsharded = cut_over_all_ranks(_model(work)), _model(work)
    begin = sum(work.pieces[:rank])
    columns = slice(begin, begin + work.pieces[rank])
    shared = [_results(work, unsharded, slice(None)) if rank == 0 else None]
    dist.broadcast_object_list(shared)  # rank 0's results replace None
    (whole,) = shared
    piece = _results(work, model, columns)
    for name in whole.keys() & {"logits", "losses"}:
        whole[name] = whole[name][:, columns]
    for name, value in piece.items():
        if name.startswith("d ") and not name.startswith("d state"):
            dist.all_reduce(value)
            value /= ranks
    assert whole.keys() == piece.keys(), whole.keys() ^ piece.keys()
    return {name: relative_error(piece[name], value) for name, value in whole.items()}


def cut_over_all_ranks(model: mo.Megalodon) -> ParallelMegalodon:
    """A parallel model with the modules of `model`, unsharded; each rank calls it on its piece of the sequence."""
    return ParallelMegalodon(model, Ranks(batch=dist.group.WORLD, chunk=dist.group.WORLD))


def worst_error(results: Sequence[dict[str, float]]) -> tuple[float, str]:
    return max(
        (error, f"{name} on rank {rank}") for rank, errors in enumerate(results) for name, error in errors.items()
    )


def _model(work: Work) -> mo.Megalodon:
    return tiny_model(torch.float64, **work.config).to(work.dtype).train(work.grad)


def _sequence_arguments(work: Work) -> dict[str, Tensor]:
    """Arguments of a call: offsets, or spans where the documents end before the row, or lengths."""
    offsets = work.cu_seqlens
    if offsets is None or offsets[-1] == sum(work.pieces):
        return sequence_options(cu_seqlens=offsets, lengths=work.lengths)
    return sequence_options(spans=list(zip(offsets[:-1], offsets[1:], strict=True)))


def _results(work: Work, model: mo.Megalodon, columns: slice) -> dict[str, Tensor]:
    """Logits, losses, state and gradients of a model on these columns of the batch."""
    gen = torch.Generator().manual_seed(3)
    options = _sequence_arguments(work)
    state = None if work.past is None else _past(work, model.alone())
    inputs = _inputs(work, work.rows, sum(work.pieces), gen)[:, columns]
    results: dict[str, Tensor] = {}
    with torch.set_grad_enabled(work.grad):
        if model.config.num_features:
            logits, after = model(inputs, state=state, return_state=True, **options)
            logits = logits.where(_inside(work, columns), 0)
            results["logits"] = logits
            ranks = dist.get_world_size() if isinstance(model, ParallelMegalodon) else 1
            loss = ranks * logits.square().sum()  # the mean over ranks is the sum over all columns
        else:
            targets = torch.randint(TINY["vocab_size"], (work.rows, sum(work.pieces)), generator=gen)
            targets[:, ::5] = -100
            targets = targets[:, columns]
            results["logits"] = model(inputs, state=state, **options).where(_inside(work, columns), 0)
            loss, after = model.loss(
                inputs, targets, state=state, return_state=True, reduction=work.reduction, **options
            )
            results |= {"loss": loss, "losses": model.loss(inputs, targets, state=state, reduction="none", **options)}
    results = {name: value.detach() for name, value in results.items()}
    results |= {f"state {name}": tensor.detach().clone() for name, tensor in named_tensors(after).items()}
    position = after.layers[0].attention.position
    for name in results:
        if name.endswith((".k", ".v", "_k")):  # rows from the position on are arbitrary
            empty = torch.arange(results[name].shape[1]) >= position[:, None]
            results[name][empty] = 0
        if name.endswith(".residual"):  # compared as a part of its mean or variance
            norm = name.removesuffix(".residual")
            for field, residual in zip(("mean", "var"), results[name].unbind(1)):
                results[f"{norm}.{field}"] = results[f"{norm}.{field}"].double() + residual.double()
            results[name] = torch.zeros(())
    if not work.grad:
        return results
    total = loss  # plus a random combination of the end state's numbers, so that they have gradients, too
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
    """A state of sequences after `work.past` tokens; its recurrent tensors require gradients."""
    inputs = _inputs(work, work.sequences, max(work.past), torch.Generator().manual_seed(5))
    with torch.no_grad():
        _, state = model(inputs, lengths=torch.tensor(work.past), return_state=True)
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
    return replace(state, layers=tuple(layers), norm=_leaves(state.norm, leaf))


def _inputs(work: Work, rows: int, length: int, gen: torch.Generator) -> Tensor:
    """Tokens (B, L) or, with `num_features`, numbers (B, L, F)."""
    if features := work.config.get("num_features"):
        return 5 + torch.randn(rows, length, features, generator=gen)
    return torch.randint(TINY["vocab_size"], (rows, length), generator=gen)


def _leaves(norm: mo.TimestepNormState, leaf: Callable[[Tensor], Tensor]) -> mo.TimestepNormState:
    return norm._replace(mean=leaf(norm.mean), var=leaf(norm.var))


def _inside(work: Work, columns: slice) -> Tensor:
    """Mask of the columns with tokens of a sequence (B, L, 1)."""
    position = torch.arange(sum(work.pieces))
    inside = torch.ones(work.rows, len(position), dtype=torch.bool)
    if work.lengths is not None:
        inside = position < torch.tensor(work.lengths)[:, None]
    if work.cu_seqlens is not None:
        inside = ((position >= work.cu_seqlens[0]) & (position < work.cu_seqlens[-1]))[None]
    return inside[:, columns, None]


def relative_error(got: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest expected value; infinity for NaN."""
    assert got.shape == expected.shape, (got.shape, expected.shape)
    assert got.dtype in (expected.dtype, torch.bfloat16), (got.dtype, expected.dtype)  # bfloat16: by `param_dtype`
    if not got.numel():
        return 0.0
    wide = torch.complex128 if expected.is_complex() else torch.float64
    got, expected = got.to(wide), expected.to(wide)
    both_nan = got.isnan() & expected.isnan()  # the mean of no loss
    got, expected = got.masked_fill(both_nan, 0), expected.masked_fill(both_nan, 0)
    difference = (got - expected).abs().max().item()
    scale = max(expected.abs().max().item(), 1e-3)
    return difference / scale if difference == difference else float("inf")
