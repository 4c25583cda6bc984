"""Operations and memory of a call, counted by torch."""

from collections.abc import Callable, Iterable, Iterator

from torch import Tensor
from torch._C._profiler import _EventType
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode


def counted(call) -> dict[str, int]:
    """Flops by the op's name."""
    with FlopCounterMode(display=False) as counter:
        call()
    return {str(op).split(".")[-1]: count for op, count in counter.get_flop_counts().get("Global", {}).items()}


def allocations(events, op: str = "") -> Iterator[tuple[int, int, str]]:
    """Time, change in bytes and op of each allocation."""
    for event in events:
        if event.typed[0] == _EventType.Allocation:
            yield event.start_time_ns, event.typed[1].alloc_size, op
        yield from allocations(event.children, event.name)


def allocated(call: Callable[[], object]) -> tuple[int, int]:
    """Bytes of CPU tensors that a call leaves allocated, and the peak during it.

    Temporary memory inside a matrix product does not count, as it depends on the processor.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    changes = sorted(allocations(profiler.profiler.kineto_results.experimental_event_tree()))
    del result
    total = peak = 0
    for (_, change, op), (_, following, _) in zip(changes, [*changes[1:], (0, 0, "")], strict=True):
        total += change
        # A product's own buffer is allocated and freed in two neighbouring events.
        if not (op in ("aten::mm", "aten::addmm") and following == -change):
            peak = max(peak, total)
    return total, peak


def saved(call: Callable[[], Tensor], inputs: Iterable[Tensor]) -> tuple[Tensor, int]:
    """A call's result, and the bytes of all storages that autograd saves for its backward, except those of `inputs`."""
    found = {}  # keeps the tensors alive, so no address is used twice

    def note(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        result = call()
    for tensor in inputs:
        found.pop(tensor.untyped_storage()._cdata, None)
    return result, sum(tensor.untyped_storage().nbytes() for tensor in found.values())
