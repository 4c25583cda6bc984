"""`python -m megalodon_ops`, the command line.

Torch reads some environment variables when it is loaded, and `python -m` loads torch with the package, before this file
runs. If a variable must change, this process sets it and starts Python again in its place.
"""

import os
import sys

import megalodon_ops_startup

if megalodon_ops_startup.prepare():
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])

from megalodon_ops.cli import process  # noqa: E402

process()
