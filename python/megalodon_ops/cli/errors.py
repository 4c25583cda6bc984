"""The one exception that ends a command with one line and exit code 2."""


class CommandError(Exception):
    """Something the person at the keyboard can put right: a missing file, a bad value, a checkpoint of another run."""
