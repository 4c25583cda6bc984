"""Run kernels built with AddressSanitizer and UndefinedBehaviorSanitizer, which end the process at an error.

They find errors that the emulator misses: accesses past the end of a thread's local array, integer overflow.

    run(library, "plant", name...)      kernels of planted/overruns.cu with their bug
    run(library, "correct", name...)    the same kernels without their bug
    run(library, "ops", op...)          every kernel of all ops, or of these ops, at small shapes
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from paths import TEST_PATH

TARGET = "_cuda_emulated_sanitized"


def runtime() -> Path | None:
    """Path of libasan of the emulator's compiler, if it exists."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        return None
    found = subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    path = Path(found.stdout.strip())
    return path.resolve() if path.is_absolute() else None


def run(library: Path, *arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run this file in a process that loads AddressSanitizer first, as it requires."""
    preload = f"{runtime()} libstdc++.so.6"  # must be loaded when libasan looks for __cxa_throw
    options = {"ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0", "LD_PRELOAD": preload}
    path = os.pathsep.join(filter(None, [TEST_PATH, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, str(Path(__file__)), str(library), *arguments]
    environment = os.environ | options | {"PYTHONPATH": path}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=timeout)


def run_plants(library: Path, names: list[str], *, bug: bool) -> None:
    from emulator.device import Emulator, load

    import torch

    emulator = Emulator(load(library))
    for name in names:
        x, y = emulator.tensor(torch.zeros(64)), emulator.empty(64)
        emulator.module.planted.run_overrun(name, bug, x.data_ptr(), y.data_ptr())
        assert not y.isnan().any(), name


def run_ops(library: Path, names: list[str]) -> None:
    """Compute outputs and gradients of each op's cases, in each dtype and at the offsets from an aligned address below."""
    from calls import evaluate
    from cases import BUILDERS
    from emulator.device import Emulator, load
    from test_cuda_smoke import norm_case, norm_results, product_case, product_results

    import megalodon_ops as mo
    import torch
    from megalodon_ops import _C

    all_offsets = {torch.float32: (0, 1), torch.bfloat16: (0, 1), torch.float64: (0,), torch.float16: (1,)}  # elements
    emulator = Emulator(load(library))
    ran = set()
    call = emulator.call

    def record(name: str, *arguments, offset: int) -> None:
        ran.add(name)
        call(name, *arguments, offset=offset)

    emulator.call = record
    for op, options in small_cases():
        if names and op not in names:
            continue
        for dtype, offsets in all_offsets.items():
            for offset in offsets:
                with emulator.replacing(_C, offset=offset):
                    results = evaluate(getattr(mo, op), BUILDERS[op](dtype=dtype, **options))
                assert all(r.isfinite().all() for name, r in results.items() if "state" not in name), (op, options)
    for dtype, offsets in all_offsets.items():  # functions that have no case among OPS
        for offset in offsets if not names else ():
            with emulator.replacing(_C, offset=offset):
                results = norm_results(norm_case(9, 40, dtype)) | product_results(product_case(5, 40, 70, dtype))
            assert all(r.isfinite().all() for r in results.values()), dtype
    missing = set() if names else set(emulator.bindings) - ran
    assert not missing, f"no case runs {sorted(missing)}"
    print("ran", *sorted(ran))


def small_cases() -> list[tuple[str, dict]]:
    """Small sizes of every op with CUDA kernels."""
    from cases import OPS

    return [(name, sizes) for name, op in OPS.items() if op.cuda for sizes in op.cuda.sanitized]


if __name__ == "__main__":
    os.environ.pop("LD_PRELOAD", None)  # not for child processes
    library, command, *names = sys.argv[1:]
    if command == "ops":
        run_ops(Path(library), names)
    else:
        run_plants(Path(library), names, bug=command == "plant")
