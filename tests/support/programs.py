"""Programs that tests run in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path


def run_python(code: str, *arguments: object, folder: Path | None = None, **environment: str | None):
    """Run code in a folder with these arguments and environment variables; None removes a variable."""
    environment = {name: value for name, value in (os.environ | environment).items() if value is not None}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    options = dict(cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    return subprocess.run(command, **options)
