"""Drivers that run the CUDA kernels; messages of `info` and of failed launches; kernels that a call loads."""

import contextlib
import ctypes.util
import os
import re
import shutil
import subprocess
import types

import pytest
import torch
from calls import OPS, evaluate
from cases import BUILDERS
from paths import TEST_PATH
from programs import run_python
from backends import needs_cuda_kernels

import megalodon_ops as mo
from megalodon_ops import _C
from megalodon_ops.ops.common import definition as library
from megalodon_ops.cli import info
from megalodon_ops.ops.common.cuda_driver import compile_note, driver_problem, launch_problem, text

TOO_OLD = (
    "the driver supports CUDA 12.8, the kernels were built with CUDA 13.0; update the driver to 580 or newer, or install "
    "from source with an nvcc of CUDA 12 in CUDACXX"
)
TOO_NEW = (
    "the driver supports CUDA 13.0, the kernels were built with CUDA 14.1; update the driver to one of CUDA 14, or install "
    "from source with an nvcc of CUDA 13 in CUDACXX"
)
FAR_TOO_OLD = "the driver supports CUDA 10.2, the kernels were built with CUDA 12.9; update the driver to 525 or newer"
OTHER_CARD = (
    "the kernels were built for 90, the GPU is 8.0; install again with -C cmake.define.MEGALODON_OPS_ARCHITECTURES=80"
)
NO_PTX = (
    "the driver supports CUDA 13.0 and compiles no PTX of CUDA 13.1; update the driver, or install again with -C "
    "cmake.define.MEGALODON_OPS_ARCHITECTURES=80"
)
NO_DRIVER = "no driver; the kernels were built with CUDA 13.0, install driver 580 or newer"


@pytest.mark.parametrize(
    ("driver", "runtime", "problem"),
    [
        (12080, 13000, TOO_OLD),
        (0, 13000, NO_DRIVER),
        (0, 12040, "no driver; the kernels were built with CUDA 12.4, install driver 525 or newer"),
        (13000, 14010, TOO_NEW),
        (10020, 12090, FAR_TOO_OLD),
        (13000, 13000, None),
        (13000, 13010, None),  # machine code of a newer minor version runs
        (13000, 12080, None),
    ],
)
def test_a_driver_runs_kernels_of_its_major_version_and_older_ones(driver, runtime, problem):
    assert driver_problem(driver, runtime) == problem


@pytest.mark.parametrize(
    ("message", "driver", "runtime", "problem"),
    [
        ("kernel: CUDA driver version is insufficient for CUDA runtime version", 12080, 13000, TOO_OLD),
        ("kernel: no kernel image is available for execution on the device", 13000, 13000, OTHER_CARD),
        ("kernel: invalid device function", 13000, 13000, OTHER_CARD),
        ("kernel: the provided PTX was compiled with an unsupported toolchain.", 13000, 13010, NO_PTX),
        ("kernel: an illegal memory access was encountered", 13000, 13000, None),
    ],
)
def test_the_cause_of_a_failed_launch(message, driver, runtime, problem):
    assert launch_problem(message, driver, runtime, "90", (8, 0)) == problem


def fake_kernels(error: str, driver: int, runtime: int, architectures: str = "90") -> types.SimpleNamespace:
    def kernel(*arguments):
        raise RuntimeError(error)

    return types.SimpleNamespace(
        kernel=kernel,
        build_info=lambda: {"compiler": "nvcc 13.0", "architectures": architectures},
        cuda_versions=lambda: (driver, runtime),
    )


@pytest.fixture
def no_device(monkeypatch):
    """Replace the functions of torch.cuda that a launch calls."""
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))


def launch():
    library._launch_cuda("kernel", (types.SimpleNamespace(device=torch.device("cuda:0")),))


def test_a_launch_names_the_driver_that_is_too_old(monkeypatch, no_device):
    error = "kernel: CUDA driver version is insufficient for CUDA runtime version"
    monkeypatch.setattr(library, "cuda_extension", lambda: fake_kernels(error, 12080, 13000))
    with pytest.raises(RuntimeError) as raised:
        launch()
    assert str(raised.value) == f"{error}: {TOO_OLD}."


def test_errors_with_another_cause_are_not_changed(monkeypatch, no_device):
    monkeypatch.setattr(library, "cuda_extension", lambda: fake_kernels("kernel: out of memory", 13000, 13000))
    with pytest.raises(RuntimeError, match=r"^kernel: out of memory$"):
        launch()


@pytest.mark.parametrize(
    ("driver", "line"), [(0, NO_DRIVER), (12080, TOO_OLD), (13010, "supports CUDA 13.1, enough for the kernels' 13.0")]
)
def test_info_compares_driver_and_kernels(monkeypatch, driver, line):
    monkeypatch.setattr(library, "has_cuda_kernels", lambda: True)
    monkeypatch.setattr(library, "cuda_extension", lambda: fake_kernels("", driver, 13000))
    facts = info.facts()
    assert facts["CUDA kernels"] == "nvcc 13.0 for 90"
    assert facts["NVIDIA driver"] == line


JIT = (
    "no machine code for compute capability 9.0: the driver compiles PTX of sm_80 at the first launch, in about half a "
    "minute; or install again with -C cmake.define.MEGALODON_OPS_ARCHITECTURES=90"
)
NO_CODE = "no code for compute capability {}; install again with -C cmake.define.MEGALODON_OPS_ARCHITECTURES={}"


@pytest.mark.parametrize(
    ("built", "capability", "note"),
    [
        ("80", (9, 0), JIT),
        ("80", (8, 9), None),
        ("80, 90-real", (9, 0), None),
        ("80-real, 90", (8, 0), None),
        ("90", (8, 0), NO_CODE.format("8.0", 80)),
        ("90-real", (10, 0), NO_CODE.format("10.0", 100)),
    ],
)
def test_a_build_without_machine_code_for_the_card(built, capability, note):
    assert compile_note(built, capability) == note


def test_info_says_that_the_driver_will_compile(monkeypatch):
    monkeypatch.setattr(library, "has_cuda_kernels", lambda: True)
    monkeypatch.setattr(library, "cuda_extension", lambda: fake_kernels("", 13000, 13000, architectures="80"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: (9, 0))
    assert info.facts()["CUDA kernels"] == f"nvcc 13.0 for 80; {JIT}"


def test_info_without_cuda_kernels(monkeypatch):
    monkeypatch.setattr(library, "has_cuda_kernels", lambda: False)
    facts = info.facts()
    assert facts["CUDA kernels"].startswith("not in this build") and "NVIDIA driver" not in facts


@needs_cuda_kernels
def test_versions_of_this_build():
    driver, runtime = library.cuda_extension().cuda_versions()
    major, minor = map(int, library.cuda_extension().build_info()["compiler"].removeprefix("nvcc ").split(".")[:2])
    assert runtime // 10 == major * 100 + minor
    assert (driver == 0) == (ctypes.util.find_library("cuda") is None)


# A driver with a version only, which prints a line when a runtime initialises it. It has no device, so that a runtime
# that accepts it fails later, for another reason.
DRIVER = """
#include <stdio.h>
#include <stdlib.h>
int cuDriverGetVersion(int* version) { *version = atoi(getenv("DRIVER_VERSION")); return 0; }
int cuInit(unsigned flags) { (void)flags; puts("initialised"); fflush(stdout); return 100; }
"""
DRIVERS = (10020, 11080, 12000, 12080, 12090, 13000)

# One process per driver, as a process asks for the version only once. The arguments are those of normalized_qk_fwd: z,
# gamma, beta, num_heads, chunk_size, eps, rotary, position, spans; results q and k.
LAUNCHES = f"""
import contextlib, os, types, torch
from emulator.device import DeviceTensor
from megalodon_ops.cli import info
from megalodon_ops.ops.common import definition as library

torch.cuda.device = lambda device: contextlib.nullcontext()
torch.cuda.current_stream = lambda device: types.SimpleNamespace(cuda_stream=0)
torch.cuda.get_device_capability = lambda device: (9, 0)
torch.cuda.device_count = lambda: 0  # the runtime of a torch with CUDA would initialise the driver, too
arguments = [torch.zeros(1, 4, 6), torch.zeros(2, 6), torch.zeros(2, 6), 1, 4, 1e-5, torch.zeros(4, 3, 2)]
arguments += [None, None, torch.zeros(1, 4, 1, 6), torch.zeros(1, 4, 1, 6)]
arguments = [DeviceTensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
arguments[0].device = torch.device("cuda:0")
for version in {DRIVERS}:
    if os.fork():
        os.wait()
        continue
    os.environ["DRIVER_VERSION"] = str(version)
    print(version, flush=True)
    try:
        library._launch_cuda("normalized_qk_fwd", arguments)
    except RuntimeError as error:
        print(error, info._cuda()["NVIDIA driver"], sep="\\n", flush=True)
    os._exit(0)
"""


@needs_cuda_kernels
def test_the_runtime_in_the_kernels_refuses_drivers_of_older_major_versions(tmp_path):
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        pytest.skip("there is no C compiler")
    (tmp_path / "driver.c").write_text(DRIVER)
    subprocess.run([compiler, "-shared", "-fPIC", "driver.c", "-o", "libcuda.so.1"], cwd=tmp_path, check=True)
    ran = run_python(LAUNCHES, LD_LIBRARY_PATH=str(tmp_path), PYTHONPATH=TEST_PATH)

    _, runtime = library.cuda_extension().cuda_versions()
    refused = "CUDA driver version is insufficient for CUDA runtime version"
    accepted = "no CUDA-capable device is detected"
    expected = []
    for driver in DRIVERS:
        if problem := driver_problem(driver, runtime):
            expected += [f"{driver}", f"{refused}: {problem}.", problem]
        else:
            enough = f"supports CUDA {text(driver)}, enough for the kernels' {text(runtime)}"
            expected += [f"{driver}", "initialised", accepted, enough]
    assert re.sub(r"(?m)^cuda:0: ", "", ran.stdout).splitlines() == expected, ran.stderr


def test_values_do_not_choose_kernels(emulator):
    """One call before a capture loads every kernel that the graph needs, whatever the lengths and numbers."""
    for op in (op for op in OPS if op != "adaptive_working_memory"):  # composed of torch's products
        launched = []
        for seed, lengths in enumerate(([9, 0], [20, 20])):
            emulator.reset()
            with emulator.replacing(_C):
                evaluate(getattr(mo, op), BUILDERS[op](B=2, L=20, lengths=lengths, seed=seed))
            launched.append(emulator.launched())
        assert launched[0] == launched[1] and launched[0], op


def test_cublas_may_be_deterministic():
    """Without the variable, torch refuses cuBLAS in the tests that forbid other kinds of sums."""
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] in (":4096:8", ":16:8")
