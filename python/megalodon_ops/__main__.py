"""`python -m megalodon_ops`, the command line. It starts Python a second time where the script `megalodon-ops` does not.

`python -m` imports the package, and so torch, before this file can set the variables that torch reads when it is loaded.
If one must change, the process starts itself once more, which costs the import of torch.
"""

import os
import sys

import megalodon_ops_startup

if megalodon_ops_startup.prepare():
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])

from megalodon_ops.cli import process  # noqa: E402

process()
