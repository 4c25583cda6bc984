"""Test the package as a new user gets it: with the newest Python of this machine and the newest torch of pip.

    python tools/test_newest.py FOLDER [PYTEST_ARGUMENT...]

FOLDER takes the environment, some GB with torch's libraries of CUDA, and is kept; a later call updates it. Runs the
default and the slow tier, or, if there are arguments, pytest with these. Run it before a release.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def newest_python() -> str:
    """Return the newest python3.N on the path of those that the package supports."""
    versions = re.findall(r'"Programming Language :: Python :: 3\.(\d+)"', (ROOT / "pyproject.toml").read_text())
    found = [shutil.which(f"python3.{version}") for version in sorted(map(int, versions), reverse=True)]
    return next(filter(None, found), sys.executable)


def main(folder: str, *arguments: str) -> int:
    python = Path(folder, "bin", "python").absolute()
    subprocess.run([newest_python(), "-m", "venv", folder], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--upgrade", "torch", "pip"], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", f"{ROOT}[test,docs]"], check=True)
    subprocess.run([python, "-m", "megalodon_ops", "info"], check=True)
    tiers = [arguments] if arguments else [("-m", "not slow"), ("-m", "slow")]
    return max(subprocess.run([python, "-m", "pytest", *tier], cwd=ROOT).returncode for tier in tiers)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
