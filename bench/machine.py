"""The processor: description, limits measured in the same run, timing, cache flushing and peak memory."""

from __future__ import annotations

import ctypes
import functools
import gc
import mmap
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import megalodon_ops as mo

from . import baselines

NAME = "cpu"
_FLAGS = ("sse4_2", "avx", "avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")


@dataclass(frozen=True)
class Limits:
    """Best measured rates in GFLOP/s and GB/s; None where not measured."""

    fma_fp32: float | None
    """multiply-adds in registers, a small C loop (fma_peak.c)"""
    gemm_fp32: float
    """torch.mm of square matrices"""
    gemm_fp32_onednn: float | None
    """the same by oneDNN, which torch.mm may not use"""
    gemm_bf16: float
    copy: float
    """tensor.copy_ between buffers far larger than the cache, bytes read plus bytes written"""
    read: float
    """tensor.sum of such a buffer"""
    first_touch: float | None
    """writing new memory, whose pages the system must clear first"""

    def best(self, other: Limits) -> Limits:
        """The higher value of each rate, as other load only lowers rates."""
        best = {}
        for name, rate in vars(self).items():
            known = [r for r in (rate, getattr(other, name)) if r is not None]
            best[name] = max(known, default=None)
        return Limits(**best)


def describe() -> dict[str, str]:
    info = _cpuinfo()
    flags = set(info.get("flags", info.get("Features", "")).split())
    return {
        "processor": info.get("model name", platform.processor() or platform.machine()),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "last-level cache": f"{last_level_cache() >> 20} MiB",
        "vector extensions": " ".join(flag for flag in _FLAGS if flag in flags) or "unknown",
        "kernels in use": mo._C.active_isa(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _cpuinfo() -> dict[str, str]:
    """First processor of /proc/cpuinfo; empty if there is no such file."""
    path = Path("/proc/cpuinfo")
    text = path.read_text().split("\n\n")[0] if path.exists() else ""
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}


def last_level_cache() -> int:
    """Bytes of the last-level cache; 32 MiB if unknown."""
    sizes = [os.sysconf(name) for name in ("SC_LEVEL3_CACHE_SIZE", "SC_LEVEL2_CACHE_SIZE") if name in os.sysconf_names]
    return next((size for size in sizes if size > 0), 32 << 20)


def measure_limits(threads: int, quick: bool = False) -> Limits:
    torch.set_num_threads(threads)
    repeats, size, buffer = (2, 1024, 64 << 20) if quick else (6, 2048, 256 << 20)
    a, b = torch.randn(size, size), torch.randn(size, size)
    a16, b16 = a.bfloat16(), b.bfloat16()
    source, target = torch.ones(buffer // 4), torch.zeros(buffer // 4)
    flops = 2 * size**3

    def rate(work: float, call: Callable[[], object]) -> float:
        return work / min(_seconds(call) for _ in range(repeats)) / 1e9

    onednn = None
    if baselines.HAS_ONEDNN_LINEAR:
        onednn = rate(flops, lambda: baselines.onednn_linear(a, b))
    return Limits(
        fma_fp32=fma_peak(threads, quick),
        gemm_fp32=rate(flops, lambda: torch.mm(a, b)),
        gemm_fp32_onednn=onednn,
        gemm_bf16=rate(flops, lambda: torch.mm(a16, b16)),
        copy=rate(2 * buffer, lambda: target.copy_(source)),
        read=rate(buffer, source.sum),
        first_touch=_first_touch(buffer),
    )


def fma_peak(threads: int, quick: bool = False) -> float | None:
    """GFLOP/s of multiply-adds in registers on `threads` threads; None without a C compiler."""
    if _fma_loop() is None:
        return None
    rate = max(_fma_rate(threads, 10_000_000 if quick else 60_000_000) for _ in range(3))
    _measured_peaks[threads] = max(rate, _measured_peaks.get(threads, 0))
    return rate


_measured_peaks: dict[int, float] = {}


def has_its_cores(threads: int) -> bool:
    """Return True if multiply-adds run at over 4/5 of the measured peak: no other load shares the cores."""
    if threads not in _measured_peaks:
        return True
    time.sleep(0.01)  # until OpenMP's threads no longer spin
    return min(_fma_rate(threads, 1_000_000) for _ in range(5)) > 0.8 * _measured_peaks[threads]


def _fma_rate(threads: int, iterations: int) -> float:
    native = _fma_loop()

    def one_thread(_: int) -> float:
        return _seconds(lambda: native.run(iterations, 0.999, 0.001))

    with ThreadPoolExecutor(threads) as pool:  # ctypes releases the GIL
        return threads * iterations * native.flops_per_iteration() / max(pool.map(one_thread, range(threads))) / 1e9


@functools.cache
def _fma_loop() -> ctypes.CDLL | None:
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "fma_peak.so"
        source = Path(__file__).with_name("fma_peak.c")
        flags = ["-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC"]
        subprocess.run([*compiler.split(), *flags, str(source), "-o", str(library)], check=True)
        native = ctypes.CDLL(str(library))
    native.run.restype = ctypes.c_float
    native.run.argtypes = (ctypes.c_int64, ctypes.c_float, ctypes.c_float)
    native.flops_per_iteration.restype = ctypes.c_int64
    return native


def _first_touch(size: int) -> float:
    """GB/s of filling memory that the process has not touched yet."""
    fresh = torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)
    return size / _seconds(lambda: fresh.fill_(1)) / 1e9


def _seconds(call: Callable[[], object]) -> float:
    return timed(call)[0]


def timed(call: Callable[[], Sequence[Tensor]], calls: int = 1) -> tuple[float, Sequence[Tensor]]:
    """Seconds per call, and the last outputs, which are freed after the timing."""
    start = time.perf_counter()
    for _ in range(calls):
        outputs = call()
    return (time.perf_counter() - start) / calls, outputs


def cache_flusher() -> Callable[[], None]:
    """A call that evicts all earlier data from the caches."""
    buffer = torch.zeros(2 * last_level_cache() // 4)
    return lambda: buffer.add_(1)


def reset_peak_memory() -> int | None:
    """Return freed memory to the system, reset the high-water mark, and return the bytes in use; None if not Linux."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except (AttributeError, OSError):
        return None


def peak_memory_since(in_use: int | None) -> int | None:
    return None if in_use is None else max(0, _status("VmHWM") - in_use)


def _status(name: str) -> int:
    return int(re.search(rf"{name}:\s*(\d+)", Path("/proc/self/status").read_text())[1]) << 10
