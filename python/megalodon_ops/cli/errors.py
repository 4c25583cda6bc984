"""The one exception that ends a command with one line and exit code 2."""

from megalodon_ops.errors import UserFault


class CommandError(UserFault):
    """Something the person at the keyboard can put right: a missing file, a bad value, a checkpoint of another run."""
