"""The NVIDIA driver that the CUDA kernels of this build need, and the reason of a failed launch.

Versions are CUDA's: 13000 for 13.0. The kernels contain the CUDA runtime of their build. A driver runs runtimes of its
own and of older major versions; with an older driver the runtime refuses every call, so no kernel runs (docs/cuda.md).
"""

from __future__ import annotations

_FIRST_DRIVERS = {11: 450, 12: 525, 13: 580}  # Linux driver for each major version of CUDA
_FIRST_NVCC = 11  # the oldest major version that compiles the kernels


def driver_problem(driver: int, runtime: int) -> str | None:
    """Reason why a driver for CUDA `driver` (0: no driver) does not run kernels built with CUDA `runtime`, or None."""
    major, target = driver // 1000, runtime // 1000
    if major >= target:
        return None
    needed = f"{_FIRST_DRIVERS[target]} or newer" if target in _FIRST_DRIVERS else f"one of CUDA {target}"
    built = f"the kernels were built with CUDA {text(runtime)}"
    if driver == 0:
        return f"no driver; {built}, install driver {needed}"
    other = f", or install from source with an nvcc of CUDA {major} in CUDACXX" if major >= _FIRST_NVCC else ""
    return f"the driver supports CUDA {text(driver)}, {built}; update the driver to {needed}{other}"


def launch_problem(
    message: str, driver: int, runtime: int, architectures: str, capability: tuple[int, int]
) -> str | None:
    """Advice about a launch that failed with CUDA's `message` on a GPU of compute capability `capability`.

    None if neither the driver nor `architectures`, which the kernels were built for, explains the failure.
    """
    if problem := driver_problem(driver, runtime):
        return problem
    own = "install again with -C cmake.define.MEGALODON_OPS_ARCHITECTURES={}{}".format(*capability)
    if "no kernel image" in message or "invalid device function" in message:  # at launch or when its attributes are set
        return f"the kernels were built for {architectures}, the GPU is {capability[0]}.{capability[1]}; {own}"
    if "unsupported toolchain" in message:  # PTX alone: machine code of a newer minor version runs
        return f"the driver supports CUDA {text(driver)} and compiles no PTX of CUDA {text(runtime)}; update the driver, or {own}"
    return None


def compile_note(architectures: str, capability: tuple[int, int]) -> str | None:
    """Note on a GPU for which the build, of `architectures` such as "80, 90-real", has no machine code; None if it has.

    Machine code runs on later minor versions of its major one; an architecture without "-real" also has PTX.
    """
    names = architectures.split(", ")
    built = [divmod(int(name.removesuffix("-real")), 10) for name in names]
    if any(major == capability[0] and minor <= capability[1] for major, minor in built):
        return None
    own = "install again with -C cmake.define.MEGALODON_OPS_ARCHITECTURES={}{}".format(*capability)
    older = [name for name in names if name.isdigit() and divmod(int(name), 10) <= capability]
    if not older:
        return f"no code for compute capability {capability[0]}.{capability[1]}; {own}"
    what = f"no machine code for compute capability {capability[0]}.{capability[1]}"
    return f"{what}: the driver compiles PTX of sm_{older[-1]} at the first launch, in about half a minute; or {own}"


def text(version: int) -> str:
    """Text of a version: "13.0" for 13000."""
    return f"{version // 1000}.{version % 1000 // 10}"
