"""Check that several ways of doing the same work agree, then time them against each other.

A `Case` is one piece of work with a `Path` for each way of doing it, ours first. It is measured in four phases:

1. Agreement. Every path runs once, and its outputs are compared with the expected ones, which may be the outputs of a
   path. If ours miss the tolerance, the case raises `Disagreement` and is not timed. This call also compiles.
2. Memory. Freed memory is returned to the system, and the peak memory of one call is read (Linux only). For our path
   this is the call of phase 1; a rival that is not slow is called once more. Runs on fewer threads skip this phase.
3. Warm-up. A path with calls below 0.1 s is called twice. Other paths are called once if phase 2 has returned memory.
4. Time. Paths take turns, A B A B, so that a slower moment of the machine hits all of them. A path stops when it has
   enough samples or has used up its seconds, so slow paths have few samples. A slow rival is timed by one call after
   phase 1; a very slow rival by the call of phase 1 itself.
   warm: an untimed call comes first, then the timed one, or as many calls in a row as take a millisecond.
   cold: a buffer twice as large as the last-level cache is read and written first, then one call is timed.
   If multiply-adds ran below the machine's full speed just before or after the samples, the samples are taken again,
   unless they took long. If the speed stays low, a note says so.

Results are freed outside the timed part. The allocator keeps freed memory (`megalodon_ops.keep_freed_memory`), so the
times exclude the system's clearing of pages, which `machine.Limits.first_touch` shows.
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
_CACHE_MATTERS = 0.1  # seconds; the cache fills in a millisecond, so its state does not affect longer calls
_LONG = 3.0  # seconds; a path with longer calls may stop after one sample; samples that took longer are not repeated
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
    """runs untimed before every call"""
    rival: bool = True
    """a plain-torch path, a candidate for :attr:`Result.best_rival`; False: other work, shown for comparison"""
    checked: bool = True
    """compare the outputs with those expected"""
    compiled: bool = False
    """the first call compiles"""


@dataclass
class Case:
    """One piece of work: what every path must compute and move."""

    name: str
    shape: str
    dtype: str
    paths: list[Path]
    expected: Callable[[], Outputs] | None
    """computes the outputs to compare with, or None. If it is the `call` of a path, it is called once for both"""
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
    """also time with an empty cache"""
    fewer_threads: bool = True
    """also time on fewer threads than all"""
    all_peaks: bool = False
    """also read the peak memory of slow rivals; before each call of phase 1, freed memory is returned to the system"""


@dataclass
class Timing:
    """Seconds per call of one path."""

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
        """Fastest rival with correct results."""
        rivals = [t for t in self.timings if t.rival and t.median < math.inf and (t.error or 0) <= self.tolerance]
        return min(rivals, key=lambda t: t.median, default=None)


@dataclass(frozen=True)
class Effort:
    """Limits of measuring time."""

    samples: int = 11
    seconds: float = 0.15
    """limit for each path, once with a warm and once with a cold cache. A path takes at least two samples (one if its
    calls are long), and a third if these took at most three times the limit"""
    compiled: bool = True
    """also measure the rivals by torch.compile, which take seconds to compile"""
    attempts: int = 3
    """maximum times that samples are taken, until the machine runs at full speed"""


def measure(bench: str, case: Case, threads: Sequence[int], effort: Effort) -> Iterator[Result]:
    """Yield a result for each number of threads, in descending order.

    Only the first has all paths. The others have our path and the best rival, with a warm cache.
    """
    all_threads, *fewer = sorted(threads, reverse=True)
    if not effort.compiled:
        case = dataclasses.replace(case, paths=[path for path in case.paths if not path.compiled])
    result = _measure(bench, case, all_threads, effort)
    yield result
    best = result.best_rival
    rivals = [path for path in case.paths[1:] if best and path.name == best.path and len(best.warm) > 1]
    fastest = dataclasses.replace(case, paths=[case.paths[0], *rivals], expected=None, cold=False)
    for count in fewer if case.fewer_threads else ():
        yield _measure(bench, fastest, count, effort, memory=False)


def _measure(bench: str, case: Case, threads: int, effort: Effort, *, memory: bool = True) -> Result:
    torch.set_num_threads(threads)
    timings = [Timing(path.name, path.rival and path is not case.paths[0]) for path in case.paths]
    active = _check(case, timings, memory)
    memory_returned = case.all_peaks
    for runner in active if memory else ():
        memory_returned |= runner.read_memory()
    for runner in active:
        runner.warm_up(2 if runner.seconds < _CACHE_MATTERS else int(memory and memory_returned))
    gc.collect()
    gc.disable()
    try:
        _take_samples(active, case, threads, effort)
    finally:
        gc.enable()
    work = {name: getattr(case, name) for name in ("shape", "dtype", "units", "unit", "flops", "bytes", "tolerance")}
    return Result(bench=bench, case=case.name, threads=threads, timings=timings, **work)


def _take_samples(runners: list[_Runner], case: Case, threads: int, effort: Effort) -> None:
    """Take the samples: phase 4 of measuring a case."""
    for _ in range(effort.attempts):
        for runner in runners:
            runner.timing.warm, runner.timing.cold = [], []
        start = time.perf_counter()
        undisturbed = hardware.has_its_cores(threads)
        _take_turns(runners, effort, warm=True)
        if case.cold:
            _take_turns([runner for runner in runners if runner.seconds < _CACHE_MATTERS], effort, warm=False)
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
    """approximate time of a call"""

    def read_memory(self) -> bool:
        """Read the peak memory of a call; return False if it was known before."""
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
        """Call the path, and keep the shortest time: that of a call that needs no new memory."""
        for _ in range(calls):
            if self.path.before:
                self.path.before()
            self.seconds = min(self.seconds, hardware.timed(self.path.call)[0])

    def sample(self, flush: Callable[[], None] | None) -> None:
        """Add one sample: cold after `flush`, else warm."""
        single_call = flush is not None or self.path.before is not None
        calls = 1 if single_call else max(1, math.ceil(_SHORT / self.seconds))
        if self.path.before:
            self.path.before()
        if flush:
            flush()
        elif not single_call and self.seconds < _CACHE_MATTERS:
            self.path.call()
        seconds, _ = hardware.timed(self.path.call, calls)
        (self.timing.cold if flush else self.timing.warm).append(seconds)


def _check(case: Case, timings: list[Timing], memory: bool) -> list[_Runner]:
    """Run every path once and compare its outputs with those expected; return the paths to time further."""
    all_peaks = memory and case.all_peaks
    in_use = hardware.reset_peak_memory() if all_peaks else None
    expected_seconds, expected = hardware.timed(case.expected) if case.expected else (0.0, ())
    expected_peak = hardware.peak_memory_since(in_use)
    expected = [t.detach() for t in expected]
    active = []
    for path, timing in zip(case.paths, timings, strict=True):
        ours = path is case.paths[0]
        if path.before:
            path.before()
        in_use = hardware.reset_peak_memory() if all_peaks or (ours and memory) else None
        known = path.call is case.expected  # this path has run: its outputs are those expected
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
            note = "one call, no warm-up"
            if seconds <= _VERY_SLOW:
                note = "one call"
                if path.before:
                    path.before()
                seconds, _ = hardware.timed(path.call)
            timing.warm = [seconds]
            timing.note = timing.note or note
        else:
            active.append(_Runner(path, timing, seconds))
    return active


def relative_error(got: Outputs, expected: Outputs) -> float:
    """Largest max |got - expected| / max |expected| of the outputs."""
    errors = [0.0]
    for a, b in zip(got, expected, strict=True):
        if a.shape != b.shape:
            raise Disagreement(f"shape {tuple(a.shape)} instead of {tuple(b.shape)}")
        wide = torch.complex128 if b.is_complex() else torch.float64
        # In pieces, to need little memory for a large result.
        pieces = zip(a.detach().reshape(-1).split(1 << 24), b.reshape(-1).split(1 << 24), strict=True)
        worst = max(_nan_is_worst((p.to(wide) - q.to(wide)).abs().max().item()) for p, q in pieces)
        errors.append(worst / max(b.abs().max().item(), 1e-30))
    return max(errors)


def _nan_is_worst(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _take_turns(runners: list[_Runner], effort: Effort, *, warm: bool) -> None:
    """Sample A B A B until each path has enough samples or has used up its seconds."""
    flush = None if warm else hardware.cache_flusher()
    spent = dict.fromkeys(range(len(runners)), 0.0)  # seconds of each path that is still sampled
    samples = 0  # of each such path
    while spent and samples < effort.samples:
        for index in list(spent):
            start = time.perf_counter()
            runners[index].sample(flush)
            spent[index] += time.perf_counter() - start
            enough = samples > 0 or runners[index].seconds > _LONG
            limit = effort.seconds if samples >= 2 else 3 * effort.seconds
            if enough and spent[index] > limit:
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
