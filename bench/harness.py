"""Times several ways of doing the same work against each other: first whether they agree, then how long they take.

A `Case` is one piece of work with a `Path` for each way of doing it, ours first. Measuring one takes these steps:

1. Agreement. Every path runs once, and its outputs are held against the case's expected ones, of which a path may be
   the source; ours must be within the tolerance, or the case raises `Disagreement` and is not timed. This call also
   compiles what needs compiling.
2. Memory. Freed memory is given back to the system, and the peak memory of one call is read (Linux only): of our path
   during the call of step 1, of a rival that is not slow during one more call. Runs on fewer threads skip this step.
3. Warm-up. Every short path is called again, and so is every path that was called before step 2 last gave memory back.
4. Time. Paths take turns, A B A B, so that a slower moment of the machine hits all of them. A path leaves when it has
   enough samples or has used up its seconds, so slow paths end with few samples. A slow rival is timed by one call after
   that of step 1; a very slow rival by the call of step 1 itself.
   warm: an untimed call comes first, then the timed one, or as many calls in a row as take a millisecond.
   cold: a buffer twice as large as the last-level cache is read and written first, then one call is timed.
   If the machine was slower than it can be before or after, the samples are taken again, unless that takes long, and
   if it still is, the case's notes say so.

Results are freed outside the timed part. The allocator keeps freed memory (`megalodon_ops.keep_freed_memory`), so that
the system's page clearing, which `machine.Limits.first_touch` shows, is not part of what is timed.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor

from . import machine

OURS = "megalodon_ops"
hardware: ModuleType = machine  # or gpu
Outputs = Sequence[Tensor]

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}

_SHORT = 1e-3  # seconds; shorter calls are timed several in a row
_CACHEABLE = 0.1  # seconds; the state of the cache, which fills in a millisecond, does not show in longer calls
_LONG = 3.0  # seconds; a call that takes longer is timed once, after a first one, samples that did are not taken again
_SLOW = 1.35  # seconds; a rival whose first call takes longer gets one more call
_VERY_SLOW = 6.0  # seconds; a rival whose first call takes longer gets no other call


class Disagreement(AssertionError):
    """Our results are not those expected."""


@dataclass
class Path:
    """One way of doing a case's work."""

    name: str
    call: Callable[[], Outputs]
    before: Callable[[], None] | None = None
    """untimed, ahead of every call"""
    rival: bool = True
    """competes for the best plain-torch path; False: other work, shown for comparison"""
    checked: bool = True
    """its outputs are those of the case"""
    compiled: bool = False
    """the first call compiles"""


@dataclass
class Case:
    """One piece of work, stated as what any way of doing it must compute and move."""

    name: str
    shape: str
    dtype: str
    paths: list[Path]
    expected: Callable[[], Outputs] | None
    """None: nothing to compare; a path's own `call` is not called twice"""
    tolerance: float
    """on max |got - expected| / max |expected|, each output by itself"""
    units: int
    """elements or tokens"""
    unit: str = "element"
    flops: float | None = None
    """useful floating-point operations"""
    bytes: float | None = None
    """fewest bytes to and from memory"""
    cold: bool = True
    """also worth timing with nothing in the cache"""
    fewer_threads: bool = True
    """also worth timing on fewer threads than all"""
    all_peaks: bool = False
    """the peak memory of slow rivals is of interest too; it is read in the call of step 1, on fresh pages"""


@dataclass
class Timing:
    """What one path took, in seconds a call."""

    path: str
    rival: bool
    warm: list[float] = field(default_factory=list)
    cold: list[float] = field(default_factory=list)
    error: float | None = None
    peak_memory: int | None = None
    """bytes on top of what was in use before"""
    note: str = ""

    @property
    def median(self) -> float:
        samples = self.warm or self.cold
        return statistics.median(samples) if samples else math.inf


@dataclass
class Result:
    """A measured case at one number of threads."""

    bench: str
    case: str
    shape: str
    dtype: str
    threads: int
    units: int
    unit: str
    flops: float | None
    bytes: float | None
    tolerance: float
    timings: list[Timing]

    @property
    def ours(self) -> Timing:
        return self.timings[0]

    @property
    def best_rival(self) -> Timing | None:
        """The fastest of the rivals whose results are right."""
        rivals = [t for t in self.timings if t.rival and t.median < math.inf and (t.error or 0) <= self.tolerance]
        return min(rivals, key=lambda t: t.median, default=None)


@dataclass(frozen=True)
class Effort:
    """How long to measure."""

    samples: int = 11
    seconds: float = 0.15
    """for each path and state of the cache, three times as many for the first three samples, any number for two, or for
    one of a call that is long"""
    compiled: bool = True
    """whether the rivals that torch.compile makes, for seconds each, are measured, too"""
    attempts: int = 3
    """to find the machine as fast as it can be"""


def measure(bench: str, case: Case, threads: Sequence[int], effort: Effort) -> Iterator[Result]:
    """Results with the largest number of threads first; with fewer, ours against the best rival alone, warm."""
    all_threads, *fewer = sorted(threads, reverse=True)
    if not effort.compiled:
        case = dataclasses.replace(case, paths=[path for path in case.paths if not path.compiled])
    result = _measure(bench, case, all_threads, effort)
    yield result
    best = result.best_rival
    rivals = [path for path in case.paths[1:] if best and path.name == best.path and len(best.warm) > 1]
    duel = dataclasses.replace(case, paths=[case.paths[0], *rivals], expected=None, cold=False)
    for count in fewer if case.fewer_threads else ():
        yield _measure(bench, duel, count, effort, memory=False)


def _measure(bench: str, case: Case, threads: int, effort: Effort, *, memory: bool = True) -> Result:
    torch.set_num_threads(threads)
    timings = [Timing(path.name, path.rival and path is not case.paths[0]) for path in case.paths]
    active = _check(case, timings, memory)
    gave_away = memory and any([*(runner.read_memory() for runner in active), case.all_peaks])
    for runner in active:
        runner.warm_up(2 if runner.seconds < _CACHEABLE else int(gave_away))
    gc.collect()
    gc.disable()
    try:
        _take_samples(active, case, threads, effort)
    finally:
        gc.enable()
    return Result(
        bench, case.name, case.shape, case.dtype, threads, case.units, case.unit, case.flops, case.bytes,
        case.tolerance, timings,
    )  # fmt: skip


def _take_samples(runners: list[_Runner], case: Case, threads: int, effort: Effort) -> None:
    """Takes the samples: step 4 of measuring a case."""
    for _ in range(effort.attempts):
        for runner in runners:
            runner.timing.warm, runner.timing.cold = [], []
        start, undisturbed = time.perf_counter(), hardware.has_its_cores(threads)
        _take_turns(runners, effort, warm=True)
        if case.cold:
            _take_turns([runner for runner in runners if runner.seconds < _CACHEABLE], effort, warm=False)
        if undisturbed and hardware.has_its_cores(threads):
            return
        if time.perf_counter() - start > _LONG:
            break
    for runner in runners:
        runner.timing.note = "; ".join(filter(None, (runner.timing.note, "less than the machine's speed")))


@dataclass
class _Runner:
    """A path being timed."""

    path: Path
    timing: Timing
    seconds: float
    """about how long a call takes"""

    def read_memory(self) -> bool:
        """Reads the peak memory of a call; False if it is known."""
        if self.timing.peak_memory is not None:
            return False
        if self.path.before:
            self.path.before()
        in_use = hardware.reset_peak_memory()
        self.seconds, outputs = hardware.timed(self.path.call)
        self.timing.peak_memory = hardware.peak_memory_since(in_use)
        del outputs
        return True

    def warm_up(self, calls: int) -> None:
        """Finds how long a call takes that needs no fresh memory."""
        for _ in range(calls):
            if self.path.before:
                self.path.before()
            self.seconds = min(self.seconds, hardware.timed(self.path.call)[0])

    def sample(self, flush: Callable[[], None] | None) -> None:
        """Adds one sample: cold after `flush`, else warm."""
        alone = flush is not None or self.path.before is not None
        calls = 1 if alone else max(1, math.ceil(_SHORT / self.seconds))
        if self.path.before:
            self.path.before()
        if flush:
            flush()
        elif not alone and self.seconds < _CACHEABLE:
            self.path.call()
        seconds, _ = hardware.timed(self.path.call, calls)
        (self.timing.cold if flush else self.timing.warm).append(seconds)


def _check(case: Case, timings: list[Timing], memory: bool) -> list[_Runner]:
    """Runs every path once against the expected outputs; returns those worth timing further."""
    every_peak = memory and case.all_peaks
    in_use = hardware.reset_peak_memory() if every_peak else None
    expected_seconds, expected = hardware.timed(case.expected) if case.expected else (0.0, ())
    expected_peak = hardware.peak_memory_since(in_use)
    expected = [t.detach() for t in expected]
    active = []
    for path, timing in zip(case.paths, timings, strict=True):
        ours = path is case.paths[0]
        if path.before:
            path.before()
        in_use = hardware.reset_peak_memory() if every_peak or (ours and memory) else None
        known = path.call is case.expected
        try:
            seconds, outputs = (expected_seconds, expected) if known else hardware.timed(path.call)
        except Exception as error:
            if ours:
                raise
            timing.note = f"failed: {type(error).__name__}"
            continue
        timing.peak_memory = expected_peak if known else hardware.peak_memory_since(in_use)
        if expected and path.checked:
            timing.error = relative_error(outputs, expected)
            agrees = timing.error <= case.tolerance
            if ours and not agrees:
                work = f"{case.name}, {case.shape}, {case.dtype}"
                raise Disagreement(f"{work}: error {timing.error:.1e}, more than {case.tolerance:.0e}")
            if not agrees:
                timing.note = "misses the tolerance"
        del outputs
        if seconds > _SLOW and not ours and not path.compiled:
            warmed = seconds <= _VERY_SLOW
            if warmed:
                if path.before:
                    path.before()
                seconds, _ = hardware.timed(path.call)
            timing.warm, timing.note = [seconds], timing.note or ("one call" if warmed else "one call, no warm-up")
        else:
            active.append(_Runner(path, timing, seconds))
    return active


def relative_error(got: Outputs, expected: Outputs) -> float:
    """The largest max |got - expected| / max |expected| of any output."""
    errors = [0.0]
    for a, b in zip(got, expected, strict=True):
        if a.shape != b.shape:
            raise Disagreement(f"shape {tuple(a.shape)} instead of {tuple(b.shape)}")
        wide = torch.complex128 if b.is_complex() else torch.float64
        # In pieces, so that checking a large result takes little memory.
        pieces = zip(a.detach().reshape(-1).split(1 << 24), b.reshape(-1).split(1 << 24), strict=True)
        worst = max(_nan_is_worst((p.to(wide) - q.to(wide)).abs().max().item()) for p, q in pieces)
        errors.append(worst / max(b.abs().max().item(), 1e-30))
    return max(errors)


def _nan_is_worst(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _take_turns(runners: list[_Runner], effort: Effort, *, warm: bool) -> None:
    """Samples A B A B until each path has enough samples or has used up its seconds."""
    flush = None if warm else hardware.cache_flusher()
    spent = dict.fromkeys(range(len(runners)), 0.0)
    samples = 0
    while spent and samples < effort.samples:
        for index in list(spent):
            start = time.perf_counter()
            runners[index].sample(flush)
            spent[index] += time.perf_counter() - start
            enough = samples > 0 or runners[index].seconds > _LONG
            if enough and spent[index] > effort.seconds * (1 if samples >= 2 else 3):
                del spent[index]
        samples += 1


def way(
    call: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    douts: Sequence[Tensor],
    *,
    backward: bool,
) -> Callable[[], Outputs]:
    """A path's call, with gradients or without."""
    return forward_backward(call, inputs, douts) if backward else forward(call, *inputs)


def forward(call: Callable[..., Tensor | tuple[Tensor, ...]], *inputs: Tensor) -> Callable[[], Outputs]:
    """A path's call without gradients."""

    def run() -> Outputs:
        with torch.no_grad():
            outputs = call(*inputs)
        return (outputs,) if isinstance(outputs, Tensor) else outputs

    return run


def forward_backward(
    call: Callable[..., Tensor | tuple[Tensor, ...]], inputs: Sequence[Tensor], douts: Sequence[Tensor]
) -> Callable[[], Outputs]:
    """A path's call with the gradients of all `inputs`, given those of the outputs."""
    leaves = [t.detach().requires_grad_() for t in inputs]

    def run() -> Outputs:
        outputs = call(*leaves)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        return *(o.detach() for o in outputs), *torch.autograd.grad(outputs, leaves, douts)

    return run
