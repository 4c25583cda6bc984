"""The build: choice of nvcc and architectures by CMake, dispatch of instruction sets, wheels, releases."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pybind11
import pytest
from paths import ROOT, load_module

from megalodon_ops.ops.common import cuda_driver

ARCHITECTURES = [75, 80, 86, 90, 100, 110, 120]  # of the fake nvcc


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def fake_nvcc(folder: Path, version: str, architectures: list[int] = ARCHITECTURES) -> Path:
    listed = "\n".join(f"echo compute_{a}" for a in architectures)
    release = ".".join(version.split(".")[:2])
    return program(
        folder / "nvcc",
        f"case $1 in\n--version) echo 'Cuda compilation tools, release {release}, V{version}' ;;\n"
        f"--list-gpu-arch) {listed or ':'} ;;\n*) echo 'a fake nvcc compiles nothing' >&2; exit 1 ;;\nesac",
    )


def fake_nvidia_smi(folder: Path, *capabilities: str) -> Path:
    return program(folder / "nvidia-smi", "\n".join(f"echo {c}" for c in capabilities) or "exit 9")


def cmake(*arguments, path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run CMake with the folder `path` first on the PATH."""
    variables = {k: v for k, v in os.environ.items() if k not in ("CUDACXX", "CUDAARCHS")}
    variables |= {"PATH": f"{path}{os.pathsep}{os.environ['PATH']}", **environment}
    command = [shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"), *map(str, arguments)]
    return subprocess.run(command, env=variables, capture_output=True, text=True)


def evaluate(code: str, folder: Path, **environment: str) -> str:
    """Output of a CMake script that includes cmake/cuda.cmake."""
    script = folder / "script.cmake"
    script.write_text(f"cmake_policy(VERSION 3.20)\ninclude({ROOT}/cmake/cuda.cmake)\n{code}")
    run = cmake("-P", script, path=folder / "bin", **environment)
    assert run.returncode == 0, run.stderr
    return run.stderr.strip()  # where message() writes


GPUS = {  # compute capabilities of a machine's cards: architectures of its kernels
    ("9.0",): "90",
    ("8.0", "8.0"): "80",
    ("8.9",): "86",  # the fake nvcc does not know 89
    ("12.0", "8.0"): "120;80",
    ("13.0",): "120",  # newer than nvcc: it compiles PTX
    ("7.5",): "80",  # the kernels do not run on it
    ("7.5", "9.0"): "90",
    (): "80",
}


def test_by_default_the_kernels_are_for_the_gpus_of_this_machine(tmp_path):
    fake_nvcc(tmp_path / "bin", "13.0.88")
    code = "find_nvcc(nvcc version)\n"
    for number, capabilities in enumerate(GPUS):
        folder = fake_nvidia_smi(tmp_path / f"machine{number}", *capabilities).parent
        code += (
            f'set(ENV{{PATH}} "{folder}:{os.environ["PATH"]}")\n'
            f'choose_architectures(chosen AUTO "${{nvcc}}" "${{version}}")\nmessage("{capabilities}: ${{chosen}}")\n'
        )
    assert evaluate(code, tmp_path).splitlines() == [f"{cards}: {chosen}" for cards, chosen in GPUS.items()]


def test_wheels_are_for_every_card(tmp_path):
    fake_nvidia_smi(tmp_path / "bin", "9.0")
    code = ""
    for wanted, version in (("all", "13.0.88"), ("all", "12.4.1"), ("90;120-real", "13.0.88")):
        code += f'choose_architectures(chosen "{wanted}" nvcc {version})\nmessage("${{chosen}}")\n'
    assert evaluate(code, tmp_path).splitlines() == ["80;90-real;100;120-real", "80;90-real", "90;120-real"]


def test_architectures_whose_ptx_is_the_same_share_it(tmp_path):
    lists = {
        "80;90-real;100;120-real": ("80,code=[sm_80,compute_80,sm_90]", "100,code=[sm_100,compute_100,sm_120]"),
        "90;86": ("80,code=[sm_90,compute_80,sm_86]",),
        "120-real": ("100,code=[sm_120]",),
    }
    code = "".join(f'flags_of_architectures(flags "{chosen}")\nmessage("${{flags}}")\n' for chosen in lists)
    wanted = [";".join(f"--generate-code=arch=compute_{flag}" for flag in flags) for flags in lists.values()]
    assert evaluate(code, tmp_path).splitlines() == wanted


def test_the_version_of_nvcc_is_read(tmp_path):
    """nvcc is on the PATH, unless CUDACXX names another one."""
    other = fake_nvcc(tmp_path / "other", "9.1.85")
    code, wanted = "", []
    for version in ("13.0.88", "11.5.119", "8.0"):
        nvcc = fake_nvcc(tmp_path / version, version)
        for named, found in (("", f"{nvcc} {version}"), (other, f"{other} 9.1.85")):
            code += f'set(ENV{{CUDACXX}} "{named}")\nset(ENV{{PATH}} "{nvcc.parent}:{os.environ["PATH"]}")\n'
            code += 'find_nvcc(nvcc version)\nmessage("${nvcc} ${version}")\n'
            wanted.append(found)
    assert evaluate(code, tmp_path).splitlines() == wanted


def configure(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    found = [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    arguments = ["-S", ROOT, "-B", folder / "build", "-DSKBUILD_PROJECT_VERSION=0", *found, *options]
    return cmake(*arguments, path=folder / "bin")


def test_cuda_is_left_out_if_nvcc_is_old_or_broken(tmp_path):
    fake_nvcc(tmp_path / "bin", "11.5.119")
    run = configure(tmp_path)
    assert run.returncode == 0, run.stderr
    words = "CUDA kernels: not built (nvcc is 11.5.119, and 11.8 or newer is needed: on the PATH or in CUDACXX)"
    assert words in run.stdout
    run = configure(tmp_path, "-DMEGALODON_OPS_CUDA=ON")
    assert run.returncode != 0
    assert "CUDA kernels: nvcc is 11.5.119, and 11.8 or newer is needed" in " ".join(run.stderr.split())
    fake_nvcc(tmp_path / "bin", "13.0.88")
    run = configure(tmp_path, "-DMEGALODON_OPS_CUDA=AUTO")
    assert run.returncode == 0, run.stderr
    assert "CUDA kernels: not built (MEGALODON_OPS_CUDA=AUTO" in run.stdout


VERSION = "from typing import Optional\n__version__ = '2.13.0'\ndebug = False\ncuda: Optional[str] = {}\nhip: Optional[str] = None\n"


def test_a_warning_for_an_nvcc_newer_than_torchs_cuda(tmp_path):
    code = ""
    built_for = ["'12.8'", "'13.0'", "'13.2'", "None", None]  # "None": without CUDA; None: torch is not installed
    for number, cuda in enumerate(built_for):
        folder = tmp_path / str(number)
        if cuda is not None:
            (folder / "torch").mkdir(parents=True)
            (folder / "torch" / "version.py").write_text(VERSION.format(cuda))
        code += f'message("torch of CUDA {cuda}:")\ncompare_with_torch("13.0.88" "{folder}")\n'
    output = " ".join(evaluate(code, tmp_path).split())
    first, *others = re.split(r"torch of CUDA (?:'[\d.]+'|None):", output)[1:]
    assert "need an NVIDIA driver that supports CUDA 13. torch is built for CUDA 12.8" in first
    assert len(others) == len(built_for) - 1 and not "".join(others).strip()


DISPATCH = """
#include <cstdio>
#include "isa.h"
namespace megalodon {
Isa active_isa{};
struct Params { DType dtype; };
MEGALODON_CPU_KERNEL(everywhere, Params)
MEGALODON_CPU_KERNEL(some, Params)
#define DEFINE(isa, name) namespace isa { void name(const Params&) { std::printf(" %s", #isa); } }
DEFINE(v2, everywhere) DEFINE(v3, everywhere) DEFINE(v4, everywhere) DEFINE(v4_bf16, everywhere) DEFINE(v4_amx, everywhere)
DEFINE(v2, some) DEFINE(v4, some) DEFINE(v4_bf16, some)
}
int main() {
  using namespace megalodon;
  const DType dtypes[] = {DType::f32, DType::bf16};
  for (int i = 0; i < 7; ++i) {
    active_isa = static_cast<Isa>(i);
    for (const DType dtype : dtypes) {
      launch_everywhere({dtype});
      launch_some({dtype});
    }
    std::puts("");
  }
}
"""
needs_x86 = pytest.mark.skipif("x86_64" not in sysconfig.get_platform(), reason="the names are those of x86-64")


def compile_and_link(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    (folder / "dispatch.cpp").write_text(code)
    compiler = os.environ.get("CXX", "g++")
    flags = ["-std=c++17", "-fPIC", "-pie", f"-I{ROOT / 'cpp' / 'common'}"]
    command = [compiler, *flags, "dispatch.cpp", "-o", "dispatch"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@needs_x86
def test_a_kernel_runs_in_its_best_instruction_set_up_to_the_active_one(tmp_path):
    compiled = compile_and_link(tmp_path, DISPATCH)
    assert compiled.returncode == 0, compiled.stderr
    lines = subprocess.run([tmp_path / "dispatch"], capture_output=True, text=True, check=True).stdout.splitlines()
    # A line for each active set; columns: `everywhere` and `some` with float32, then with bfloat16.
    assert lines == [
        " v2 v2 v2 v2",
        " v3 v2 v3 v2",
        " v3 v2 v3 v2",
        " v4 v4 v4 v4",
        " v4 v4 v4 v4",
        " v4 v4 v4_bf16 v4_bf16",
        " v4 v4 v4_amx v4_bf16",
    ]


@needs_x86
def test_a_kernel_that_the_lowest_instruction_set_lacks_does_not_link(tmp_path):
    linked = compile_and_link(tmp_path, DISPATCH.replace("DEFINE(v2, some) ", ""))
    assert linked.returncode != 0 and "megalodon::v2::some" in linked.stderr


def tool(name: str) -> ModuleType:
    """A program in tools/, as a module."""
    return load_module(ROOT / "tools" / f"{name}.py")


@needs_x86
def test_a_wheel_with_avx_outside_of_kernels_is_refused(tmp_path):
    build_wheel = tool("build_wheel")
    (tmp_path / "doubles.cpp").write_text("void f(float* x) { for (int i = 0; i < 64; ++i) x[i] *= 2; }")

    def compiled(name: str, *flags: str) -> None:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        command = [os.environ.get("CXX", "g++"), "-O3", *flags, "-c", "doubles.cpp", "-o", name]
        subprocess.run(command, cwd=tmp_path, check=True)

    compiled("kernels_v2.dir/doubles.o")
    with pytest.raises(AssertionError, match="must have kernels with AVX"):
        build_wheel.check_instructions(tmp_path)
    compiled("kernels_v3.dir/doubles.o", "-mavx2")
    build_wheel.check_instructions(tmp_path)
    compiled("_C.dir/doubles.o", "-mavx2")
    with pytest.raises(AssertionError, match=r"AVX outside of the kernels for it.*_C\.dir/doubles\.o"):
        build_wheel.check_instructions(tmp_path)


def test_the_table_of_wheels_agrees_with_the_build(tmp_path):
    names = ("pyproject.toml", "CMakeLists.txt", "tools/install_nvcc.sh", "docs/start.md")
    project, build, installer, page = ((ROOT / name).read_text() for name in names)
    (image,) = set(re.findall(r'manylinux-\w+-image = "manylinux_(\w+)"', project))
    x86, arm, *_ = re.findall(r"set\(isas ([\w ]+)\)", build)
    nvcc = re.search(r"NVCC_VERSION:-([\d.]+)", installer)[1]
    chosen = evaluate(f'choose_architectures(chosen all nvcc {nvcc})\nmessage("${{chosen}}")', tmp_path)
    architectures = [name.removesuffix("-real") for name in chosen.split(";")]
    with_ptx = [name for name in chosen.split(";") if name.isdigit()]
    minors = re.findall(r"cp3(\d+)-", project)
    assert re.findall(r'"Programming Language :: Python :: 3\.(\d+)"', project) == minors
    rows = {
        "kernels for CPUs, x86-64": ", ".join(x86.split()),
        "kernels for CPUs, Arm": ", ".join(arm.split()),
        "Python": "CPython " + ", ".join(f"3.{minor}" for minor in minors),
        "PyTorch": re.search(r'"torch>=([\d.]+)"', project)[1] + " or newer, for CPUs or for any CUDA",
        "glibc": image.replace("_", ".") + " or newer",
        "kernels for GPUs, compiled by": f"nvcc {nvcc}",
        "NVIDIA driver, if there is a GPU": f"{cuda_driver._FIRST_DRIVERS[int(nvcc.split('.')[0])]} or newer",
        "machine code for GPUs": ", ".join(f"sm_{name}" for name in architectures),
        "PTX for other GPUs": ", ".join(f"compute_{name}" for name in with_ptx),
        "size": f"at most {tool('build_wheel').LARGEST_CUDA // 10**6} MB",
    }
    lines = [f"| wheel | `manylinux_{image}_x86_64`, `manylinux_{image}_aarch64` |"]
    lines += [f"| {name} | {value} |" for name, value in rows.items()]
    assert [line for line in lines if line not in page] == []


def test_a_release_links_to_the_repository(tmp_path):
    """Relative links of the README become links to files of the commit; nothing else changes."""
    shutil.copy(ROOT / "README.md", tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for name in ("docs", "bench"):
        (tmp_path / name).symlink_to(ROOT / name)
    url = "https://example.org/someone/megalodon_ops"
    tool("name_repository").name_repository(tmp_path, url, "abc123")
    before, after = (ROOT / "README.md").read_text(), (tmp_path / "README.md").read_text()
    relative = re.findall(r"\]\((?!https?:|#)([^)]+)\)", before)
    assert len(relative) > 10 and not re.findall(r"\]\((?!https?:|#)([^)]+)\)", after)
    for kind in ("raw", "tree", "blob"):
        after = after.replace(f"({url}/{kind}/abc123/", "(")
    assert after == before
    assert re.search(rf"!\[[^\]]*\]\({url}/raw/abc123/docs/pictures/\w+\.svg\)", (tmp_path / "README.md").read_text())
    assert f'[project.urls]\nRepository = "{url}"\n' in (tmp_path / "pyproject.toml").read_text()
