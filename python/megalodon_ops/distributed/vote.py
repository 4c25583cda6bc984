"""What ranks agree on before they exchange anything: where one is at fault, all raise the same error, and none waits."""

from __future__ import annotations

import contextlib
import hashlib
import reprlib
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the name before torch 2.13
_OWN = 2
"""How many integers a rank can tell the others in a vote"""


def agree(
    group: ProcessGroup,
    facts: Mapping[str, Hashable],
    fault: str | None = None,
    *,
    op: str = "Megalodon",
    own: Sequence[int] = (),
    team: int = 0,
    of_team: Mapping[str, Hashable] | None = None,
) -> list[list[int]]:
    """Checks on every rank of a group that all ranks have equal facts and that none has a fault.

    Where all is well, one all-gather of eight integers is all that is exchanged.

    Args:
        group: the ranks that vote. Each of them must call this function, in its turn among the group's collectives.
        facts: names, and values whose `repr` says what they are; numbers, strings and tuples of them.
        fault: what is wrong on this rank, a sentence; None: nothing is.
        op: begins the errors.
        own: up to two integers that may differ.
        team, of_team: facts that must be equal on the ranks of one team alone.

    Returns:
        `own` of every rank, in order.

    Raises:
        ValueError: a rank has a fault, or facts differ; the text is the same on every rank. RuntimeError: a rank has not
        voted before the group's time-out, or has ended.

    Example:
        >>> import torch.distributed as dist
        >>> from megalodon_ops.distributed.vote import agree
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> agree(dist.group.WORLD, {"chunk_size": 2048}, own=[17])
        [[17, 0]]
        >>> dist.destroy_process_group()
    """
    of_team = of_team or {}
    row = [fault is not None, team, *_digest(facts), *_digest(of_team), *own, *[0] * (_OWN - len(own))]
    device = device_of(group)
    mine = torch.tensor(row, dtype=torch.int64, device=device)
    table = mine.new_empty((dist.get_world_size(group), len(row)))
    with clear_errors(op, group):
        all_gather(table.view(-1), mine, group=group)
        votes = table.tolist()
    teams: dict[int, list[int]] = {}
    well = all(
        not vote[0] and vote[2:4] == votes[0][2:4] and vote[4:6] == teams.setdefault(vote[1], vote[4:6])
        for vote in votes
    )
    if not well:
        everyone: list[Any] = [None] * len(votes)
        with clear_errors(op, group):
            dist.all_gather_object(everyone, (fault, dict(facts), team, dict(of_team)), group=group)
        raise ValueError(_verdict(op, everyone, [dist.get_global_rank(group, rank) for rank in range(len(votes))]))
    return [vote[-_OWN:] for vote in votes]


class Members:
    """The ranks of a process group, in a group of their own, which a rank that fails leaves: no other waits for it then.

    Nothing else may keep the group: its connections end, and with them the waiting of the others, when it is freed.
    """

    def __init__(self, like: ProcessGroup, backend: str | None = None) -> None:
        options = getattr(like._get_backend(device_of(like)), "options", None)
        timeout = getattr(options, "_timeout", None)
        ranks = dist.get_process_group_ranks(like)
        self._group = dist.new_group(ranks, timeout=timeout, backend=backend, use_local_synchronization=True)

    @property
    def group(self) -> ProcessGroup:
        if self._group is None:
            raise RuntimeError(
                "Megalodon: all ranks must have come through their last call, but one of this rank's has failed, and the "
                "rank has left the others; start all ranks again."
            )
        return self._group

    def leave(self) -> None:
        """Ends what this rank has to do with the others, if there are any."""
        if self._group is not None and dist.get_world_size(self._group) > 1:
            if "nccl" in dist.get_backend(self._group) and hasattr(self._group, "abort"):  # torch 2.6 has it
                self._group.abort()
            dist.destroy_process_group(self._group)
            self._group = None


def integers(values: Sequence[int]) -> str:
    """A fact of any number of integers, short enough to be shown in an error."""
    text = str(list(values))
    return text if len(text) <= 60 else f"{reprlib.repr(list(values))} (checksum {_digest({'': text})[0] & 0xFFFF:04x})"


def device_of(group: ProcessGroup) -> torch.device:
    """The device of tensors that the group can exchange."""
    if "gloo" in dist.get_backend(group):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


@contextlib.contextmanager
def clear_errors(op: str, group: ProcessGroup) -> Iterator[None]:
    """Turns what torch.distributed raises, where ranks are missing, into a sentence that says so."""
    try:
        yield
    except RuntimeError as error:
        ranks = dist.get_process_group_ranks(group)
        raise RuntimeError(
            f"{op}: all ranks {_listed(ranks)} must take part in this call, but the exchange has failed on rank "
            f"{dist.get_rank()}: a rank has ended, raised an error, does something else, or took longer than the process "
            f"group's time-out; start all ranks again ({str(error).splitlines()[0]})."
        ) from error


def _digest(facts: Mapping[str, Hashable]) -> tuple[int, int]:
    digest = hashlib.blake2b(repr(sorted(facts.items())).encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little", signed=True), int.from_bytes(digest[8:], "little", signed=True)


def _verdict(op: str, everyone: list[tuple], ranks: list[int]) -> str:
    """What is wrong, in words that are the same on every rank."""
    faults = {rank: vote[0] for rank, vote in zip(ranks, everyone) if vote[0] is not None}
    if faults:
        first = next(iter(faults))
        alike = [rank for rank, fault in faults.items() if fault == faults[first]]
        if len(alike) == len(ranks):
            return faults[first]
        return f"on {_named(alike)} of {len(ranks)}: {faults[first]}"
    groups = [("the ranks", ranks, [vote[1] for vote in everyone])]
    for team in dict.fromkeys(vote[2] for vote in everyone):
        members = [i for i, vote in enumerate(everyone) if vote[2] == team]
        named = "the ranks of a chunk group"
        groups.append((named, [ranks[i] for i in members], [everyone[i][3] for i in members]))
    for whose, members, facts in groups:
        for name in dict.fromkeys(name for own in facts for name in own):
            values = [own.get(name, "nothing") for own in facts]
            if len(set(map(repr, values))) > 1:
                return f"{op}: `{name}` must be equal on {whose} {_listed(members)}, got {_held(members, values)}."
    return f"{op}: the ranks {_listed(ranks)} must make the same calls, got different ones."


def _held(ranks: list[int], values: list[Hashable]) -> str:
    """Which rank has which value, the values that few have first."""
    texts = [reprlib.repr(value) if not isinstance(value, str) else value for value in values]
    holders = [
        (text, [rank for rank, t in zip(ranks, texts) if t == text])
        for text, _ in reversed(Counter(texts).most_common())
    ]
    return " and ".join(f"{text} on {_named(few)}" for text, few in holders)


def _named(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {_listed(ranks)}"


def _listed(ranks: Sequence[int]) -> str:
    ranks = list(ranks)
    if len(ranks) > 2 and ranks == list(range(ranks[0], ranks[-1] + 1)):
        return f"{ranks[0]} to {ranks[-1]}"
    return ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
