"""Faults of files, for whoever reads or writes them, and of processes that work together."""


class FileError(ValueError):
    """A file or folder that cannot be used as it is; the message is one line and names it."""


class UserFault(Exception):
    """Something that a person can put right; the message is one line."""


class TeamError(UserFault):
    """A fault of one process of several, raised in all of them; the message names the process."""


class TeamLost(UserFault):
    """Another process of several has ended, or does not answer."""
