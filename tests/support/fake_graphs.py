"""A stand-in for torch's CUDA graphs with CPU tensors, and a decoder that captures them.

As a GPU does, a capture leaves all memory as it was, and a replay runs the recorded functions and kernels again, on the
same memory. Reading a value during a capture raises an error, and invalidates it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from emulator.device import Emulator, bindings
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from megalodon_ops import _C
from megalodon_ops.inference import decoder
from megalodon_ops.model import inputs
from megalodon_ops.ops.cema import cema_coefficients
from megalodon_ops.ops.gated_silu import gated_silu
from megalodon_ops.ops.linear import linear

_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


class TensorOn(Tensor):
    """A CPU tensor that says to be on `place`."""

    device = property(lambda self: self.place)
    is_cuda = property(lambda self: self.place.type == "cuda")
    is_cpu = property(lambda self: self.place.type == "cpu")


def tensor_on(place: str, tensor: Tensor) -> TensorOn:
    tensor = tensor.detach().as_subclass(TensorOn)
    tensor.place = torch.device(place)
    return tensor


def tensors_in(*values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def storages_in(*values: Any) -> dict[int, torch.UntypedStorage]:
    storages = [tensor.untyped_storage() for tensor in tensors_in(*values)]
    return {storage.data_ptr(): storage for storage in storages if storage.data_ptr()}


def bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage)


class FakeGraph(TorchDispatchMode):
    """Stands in for torch.cuda.CUDAGraph. `log` has the events of all graphs, streams and launches of a test."""

    log: list[tuple] = []
    capturing: FakeGraph | None = None

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[Callable[[], None]] = []
        self._before: dict[int, tuple[Tensor, Tensor]] = {}  # by address: bytes written in the capture, and a copy
        self._own: dict[int, torch.UntypedStorage] = {}  # by address: memory allocated in the capture
        self._is_valid = True

    def capture_begin(self, capture_error_mode: str) -> None:
        assert FakeGraph.capturing is None and capture_error_mode == "thread_local" and FakeStream.stack
        self.log.append(("capture",))
        FakeGraph.capturing = self
        self.__enter__()

    def capture_end(self) -> None:
        self.__exit__(None, None, None)
        FakeGraph.capturing = None
        for memory, before in self._before.values():
            memory.copy_(before)
        for storage in self._own.values():
            bytes_of(storage).fill_(0xFF)  # NaN
        if not self._is_valid:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    def replay(self) -> None:
        assert FakeGraph.capturing is None
        self.log.append(("replay",))
        with torch.no_grad():
            for call in self._calls:
                call()

    def refuse(self) -> None:
        self._is_valid = False
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    def note(self, call: Callable[[], None], *, written: list[Tensor] = [], fresh: list[Tensor] = []) -> None:
        """Add a call before it writes to the tensors `written`; it has allocated those of `fresh`."""
        for address, storage in storages_in(written).items():
            if address not in self._own and address not in self._before:
                self._before[address] = bytes_of(storage), bytes_of(storage).clone()
        self._own |= storages_in(fresh)
        self._calls.append(call)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "megalodon_ops":
            with self:  # go on with what the op calls
                return func.redispatch(_CPU, *args, **kwargs)
        if torch.Tag.data_dependent_output in func.tags:
            self.refuse()
        values = dict(zip((argument.name for argument in func._schema.arguments), args)) | kwargs
        writes = {a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
        written = tensors_in([values.get(name) for name in writes])
        if written:
            self.note(partial(func, *args, **kwargs), written=written)
            return func(*args, **kwargs)
        results = func(*args, **kwargs)
        old = {0, *storages_in(args, kwargs)}  # 0: without memory
        fresh = [(i, t) for i, t in enumerate(tensors_in(results)) if t.untyped_storage().data_ptr() not in old]

        def repeat() -> None:
            found = tensors_in(func(*args, **kwargs))
            for i, tensor in fresh:
                tensor.copy_(found[i])

        if fresh:
            self.note(repeat, fresh=[tensor for _, tensor in fresh])
        return results


class FakeStream:
    """Stands in for torch.cuda.Stream. The log has who waits for whom; `stack` has the current streams."""

    stack: list[FakeStream] = []
    cuda_stream = 0

    def wait_stream(self, other: FakeStream) -> None:
        FakeGraph.log.append(("wait", self.is_side, other.is_side))

    @property
    def is_side(self) -> bool:
        return self is not DEFAULT_STREAM


DEFAULT_STREAM = FakeStream()


@contextlib.contextmanager
def use_stream(stream: FakeStream) -> Iterator[None]:
    FakeStream.stack.append(stream)
    try:
        yield
    finally:
        FakeStream.stack.pop()


WORKSPACES: dict[tuple[int, FakeStream], FakeGraph | None] = {}
"""Workspaces of cuBLAS: by thread and stream, the graph in whose memory pool they lie"""
HANDLES: set[int] = set()  # threads that have a handle of cuBLAS


def use_workspace() -> None:
    """Assert that a graph uses only workspaces in its own pool, and that calls outside it do not use these."""
    thread, graph = threading.get_ident(), FakeGraph.capturing
    if graph is not None and thread not in HANDLES:
        graph.refuse()
    HANDLES.add(thread)
    assert WORKSPACES.setdefault((thread, torch.cuda.current_stream()), graph) is graph


def count(event: str) -> int:
    return sum(entry[0] == event for entry in FakeGraph.log)


@pytest.fixture
def fake_graphs(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple]]:
    """Decoders capture graphs of CPU tensors, which take the paths of CUDA tensors; the value is FakeGraph's log."""

    bindings_of_cpu = bindings(_C)
    tolist = Tensor.tolist
    torch_linear = F.linear

    def read(tensor: Tensor) -> list:
        """Tensor.tolist, which no dispatch mode sees on the CPU."""
        return tolist(tensor) if FakeGraph.capturing is None else FakeGraph.capturing.refuse()

    def launcher(name: str, kernel: Callable, num_results: int) -> Callable:
        def launch(*args: Any) -> None:
            FakeGraph.log.append(("launch", name, *map(described, args)))
            if FakeGraph.capturing is not None:
                FakeGraph.capturing.note(partial(kernel, *args), written=tensors_in(args[-num_results:]))
            with _disable_current_modes():  # the emulator computes with tensors of its own
                kernel(*args)

        return launch

    def multiply(*args: Any) -> Tensor:
        use_workspace()
        return torch_linear(*args)

    for module in cema_coefficients, gated_silu:
        monkeypatch.setattr(module, "has_cpu_kernel", lambda x: False)
    monkeypatch.setattr(linear, "CHOICES", {})
    monkeypatch.setattr(Tensor, "tolist", read)
    monkeypatch.setattr(inputs, "_check_finite", lambda *arguments: None)
    stack = contextlib.ExitStack()
    stack.enter_context(emulator.replacing(_C))
    for name, (_, results) in bindings_of_cpu.items():
        monkeypatch.setattr(_C, name, launcher(name, getattr(_C, name), len(results)))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", use_stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: [DEFAULT_STREAM, *FakeStream.stack][-1])
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: FakeGraph.capturing is not None)
    monkeypatch.setattr(F, "linear", multiply)
    monkeypatch.setattr(torch.cuda, "current_blas_handle", use_workspace)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", WORKSPACES.clear, raising=False)
    monkeypatch.setattr(decoder, "may_capture", lambda model, state: not model.config.working_memory)
    for record in (FakeGraph.log, WORKSPACES, HANDLES):
        record.clear()
    with stack:
        yield FakeGraph.log
        monkeypatch.undo()


def described(value: Any) -> Any:
    return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value
