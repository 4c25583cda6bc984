"""Reasons why CUDA kernels do not run: the NVIDIA driver is too old, or the build has no code for the GPU.

Versions are integers as in CUDA: 13000 for 13.0. The kernels contain the CUDA runtime of their build. A driver supports
runtimes of its own major version and of older ones. With an older driver, the runtime refuses every call, so no kernel
runs (docs/cuda.md).
"""

_FIRST_DRIVERS = {11: 450, 12: 525, 13: 580}  # Linux driver for each major version of CUDA
_FIRST_NVCC = 11  # the oldest major version that compiles the kernels


def driver_problem(driver: int, runtime: int) -> str | None:
    """Return why a driver for CUDA `driver` (0: no driver) does not run kernels built with CUDA `runtime`, or None."""
    major, built_major = driver // 1000, runtime // 1000
    if major >= built_major:
        return None
    first = _FIRST_DRIVERS.get(built_major)
    needed = f"{first} or newer" if first else f"one of CUDA {built_major}"
    built = f"the kernels were built with CUDA {text(runtime)}"
    if driver == 0:
        return f"no driver; {built}, install driver {needed}"
    alternative = f", or install from source with an nvcc of CUDA {major} in CUDACXX" if major >= _FIRST_NVCC else ""
    return f"the driver supports CUDA {text(driver)}, {built}; update the driver to {needed}{alternative}"


def launch_problem(
    message: str, driver: int, runtime: int, architectures: str, capability: tuple[int, int]
) -> str | None:
    """Return advice on a launch that failed with CUDA's `message` on a GPU of compute capability `capability`.

    The result is None if neither the driver nor `architectures`, those of the build, explain the failure.
    """
    if problem := driver_problem(driver, runtime):
        return problem
    fix = "install again with -C cmake.define.MEGALODON_OPS_ARCHITECTURES={}{}".format(*capability)
    if "no kernel image" in message or "invalid device function" in message:  # at launch, or as attributes are set
        return f"the kernels were built for {architectures}, the GPU is {capability[0]}.{capability[1]}; {fix}"
    if "unsupported toolchain" in message:  # only for PTX: machine code of a newer minor version runs
        return f"the driver supports CUDA {text(driver)} and compiles no PTX of CUDA {text(runtime)}; update the driver, or {fix}"
    return None


def compile_note(architectures: str, capability: tuple[int, int]) -> str | None:
    """Return a note if the build has no machine code for the GPU, else None.

    `architectures` are those of the build, such as "80, 90-real". Machine code also runs on later minor versions of its
    major version. An architecture without "-real" also has PTX.
    """
    names = architectures.split(", ")
    built = [divmod(int(name.removesuffix("-real")), 10) for name in names]
    if any(major == capability[0] and minor <= capability[1] for major, minor in built):
        return None
    fix = "install again with -C cmake.define.MEGALODON_OPS_ARCHITECTURES={}{}".format(*capability)
    older = [name for name in names if name.isdigit() and divmod(int(name), 10) <= capability]
    if not older:
        return f"no code for compute capability {capability[0]}.{capability[1]}; {fix}"
    missing = f"no machine code for compute capability {capability[0]}.{capability[1]}"
    return f"{missing}: the driver compiles PTX of sm_{older[-1]} at the first launch, in about half a minute; or {fix}"


def text(version: int) -> str:
    """Return a version as text: "13.0" for 13000."""
    return f"{version // 1000}.{version % 1000 // 10}"
