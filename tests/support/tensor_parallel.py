"""Comparison of a model whose layers are split over processes with one process."""

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from case import sequence_options
from chunk_parallel import relative_error
from data_parallel import gradients_of
from models import TINY, tiny_model
from torch import Tensor

import megalodon_ops as mo
from megalodon_ops.distributed import make_mesh, parallelize, split
from megalodon_ops.model.model_state import named_tensors


@dataclass(frozen=True)
class Work:
    """A mesh, a batch and the model that reads it."""

    sizes: str = "tensor=2"
    config: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64
    rows: int = 2
    length: int = 21
    lengths: tuple[int, ...] | None = None
    cu_seqlens: tuple[int, ...] | None = None
    past: int = 0
    """number of tokens of each sequence in the initial state"""
    reduction: str = "mean"
    options: dict[str, Any] = field(default_factory=dict)
    """of `parallelize`"""


def compare(work: Work) -> dict[str, float]:
    """The largest error of each result and gradient on this rank, relative to the largest value of one process's."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return _compare(work)


def _compare(work: Work) -> dict[str, float]:
    mesh = make_mesh(work.sizes, device_type="cpu")
    model = parallelize(_model(work), mesh, **work.options)
    shared = [_results(work, _model(work), None) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(shared)  # rank 0's results replace None
    (whole,) = shared
    part = _results(work, model, mesh)
    for name in ("logits", "losses"):
        whole[name] = split(whole[name], mesh, chunk_size=TINY["chunk_size"])
    if "data" in mesh.mesh_dim_names:
        size = work.rows // mesh["data"].size()
        begin = mesh.get_local_rank("data") * size
        rows = slice(begin, begin + size)
        whole = {name: value[rows] if name.startswith("state ") else value for name, value in whole.items()}
    assert whole.keys() == part.keys(), whole.keys() ^ part.keys()
    return {name: relative_error(part[name], value) for name, value in whole.items()}


def _model(work: Work) -> mo.Megalodon:
    return tiny_model(torch.float64, **work.config).to(work.dtype).train()


def _results(work: Work, model: mo.Megalodon, mesh: Any) -> dict[str, Tensor]:
    """Logits, losses, state and gradients; with a mesh, of this rank's part of the batch."""
    gen = torch.Generator().manual_seed(3)
    tokens, targets = torch.randint(TINY["vocab_size"], (2, work.rows, work.length), generator=gen)
    past = torch.randint(TINY["vocab_size"], (work.rows, work.past), generator=gen)
    targets[:, ::5] = -100
    options = sequence_options(cu_seqlens=work.cu_seqlens, lengths=work.lengths)
    if mesh is not None:
        tokens, targets = (split(tensor, mesh, chunk_size=TINY["chunk_size"]) for tensor in (tokens, targets))
        past = split(past, mesh, chunk_size=TINY["chunk_size"])
    state = model(past, return_state=True)[1] if work.past else None  # gradients flow through it
    results = {"logits": model(tokens, state=state, **options).detach()}
    if work.lengths is not None:
        first = 0 if mesh is None else columns_before(work, mesh)
        results["logits"][first + torch.arange(tokens.shape[1]) >= options["lengths"][:, None]] = 0
    loss, after = model.loss(tokens, targets, state=state, return_state=True, reduction=work.reduction, **options)
    losses = model.loss(tokens, targets, state=state, reduction="none", **options)
    results |= {"loss": loss.detach(), "losses": losses.detach()}
    results |= {f"state {name}": tensor.detach() for name, tensor in named_tensors(after).items()}
    loss.backward()
    return results | {f"d {name}": grad.double() for name, grad in gradients_of(model).items()}


def columns_before(work: Work, mesh: Any) -> int:
    """The first column of this rank's piece."""
    return int(split(torch.arange(work.length).expand(work.rows, -1), mesh, chunk_size=TINY["chunk_size"])[0, 0])
