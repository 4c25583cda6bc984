"""Test the installed package: run the tests that need no checkout, outside of one.

    python tools/test_installed.py

Skips tests that read or compile sources, those of benches and pages, and CUDA kernels in the emulator.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHECKOUT_TESTS = (
    "test_bench*",
    "test_build.py",
    "test_claims*",
    "test_cuda*",
    "test_docs.py",
    "test_mutants.py",
    "test_readme.py",
)

OPENMP_RUNTIMES = """
import torch, megalodon_ops
torch.ones(1 << 20).add(1), megalodon_ops.timestep_norm(torch.ones(1, 64, 64), *torch.zeros(2, 64), num_groups=8)
print(open("/proc/self/maps").read())
"""


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        check_openmp(folder)
        skipped = shutil.ignore_patterns(*CHECKOUT_TESTS, "__pycache__")
        shutil.copytree(ROOT / "tests", Path(folder, "tests"), ignore=skipped)
        for name in ("bench", "docs", "pyproject.toml"):  # read by tests; pytest reads its options from the last
            Path(folder, name).symlink_to(ROOT / name)
        return python(folder, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-k", "not emulated").returncode


def check_openmp(folder: str) -> None:
    """Raise unless a process has exactly one OpenMP runtime: a second one would have its own threads."""
    if sys.platform != "linux":
        return  # elsewhere LLVM's OpenMP itself aborts if it is loaded twice
    maps = python(folder, "-c", OPENMP_RUNTIMES, check=True, stdout=subprocess.PIPE, text=True).stdout
    found = set(re.findall(r"\S+/lib[gi]omp\S*", maps))
    assert len(found) == 1, f"a process must have one OpenMP runtime, got {found or 'none'}"
    print("OpenMP:", *found, flush=True)


def python(folder: str, *arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PYTHONPATH": "", "PYTHONSAFEPATH": "1"}  # no package but the installed one
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=folder, env=variables, **options)


if __name__ == "__main__":
    sys.exit(main())
