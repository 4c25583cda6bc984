"""Import packages of the extras where they are needed."""

import importlib
import importlib.metadata
import json
from types import ModuleType
from urllib.parse import unquote, urlsplit


def load(module: str, extra: str) -> ModuleType:
    """Import a module. If it is missing, the ModuleNotFoundError names the extra of this package that installs it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if (error.name or "").partition(".")[0] != package:
            raise
        raise ModuleNotFoundError(missing(package, extra), name=package) from error


def missing(package: str, extra: str) -> str:
    """Error text for a missing package that the extra installs."""
    return f'needs {package}, which is not installed: pip install "{_origin()}[{extra}]"'


def _origin() -> str:
    """Source from which pip installed this package: a folder, or the package's name."""
    try:
        origin = json.loads(importlib.metadata.distribution("megalodon_ops").read_text("direct_url.json") or "{}")
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return "megalodon_ops"
    return unquote(urlsplit(origin["url"]).path) if "dir_info" in origin else "megalodon_ops"
