"""Which NVIDIA driver the CUDA kernels of this build need, and why a launch of a kernel failed.

Versions are CUDA's: 13000 for 13.0. The kernels hold the CUDA runtime that they were built with, and a driver runs
runtimes of its own major version and of older major versions. A runtime that finds an older driver refuses every call
before it has made one to the driver but for the version (docs/cuda.md), so that no kernel runs.
"""

from __future__ import annotations

_FIRST_DRIVERS = {11: 450, 12: 525, 13: 580}  # by major version of CUDA, on Linux
_FIRST_NVCC = 11  # the oldest major version that compiles the kernels


def driver_problem(driver: int, runtime: int) -> str | None:
    """Why a driver that supports CUDA `driver`, 0 if there is none, does not run kernels built with `runtime`.

    None if the driver runs them.
    """
    major, of_kernels = driver // 1000, runtime // 1000
    if major >= of_kernels:
        return None
    needed = f"{_FIRST_DRIVERS[of_kernels]} or newer" if of_kernels in _FIRST_DRIVERS else f"one of CUDA {of_kernels}"
    built = f"the kernels were built with CUDA {text(runtime)}"
    if driver == 0:
        return f"no driver; {built}, install driver {needed}"
    other = f", or install from source with an nvcc of CUDA {major} in CUDACXX" if major >= _FIRST_NVCC else ""
    return f"the driver supports CUDA {text(driver)}, {built}; update the driver to {needed}{other}"


def launch_problem(
    message: str, driver: int, runtime: int, architectures: str, capability: tuple[int, int]
) -> str | None:
    """What to do about a launch that failed with CUDA's `message`, on a GPU of compute capability `capability`.

    None if neither the driver nor `architectures`, which the kernels were built for, explains the failure.
    """
    if problem := driver_problem(driver, runtime):
        return problem
    own = "install again with -C cmake.define.MEGALODON_OPS_ARCHITECTURES={}{}".format(*capability)
    if "no kernel image" in message or "invalid device function" in message:  # said of a launch, of its attributes
        return f"the kernels were built for {architectures}, the GPU is {capability[0]}.{capability[1]}; {own}"
    if "unsupported toolchain" in message:  # PTX; machine code of a newer minor version runs
        return f"the driver supports CUDA {text(driver)} and compiles no PTX of CUDA {text(runtime)}; update the driver, or {own}"
    return None


def text(version: int) -> str:
    """13000 as "13.0"."""
    return f"{version // 1000}.{version % 1000 // 10}"
