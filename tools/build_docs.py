"""Build the pages into build/docs; a warning is an error. Needs `pip install ".[docs]"`.

python tools/build_docs.py [folder]
"""

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent


def build(folder: Path) -> int:
    """Run Sphinx and return its exit status."""
    options = ["-W", "--keep-going", "-q", "-E", "-b", "html", "-d", f"{folder}.doctrees", "-c", "docs"]
    return subprocess.run([sys.executable, "-m", "sphinx", *options, ".", str(folder)], cwd=REPOSITORY).returncode


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else REPOSITORY / "build" / "docs").resolve()
    status = build(target)
    if status == 0:
        print(f"{target}/index.html")
    sys.exit(status)
