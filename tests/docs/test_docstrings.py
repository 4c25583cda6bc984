"""The docstrings' examples run, and every public name has one."""

import doctest
import importlib
import inspect
import pkgutil

import pytest
import torch
from cases import OPS

import megalodon_ops as mo

MODULES = [
    info.name
    for info in pkgutil.walk_packages(mo.__path__, "megalodon_ops.")
    if not info.name.endswith(("_C", "__main__"))
]


@pytest.mark.parametrize("module", MODULES)
def test_examples_run(module):
    torch.manual_seed(0)
    try:
        loaded = importlib.import_module(module)
    except ImportError as error:
        missing = error.name in ("numpy", "safetensors", "tqdm", "matplotlib", "transformers")  # of extras
        if not missing and "requires PyTorch" not in str(error):  # the message of later versions of transformers
            raise
        pytest.skip(str(error))
    if module.startswith("megalodon_ops.distributed."):
        try:
            importlib.import_module("megalodon_ops.distributed.fsdp").check_torch()
        except ImportError as error:
            pytest.skip(str(error))
    failed, _ = doctest.testmod(loaded, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert failed == 0


@pytest.mark.parametrize("name", sorted({*mo.__all__} - {"reference", "load_official"}))  # needs files
def test_every_public_name_has_an_example(name):
    for package in [mo, *([mo.reference] if name in OPS else [])]:
        (found,) = doctest.DocTestFinder(recurse=False).find(getattr(package, name), name)
        assert found.examples, package.__name__


@pytest.mark.parametrize("name", OPS)
def test_reference_has_the_public_signature(name):
    def arguments(function):
        return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]

    assert arguments(getattr(mo, name)) == arguments(getattr(mo.reference, name))
