"""`info`: the build, the machine and the versions in use."""

import os
import platform

import torch

import megalodon_ops
from megalodon_ops import _C
from megalodon_ops.ops.common import cuda_driver
from megalodon_ops.ops.common import definition as library


def run(options: object = None) -> int:
    for name, value in facts().items():
        print(f"{name:<18} {value}")
    return 0


def facts() -> dict[str, str]:
    built = _C.build_info()
    forced = os.environ.get("MEGALODON_OPS_ISA")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "megalodon_ops": megalodon_ops.__version__,
        "compiler": built["compiler"],
        "instruction sets": f"{', '.join(_C.built_isas())} built; {', '.join(_C.available_isas())} run here",
        "in use": _C.active_isa() + (" (MEGALODON_OPS_ISA)" if forced else ""),
        **_cuda(),
        "threads": f"{_C.num_threads()} (torch: {torch.get_num_threads()})",
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "GPU": ", ".join(gpus) or "none that torch can use",
    }


def _cuda() -> dict[str, str]:
    if not library.has_cuda_kernels():
        return {"CUDA kernels": "not in this build (no nvcc of 11.8 or newer was found, or MEGALODON_OPS_CUDA=OFF)"}
    extension = library.cuda_extension()
    built = extension.build_info()
    driver, runtime = extension.cuda_versions()
    supported = f"supports CUDA {cuda_driver.text(driver)}, enough for the kernels' {cuda_driver.text(runtime)}"
    kernels = f"{built['compiler']} for {built['architectures']}"
    for capability in dict.fromkeys(map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))):
        if note := cuda_driver.compile_note(built["architectures"], capability):
            kernels += f"; {note}"
    return {
        "CUDA kernels": kernels,
        "NVIDIA driver": cuda_driver.driver_problem(driver, runtime) or supported,
    }
