"""Packages of the extras, which the bare package does without: loaded where they are needed, by name."""

from __future__ import annotations

import importlib
from types import ModuleType


def load(module: str, extra: str) -> ModuleType:
    """The module, or a ModuleNotFoundError that says which extra of this package brings it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if (error.name or "").partition(".")[0] != package:
            raise
        message = f'needs {package}, which is not installed: pip install "megalodon_ops[{extra}]"'
        raise ModuleNotFoundError(message, name=package) from error
