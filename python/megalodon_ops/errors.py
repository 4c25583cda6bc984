"""Faults of files, for whoever reads or writes them."""


class FileError(ValueError):
    """A file or folder that cannot be used as it is; the message is one line and names it."""
