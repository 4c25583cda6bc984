"""What each process of a training run takes: of the batch, of the parameters, of the text to evaluate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megalodon_ops import Megalodon, MegalodonConfig
from megalodon_ops.cli.errors import CommandError
from megalodon_ops.errors import TeamError

if TYPE_CHECKING:
    from megalodon_ops.cli.settings import Settings
    from megalodon_ops.training.team import Team


def check_shares(settings: Settings, sizes: dict[str, int]) -> None:
    """Raises where the mesh cannot share a batch."""
    data, chunk = sizes.get("data", 1), sizes.get("chunk", 1)
    if settings.batch % data:
        raise CommandError(f"--batch {settings.batch}: must be a multiple of the mesh's data={data}")
    rows, chunk_size = settings.batch // data, settings.config.chunk_size
    if rows % chunk and rows * settings.length < chunk * chunk_size:
        held = f"{rows} row{'s' * (rows > 1)} of {settings.length} tokens"
        raise CommandError(
            f"--length {settings.length}: the mesh's chunk={chunk} shares {held}, which must be at least {chunk} chunks of "
            f"{chunk_size}, or a multiple of {chunk} rows"
        )
    if ":" in settings.device:
        raise CommandError(f"--device {settings.device}: each of several processes takes a GPU of its own; say cuda")


def new_model(config: MegalodonConfig, device: torch.device, team: Team) -> Megalodon:
    """A new model, the same whether one process has it or several share it."""
    if team.size == 1:
        return Megalodon(config).to(device).train()
    from megalodon_ops.distributed import parallelize

    with torch.device("meta"):
        model = Megalodon(config)
    try:
        return parallelize(model, team.mesh).train()
    except (ValueError, ImportError) as error:  # the same in all processes
        raise TeamError(str(error)) from error


def gathered(model: Megalodon) -> Megalodon:
    """The model as a process alone has it, for what each does by itself; of several processes, all call this function."""
    if type(model) is Megalodon:
        return model
    from megalodon_ops.distributed.fsdp import gathered as of_shards

    return of_shards(model, None)


def whole_norm(norm: Tensor) -> Tensor:
    """The norm of all gradients, of what `clip_grad_norm_` returns in each process."""
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def shared_out(documents: Sequence[bytes], team: Team) -> list[bytes]:
    """The documents that this process evaluates: the longest go round first, each to the process with the least so far."""
    loads, own = [0] * team.size, []
    for document in sorted(documents, key=len, reverse=True):
        rank = loads.index(min(loads))
        loads[rank] += len(document)
        if rank == team.rank:
            own.append(document)
    return own
