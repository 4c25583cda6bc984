"""Programs that tests run in processes of their own."""

import os
import subprocess
import sys


def run_python(code: str, *arguments: object, **environment: str | None) -> subprocess.CompletedProcess:
    """Run code with these arguments and environment variables; None removes a variable."""
    environment = {name: value for name, value in (os.environ | environment).items() if value is not None}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], env=environment, capture_output=True, text=True
    )
