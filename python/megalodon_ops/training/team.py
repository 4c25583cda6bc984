"""The processes of a run: what they tell each other, so that all go on together or end together.

All processes call a method of :class:`Team` that exchanges something, in one order. A fault of one process, such as a file
that is missing there, is then raised in all as a :class:`megalodon_ops.errors.TeamError`; a process that has ended, or does
not answer in time, is a :class:`megalodon_ops.errors.TeamLost` in those that wait for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import FileError, TeamError, TeamLost, UserFault
from ..ops.values import shown

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

Value = TypeVar("Value")

_FAULTS = (UserFault, FileError, FloatingPointError, OSError)
"""What a person can put right; of anything else the process that raises it shows the traceback"""
_WORDS_OF_TRANSPORT = ("gloo", "NCCL", "Connection", "connection", "imed out", "ime-out", "timeout", "Broken pipe")


class Team:
    """One process alone or, in a process group, this process and the others."""

    def __init__(self, mesh: DeviceMesh | None = None, *, several: bool = False, timeout: timedelta | None = None):
        """
        Args:
            mesh: of all processes of the default process group; it may be given later, as the attribute `mesh`.
            several: whether there is such a group, where there is no mesh yet.
            timeout: how long processes wait for each other; None: as long as torch does.
        """
        self.mesh, self._timeout = mesh, timeout
        self.rank, self.size = 0, 1
        self._noted: Exception | None = None
        if mesh is not None or several:
            import torch.distributed as dist

            self._dist = dist
            self._group = self.new_group()  # of gloo: what is told lies on the CPU
            self.rank, self.size = dist.get_rank(), dist.get_world_size()

    @property
    def first(self) -> bool:
        """Whether this process prints, and writes what one process writes."""
        return self.rank == 0

    def extent(self, dimension: str) -> int:
        """How many parts a dimension of the mesh has."""
        return self.mesh[dimension].size() if self._has(dimension) else 1

    def place(self, dimension: str) -> int:
        """Which part of a dimension of the mesh this process has."""
        return self.mesh.get_local_rank(dimension) if self._has(dimension) else 0

    def _has(self, dimension: str) -> bool:
        return self.mesh is not None and dimension in (self.mesh.mesh_dim_names or ())

    @property
    def readers(self) -> int:
        """How many parts the tokens of a batch have."""
        return self.extent("data") * self.extent("chunk")

    @property
    def reader(self) -> int:
        """Which part of a batch's tokens this process reads."""
        return self.place("data") * self.extent("chunk") + self.place("chunk")

    @property
    def timeout(self) -> float | None:
        """Seconds that processes wait for each other."""
        return None if self._timeout is None else self._timeout.total_seconds()

    def sizes(self) -> dict[str, int]:
        """The sizes of the mesh by dimension."""
        return {} if self.mesh is None else {name: self.extent(name) for name in self.mesh.mesh_dim_names or ()}

    def new_group(self) -> ProcessGroup:
        """A group of gloo of all processes, for what must not come between the exchanges of the other groups."""
        return self._dist.new_group(backend="gloo", timeout=self._timeout)

    def gather(self, value: Value, fault: Exception | None = None) -> list[Value]:
        """The values of all processes, in order of their ranks; where one has a fault, all raise that of the lowest rank."""
        if self.size == 1:
            if fault is not None:
                raise fault
            return [value]
        told: list[Any] = [None] * self.size
        with telling():
            self._dist.all_gather_object(told, (None if fault is None else _text(fault), value), group=self._group)
        faults = {rank: text for rank, (text, _) in enumerate(told) if text is not None}
        if not faults:
            return [of_rank for _, of_rank in told]
        if fault is not None and not isinstance(fault, _FAULTS):
            raise fault
        rank, text = next(iter(faults.items()))
        alike = len(faults) == self.size and len(set(faults.values())) == 1
        raise TeamError(text if alike else f"rank {rank}: {text}") from fault

    def tell(self, value: Value) -> Value:
        """The value of the first process."""
        return self.gather(value if self.first else None)[0]  # type: ignore[return-value]

    def together(self, function: Callable[..., Value], *arguments: Any) -> Value:
        """`function(*arguments)` in every process, of which none goes on if one has failed."""
        if self.size == 1:
            return function(*arguments)
        result, fault = None, None
        try:
            result = function(*arguments)
        except (TeamError, TeamLost):  # known to all
            raise
        except Exception as error:
            fault = error
        self.gather(None, fault)
        return result  # type: ignore[return-value]

    def in_first(self, function: Callable[..., Value], *arguments: Any) -> Value | None:
        """`function(*arguments)` in the first process, whose fault ends all; None in the others."""
        return self.together(lambda: function(*arguments) if self.first else None)

    def alike(self, facts: Mapping[str, Any]) -> None:
        """Raises in every process where a fact is not the same in all."""
        for rank, others in enumerate(self.gather(dict(facts))):
            for name, value in facts.items():
                if others[name] != value:
                    mine, theirs = sorted([(self.rank, value), (rank, others[name])], key=lambda pair: pair[0])
                    raise TeamError(
                        f"{name} must be the same in all processes, got {shown(mine[1])} in rank {mine[0]} and "
                        f"{shown(theirs[1])} in rank {theirs[0]}"
                    )

    @contextmanager
    def mine(self) -> Iterator[None]:
        """Notes a fault of what this process does alone, for the next call of :meth:`most` to raise everywhere."""
        try:
            yield
        except Exception as error:
            if self.size == 1:
                raise
            self._noted = self._noted or error

    def most(self, number: int) -> int:
        """The largest number of all processes; raises in every process where any has noted a fault."""
        if self.size == 1:
            return number
        import torch

        told = torch.tensor([number, self._noted is not None])
        with telling():
            self._dist.all_reduce(told, self._dist.ReduceOp.MAX, group=self._group)
        largest, faulty = told.tolist()
        if faulty:
            self.gather(None, self._noted)
        return largest


def _text(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


@contextmanager
def telling() -> Iterator[None]:
    """Inside the block, what torch raises where another process is gone, or late, is a TeamLost."""
    try:
        yield
    except RuntimeError as error:
        if not is_of_transport(error):
            raise
        raise TeamLost(
            "another process of the run has ended, or has not answered within --timeout: "
            f"{str(error).strip().splitlines()[0][:300]}"
        ) from error


def is_of_transport(error: RuntimeError) -> bool:
    """Whether an error says that another process has ended or does not answer."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or any(word in str(error) for word in _WORDS_OF_TRANSPORT)
