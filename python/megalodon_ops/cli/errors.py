"""The one exception that ends a command with one line and exit code 2."""


class CommandError(Exception):
    """An error that the user can fix: a missing file, a bad value, a checkpoint of another run."""
