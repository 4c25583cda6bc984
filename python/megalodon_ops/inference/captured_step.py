"""`CapturedStep`: a call on a GPU as a CUDA graph, which runs all of its kernels without Python between them."""

import threading
import traceback
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..ops.common.recorder import tensors_in
from ..model.model_state import MegalodonStateBase

_CAPTURING = threading.Lock()  # torch allows one capture at a time in a process
aten = torch.ops.aten
_READ_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class CapturedStep:
    """A function(tokens) -> tensor as a CUDA graph. Tokens have one shape; the function updates its state in place.

    The first call runs the function on a side stream, as torch requires before a capture: kernels are loaded, and
    libraries allocate their workspaces. The second call captures a graph, and later ones replay it. All memory that the
    function allocates lies in the graph's own pool, cuBLAS's workspaces included.

    Attributes:
        problem: reason, with a module's name, why a graph cannot repeat the function, which calls then run; or None.
    """

    def __init__(self, model: nn.Module) -> None:
        """model: has the modules that the function calls."""
        self._model = model
        self._tokens: Tensor | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self.problem: str | None = None

    def __call__(self, function: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
        """Return function(tokens). All calls pass the same function; storing it here could keep its owner alive."""
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(tokens.device):
            if self._tokens is None:
                self._tokens, self._stream = tokens.clone(), torch.cuda.Stream()
                return self._warm_up(function)
            self._tokens.copy_(tokens)
            if self._graph is None and self.problem is None:
                self._capture(function)
            if self.problem is not None:
                return function(tokens)
            self._graph.replay()
            return self._result.clone()

    def _warm_up(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        current = torch.cuda.current_stream()
        host_work = _HostWork(self._model)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream), host_work:
            result = function(self._tokens)
        self.problem = host_work.problem
        current.wait_stream(self._stream)
        copied = result.clone()
        self._stream.wait_stream(current)  # the result's memory returns to the side stream
        return copied

    def _capture(self, function: Callable[[Tensor], Tensor]) -> None:
        graph, error = torch.cuda.CUDAGraph(), None
        try:
            # torch.cuda.graph would also collect garbage and free cached memory, which takes 0.1 s and more.
            with _CAPTURING, torch.cuda.stream(self._stream):
                # torch keeps a workspace of cuBLAS for each thread and stream, and has 32 streams. The graph needs one of its
                # own, in its pool: torch frees others for torch.compile, or (pytorch issue 193402) when a graph ends.
                torch.cuda.current_blas_handle()  # creates this thread's handle, which a capture forbids
                torch._C._cuda_clearCublasWorkspaces()
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    self._result = function(self._tokens)
                except BaseException as raised:  # capture_end then raises, too
                    error = raised
                graph.capture_end()
        except RuntimeError as raised:
            error = error or raised
        finally:  # other work on this stream must not use the graph's workspace
            torch._C._cuda_clearCublasWorkspaces()
        if error is None:
            self._graph = graph
        elif not isinstance(error, Exception):
            raise error
        else:
            frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
            name, message = _calling_module(reversed(frames), self._model), str(error).partition("\n")[0]
            self.problem = f"`{name}` cannot be captured by a CUDA graph ({type(error).__name__}: {message})"


def may_capture(model: nn.Module, state: MegalodonStateBase) -> bool:
    """Return True if model and state lie on one GPU, and the host reads no values of the state."""
    tensors = (*tensors_in(state), *model.parameters(), *model.buffers())
    devices = {tensor.device for tensor in tensors}
    return len(devices) == 1 and tensors[0].is_cuda and not model.config.working_memory


def hooked_module(model: nn.Module) -> str | None:
    """Return the name of the first module with hooks of its forward, or None."""
    parts = model.named_modules()
    return next((name or "model" for name, part in parts if part._forward_hooks or part._forward_pre_hooks), None)


class _HostWork(TorchDispatchMode):
    """Finder of the first torch function for which the host waits for the GPU, or which copies between the two.

    A capture would fail at this function, and some versions of torch could then draw no more random numbers.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model, self.problem = model, None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # otherwise torch imports its compiler, which takes 2 s

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        results = func(*args, **(kwargs or {}))
        if self.problem is None and _waits(func, tensors_in(args, kwargs), results):
            name = _calling_module((frame for frame, _ in traceback.walk_stack(None)), self._model)
            function = func._schema.name.removeprefix("aten::")
            self.problem = f"`{name}` calls `{function}`, which makes the host wait for the GPU"
        return results


def _waits(func: torch._ops.OpOverload, arguments: list[Tensor], results: Any) -> bool:
    """Return True if the function returns a value or a size that the GPU computes, or copies from or to the CPU."""
    outputs = tensors_in(results)
    if func is aten.lift_fresh.default:  # called by torch.tensor(values, device="cuda")
        return outputs[0].is_cuda
    if func.overloadpacket in (aten.index, aten.index_put_):
        return any(tensor.dtype in (torch.bool, torch.uint8) for tensor in arguments[1:])
    # A 0-dimensional tensor on the CPU is passed to the kernel as a number.
    devices = {t.device for t in arguments if t.dim() or not t.is_cpu} | {t.device for t in outputs}
    return len(devices) > 1 or isinstance(results, (bool, int, float)) or not _READ_VALUES.isdisjoint(func.tags)


def _calling_module(frames: Iterable[FrameType], model: nn.Module) -> str:
    """Return the name of the innermost module that is being called; `frames`: the stack, innermost first."""
    names = {id(module): name for name, module in model.named_modules()}
    called_names = (names.get(id(frame.f_locals.get("self"))) for frame in frames)
    return next((name for name in called_names if name), "model")
