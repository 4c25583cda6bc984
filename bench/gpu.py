"""The GPU: description, limits, timing, cache flushing and peak memory. The counterpart of machine.py."""

import subprocess
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megalodon_ops.ops.common import definition as library

from .machine import Limits

NAME = "cuda"


def describe() -> dict[str, str]:
    properties = torch.cuda.get_device_properties(0)
    build = library.cuda_extension().build_info()
    return {
        "card": f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, sm_{properties.major}{properties.minor}",
        "driver": _driver(),
        "L2 cache": f"{properties.L2_cache_size >> 20} MiB",
        "kernels": f"{build['compiler']} for {build['architectures']}",
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda}",
    }


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def measure_limits(threads: int, quick: bool = False) -> Limits:
    size, buffer = (2048, 256 << 20) if quick else (8192, 2 << 30)
    a, b = torch.randn(size, size), torch.randn(size, size)
    a16, b16 = a.bfloat16(), b.bfloat16()
    source, target = torch.ones(buffer // 4), torch.zeros(buffer // 4)

    def rate(work: float, call: Callable[[], object]) -> float:
        call()
        return work / min(timed(call)[0] for _ in range(8)) / 1e9

    return Limits(
        fma_fp32=None,
        gemm_fp32=rate(2 * size**3, lambda: torch.mm(a, b)),
        gemm_fp32_onednn=None,
        gemm_bf16=rate(2 * size**3, lambda: torch.mm(a16, b16)),
        copy=rate(2 * buffer, lambda: target.copy_(source)),
        read=rate(buffer, source.sum),
        first_touch=None,
    )


def has_its_cores(threads: int) -> bool:
    return True


def timed(call: Callable[[], Sequence[Tensor]], calls: int = 1) -> tuple[float, Sequence[Tensor]]:
    """Seconds per call between two events on the stream, and the last outputs."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        outputs = call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / calls, outputs


def cache_flusher() -> Callable[[], None]:
    buffer = torch.zeros(2 * torch.cuda.get_device_properties(0).L2_cache_size // 4)
    return lambda: buffer.add_(1)


def reset_peak_memory() -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def peak_memory_since(in_use: int | None) -> int | None:
    return None if in_use is None else torch.cuda.max_memory_allocated() - in_use
