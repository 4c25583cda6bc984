"""`Parallel`: the ranks that a model is split over, what they agree on, and how a rank leaves them."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from ..model.model import Megalodon
from .chunk import Hooks
from .pieces import Pieces
from .vote import Members, agree


class Parallel:
    """The ranks that a model is split over, and the hooks that carry states between them."""

    def __init__(
        self,
        model: Megalodon,
        chunk_group: ProcessGroup | None,
        loss_group: ProcessGroup | None,
        tensor_mesh: DeviceMesh | None,
        everyone: ProcessGroup | None,
    ) -> None:
        self.chunk_group, self.loss_group = chunk_group, loss_group
        self.ranks = 1 if chunk_group is None else dist.get_world_size(chunk_group)
        self.rank = 0 if chunk_group is None else dist.get_rank(chunk_group)
        self.team = 0 if chunk_group is None else dist.get_global_rank(chunk_group, 0)
        self.pieces: Pieces | None = None
        """those of the call that runs now"""
        self.members = None if self.ranks == 1 else Members(chunk_group)
        """of the chunk group"""
        voters = loss_group if tensor_mesh is None else everyone
        self.voters = None if voters is None else Members(voters, "gloo")
        """all ranks, on the CPU: a vote need not wait for a GPU"""
        self.tensor_groups = [] if tensor_mesh is None else _groups_of(tensor_mesh, self.voters.group)
        """ranks of those that vote, by group of ranks that share layers"""
        parameter = next(model.parameters())
        facts = {f"config.{name}": value for name, value in model.config.to_dict().items()}
        facts |= {"dtype": str(parameter.dtype), "device": parameter.device.type, "ranks of a chunk group": self.ranks}
        self.agree(facts)
        self._hook(model)

    def _hook(self, model: Megalodon) -> None:
        self.of_class = type(model)
        self.hooks = None if self.members is None else Hooks(model, self.members)

    def of(self, model: Megalodon) -> Parallel:
        """The same ranks for another model of this configuration."""
        made = copy.copy(self)
        made._hook(model)
        return made

    def agree(
        self,
        facts: dict[str, Any],
        fault: str | None = None,
        length: int = 0,
        of_team: dict[str, Any] | None = None,
        content: Sequence[Tensor | None] = (),
    ) -> list[int]:
        """A vote of all ranks; returns the lengths of those of the chunk group, in order.

        Ranks that share layers must have equal `content`.
        """
        if self.voters is None:
            if fault is not None:
                raise ValueError(fault)
            return [length]
        checksum = _checksum(content) if self.tensor_groups and fault is None else 0
        votes = agree(self.voters.group, facts, fault, own=(length, checksum), team=self.team, of_team=of_team)
        for members in self.tensor_groups:
            if len({votes[member][1] for member in members}) > 1:
                ranks = [dist.get_global_rank(self.voters.group, member) for member in members]
                raise ValueError(
                    f"Megalodon: `tokens`, `targets` and sequences must be equal on the ranks of a tensor group, got "
                    f"different ones on ranks {', '.join(map(str, ranks))}."
                )
        if self.members is None:
            return [length]
        members = dist.get_process_group_ranks(self.members.group)
        return [votes[dist.get_group_rank(self.voters.group, member)][0] for member in members]

    @property
    def has_teams(self) -> bool:
        """Whether there are ranks that have no piece of this rank's sequences."""
        return self.voters is not None and dist.get_world_size(self.voters.group) > self.ranks

    def group_for(self, loss: Tensor) -> ProcessGroup | None:
        """The group of all ranks that exchanges a loss."""
        are_voters = self.voters is not None and not self.tensor_groups
        return self.voters.group if are_voters and loss.is_cpu else self.loss_group

    def leave(self) -> None:
        """Ends what this rank has to do with the others, after a fault amid a call: none waits for it then."""
        for members in (self.members, self.voters):
            if members is not None:
                members.leave()
        if self.hooks is not None:
            self.hooks.forget()


def _groups_of(tensor_mesh: DeviceMesh, votes: ProcessGroup) -> list[tuple[int, ...]]:
    """Every group of ranks that share layers, as ranks of the group that votes."""
    own = tuple(dist.get_group_rank(votes, rank) for rank in dist.get_process_group_ranks(tensor_mesh.get_group()))
    everyone: list[Any] = [None] * dist.get_world_size(votes)
    dist.all_gather_object(everyone, own, group=votes)
    return sorted({*everyone})


def _checksum(tensors: Sequence[Tensor | None]) -> int:
    """A number that depends on every value of some integers, and on shapes."""
    digest = hashlib.blake2b(digest_size=7)
    for tensor in tensors:
        digest.update(b"None" if tensor is None else repr(tuple(tensor.shape)).encode())
        if tensor is not None:
            digest.update(tensor.detach().long().cpu().contiguous().numpy().tobytes())
    return int.from_bytes(digest.digest(), "little")
