"""The processes of a run: what they tell each other, so that all go on together or end together.

Every method of a :class:`Team` but `mine` is called by all of them, in one order. A fault of one process, such as a file
that is missing there, is raised in all as a :class:`megalodon_ops.errors.TeamError`; a process that ends, or does not
answer in time, is a :class:`megalodon_ops.errors.TeamLost` in those that wait for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import FileError, TeamError, TeamLost

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

Value = TypeVar("Value")

_TRANSPORT = ("gloo", "Gloo", "NCCL", "Connection", "connection", "timed out", "Timed out", "Broken pipe")
"""Words of which one is in whatever torch raises where another process does not answer"""


class Team:
    """One process alone, or this process and the others of a mesh."""

    def __init__(self, mesh: DeviceMesh | None = None, *, timeout: timedelta | None = None):
        """mesh: of all processes. timeout: how long they wait for each other; None: as torch has it."""
        self.mesh, self._timeout = mesh, timeout
        self.rank, self.size = 0, 1
        if mesh is not None:
            import torch.distributed as dist

            self._dist = dist
            self._group = dist.new_group(backend="gloo", timeout=timeout)  # what is told lies on the CPU
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._noted: BaseException | None = None

    @property
    def first(self) -> bool:
        """Whether this process prints, and writes what one process writes."""
        return self.rank == 0

    def extent(self, dimension: str) -> int:
        """How many parts a dimension of the mesh has."""
        names = () if self.mesh is None else self.mesh.mesh_dim_names or ()
        return self.mesh.size(names.index(dimension)) if dimension in names else 1

    def place(self, dimension: str) -> int:
        """Which part of a dimension of the mesh this process has."""
        names = () if self.mesh is None else self.mesh.mesh_dim_names or ()
        return self.mesh.get_local_rank(dimension) if dimension in names else 0

    @property
    def readers(self) -> int:
        """How many parts the tokens of a batch have."""
        return self.extent("data") * self.extent("chunk")

    @property
    def reader(self) -> int:
        """Which part of a batch's tokens this process reads."""
        return self.place("data") * self.extent("chunk") + self.place("chunk")

    def new_group(self) -> ProcessGroup:
        """Another group of gloo, for what goes on beside, in a thread."""
        return self._dist.new_group(backend="gloo", timeout=self._timeout)

    def close(self) -> None:
        """Leaves the process group."""
        if self.size > 1:
            self._dist.destroy_process_group()

    def gather(self, value: Value) -> list[Value]:
        """The values of all processes, in order of their ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with telling():
            self._dist.all_gather_object(values, value, group=self._group)
        return values

    def tell(self, value: Value) -> Value:
        """The value of the first process."""
        if self.size == 1:
            return value
        box = [value]
        with telling():
            self._dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def together(self, function: Callable[..., Value], *arguments: Any) -> Value:
        """`function(*arguments)` in every process, of which none goes on if one has failed."""
        if self.size == 1:
            return function(*arguments)
        result, fault = None, None
        try:
            result = function(*arguments)
        except TeamError:  # known to all
            raise
        except Exception as error:
            fault = error
        self.agree(fault)
        return result  # type: ignore[return-value]

    def in_first(self, function: Callable[..., Value], *arguments: Any) -> Value | None:
        """`function(*arguments)` in the first process, whose fault ends all; None in the others."""
        return self.together(lambda: function(*arguments) if self.first else None)

    def agree(self, fault: Exception | None) -> None:
        """Raises in every process where any has a fault: of several faults, that of the lowest rank."""
        texts = self.gather(None if fault is None else _text(fault))
        self._raise(texts, fault)

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

        tensor = torch.tensor([number, self._noted is not None])
        with telling():
            self._dist.all_reduce(tensor, self._dist.ReduceOp.MAX, group=self._group)
        largest, faulty = tensor.tolist()
        if faulty:
            self.agree(self._noted)
        return largest

    def _raise(self, texts: list[str | None], fault: Exception | None) -> None:
        faulty = [rank for rank, text in enumerate(texts) if text is not None]
        if not faulty:
            return
        if fault is not None and self.size == 1:
            raise fault
        lowest = faulty[0]
        alike = len(faulty) == self.size and len(set(texts)) == 1
        error = TeamError(texts[lowest] if alike else f"rank {lowest}: {texts[lowest]}")
        if fault is not None and not isinstance(fault, (FileError, OSError, FloatingPointError, *_user_faults())):
            raise fault  # a fault of the program, with its traceback
        raise error from fault


def _user_faults() -> tuple[type, ...]:
    from ..errors import UserFault

    return (UserFault,)


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
        raise TeamLost(str(error).splitlines()[0]) from error


def is_of_transport(error: BaseException) -> bool:
    """Whether an error says that another process has ended or does not answer."""
    import torch.distributed as dist

    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _TRANSPORT)
