"""Errors about a missing package name the pip command that installs it."""

import importlib.metadata
import json

import pytest

from megalodon_ops import extras


class Installed:
    def __init__(self, origin):
        self.origin = origin

    def read_text(self, name):
        return self.origin if name == "direct_url.json" else None


@pytest.mark.parametrize(
    ("origin", "named"),
    [
        (None, "megalodon_ops"),
        (json.dumps({"url": "file:///home/me/my%20code", "dir_info": {}}), "/home/me/my code"),
        (json.dumps({"url": "file:///home/me/megalodon.whl", "archive_info": {}}), "megalodon_ops"),
        ("{", "megalodon_ops"),
    ],
    ids=["from an index", "from a checkout", "from a wheel", "damaged"],
)
def test_the_error_for_a_missing_package_has_the_pip_command(monkeypatch, origin, named):
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Installed(origin))
    with pytest.raises(ModuleNotFoundError) as error:
        extras.load("no_such_package.part", "train")
    assert str(error.value) == f'needs no_such_package, which is not installed: pip install "{named}[train]"'
    assert error.value.name == "no_such_package"


def test_a_failed_import_inside_a_package_is_another_error(tmp_path, monkeypatch):
    (tmp_path / "half_a_package.py").write_text("import what_it_needs")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="what_it_needs"):
        extras.load("half_a_package", "train")
