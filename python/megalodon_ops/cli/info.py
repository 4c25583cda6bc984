"""`info`: what was built, and what it runs on."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform

import torch

import megalodon_ops
from megalodon_ops import _C


def run(options: argparse.Namespace) -> int:
    for name, value in facts().items():
        print(f"{name:<18} {value}")
    return 0


def facts() -> dict[str, str]:
    built = _C.build_info()
    forced = os.environ.get("MEGALODON_OPS_ISA")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "megalodon_ops": megalodon_ops.__version__,
        "compiler": str(built["compiler"]),
        "OpenMP": str(built["openmp"]),
        "instruction sets": f"{', '.join(_C.built_isas())} built; {', '.join(_C.available_isas())} run here",
        "in use": _C.active_isa() + (" (MEGALODON_OPS_ISA)" if forced else ""),
        "CUDA kernels": "built" if has_cuda_kernels() else "not in this build",
        "threads": f"{_C.num_threads()} (torch: {torch.get_num_threads()})",
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "GPU": ", ".join(gpus) or "none that torch can use",
    }


def has_cuda_kernels() -> bool:
    return importlib.util.find_spec("megalodon_ops._cuda") is not None
