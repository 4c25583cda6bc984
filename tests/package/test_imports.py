"""Files import each other in one direction, in functions and under TYPE_CHECKING too."""

import ast
import re
import sys
from collections import Counter
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from paths import ROOT, TESTS

import megalodon_ops

ROOMS = [
    line.split()
    for line in """
        megalodon_ops.__main__
        megalodon_ops.cli
        megalodon_ops.training megalodon_ops.evaluation megalodon_ops.forecasting megalodon_ops.hf
        megalodon_ops.distributed megalodon_ops.tokenizers
        megalodon_ops
        megalodon_ops.public
        megalodon_ops.public_models
        megalodon_ops.storage
        megalodon_ops.inference
        megalodon_ops.model
        megalodon_ops.reference
        megalodon_ops.ops
        megalodon_ops.ops.common
        megalodon_ops.extras megalodon_ops.torchrun megalodon_ops._C megalodon_ops_startup
    """.strip().splitlines()
]
"""Packages by level: each imports from itself and from lower levels."""
PLAIN = {f"megalodon_ops.ops.common.{name}" for name in ("checks", "philox", "quantized_rows", "spans", "states")}
"""Modules without kernels, which references may import"""
READERS = {"megalodon_ops.public", "megalodon_ops.storage.onnx_export"}
"""Modules that import a reference: its name is public, and a program in ONNX is made from it"""

Imports = dict[str, set[str]]


def imported(source: str, module: str, is_package: bool = False) -> Iterator[tuple[str, str]]:
    """(module, name) of every import in a file; the name is empty where the module itself is imported."""
    statements: list[ast.AST] = [ast.parse(source)]
    while statements:
        statement = statements.pop()
        for part in ("body", "orelse", "finalbody", "handlers", "cases"):
            statements += getattr(statement, part, ())
        if isinstance(statement, ast.Import):
            yield from ((alias.name, "") for alias in statement.names)
        elif isinstance(statement, ast.ImportFrom):
            package = module.split(".")[: None if is_package else -1]
            above = package[: len(package) + 1 - statement.level] if statement.level else []
            origin = ".".join([*above, *filter(None, [statement.module])])
            yield from ((origin, alias.name) for alias in statement.names)


def read_imports(folder: Path) -> tuple[Imports, Imports]:
    """Imports of each module of the packages in a folder: modules in that folder, and other packages."""
    paths = {}
    for path in sorted(folder.glob("megalodon_ops*/**/*.py*")):
        if path.suffix in (".py", ".pyi"):
            module = ".".join(path.relative_to(folder).with_suffix("").parts)
            paths[module.removesuffix(".__init__")] = path
    inside: Imports = {module: set() for module in paths}
    outside: Imports = {module: set() for module in paths}
    for module, path in paths.items():
        for origin, name in imported(path.read_text(), module, path.stem == "__init__"):
            if (full := f"{origin}.{name}") in paths or (full := origin) in paths:
                inside[module].add(full)
            else:
                outside[module].add(origin.partition(".")[0])
    return inside, outside


def room(module: str) -> str:
    return max((name for line in ROOMS for name in line if f"{module}.".startswith(f"{name}.")), key=len)


def is_reference(module: str) -> bool:
    return "reference" in module.rpartition(".")[2]


def faults(folder: Path) -> Iterator[str]:
    """Describe wrong imports of the packages in a folder."""
    inside, outside = read_imports(folder)
    try:
        TopologicalSorter(inside).prepare()
    except CycleError as error:
        yield f"circle: {' <- '.join(error.args[1])}"
    depth = {name: number for number, names in enumerate(ROOMS) for name in names}
    for module, others in inside.items():
        if room(module) == "megalodon_ops" != module:
            yield f"no room: {module}"
        is_plain = is_reference(module) or module in PLAIN
        for other in sorted(others):
            here, there = room(module), room(other)
            if here != there and depth[here] >= depth[there]:
                yield f"upwards: {module} -> {other}"
            if is_plain and not (is_reference(other) or other in PLAIN):
                yield f"reference with kernels: {module} -> {other}"
            if is_reference(other) and not is_reference(module) and module not in READERS:
                yield f"reference at run time: {module} -> {other}"
        if is_plain and (others := outside[module] - {"torch"} - sys.stdlib_module_names):
            yield f"reference with packages: {module} -> {', '.join(others)}"
    names = Counter(path.name for path in folder.glob("megalodon_ops/**/*.py"))
    yield from (f"one name: {name}" for name, count in names.items() if count > 1 and name != "__init__.py")


def test_imports_run_downwards_without_circles():
    assert [*faults(Path(megalodon_ops.__file__).parents[1])] == []


@pytest.mark.parametrize(
    ("module", "line", "fault"),
    [
        ("model.blocks", "def f():\n    from .inputs import embed", "circle"),
        ("model.blocks", "if TYPE_CHECKING:\n    from . import inputs", "circle"),
        ("model.blocks", "from ..inference import decoder", "upwards"),
        ("inference.decoder", "from ..storage import folder", "upwards"),
        ("model.blocks", "try:\n    pass\nexcept E:\n    import megalodon_ops.cli", "upwards"),
        ("ops.common.definition", "from ..cema import cema", "upwards"),
        ("hf.cache", "from ..evaluation import losses", "upwards"),
        ("model.blocks", "from .. import reference", "reference at run time"),
        ("ops.cema.cema", "from .cema_reference import cema", "reference at run time"),
        ("ops.cema.cema_reference", "from .cema import cema", "reference with kernels"),
        ("ops.common.states", "from .definition import call", "reference with kernels"),
        ("ops.cema.cema_reference", "import numpy", "reference with packages"),
        ("cli.cache", "", "one name"),
        ("utils", "", "no room"),
    ],
)
def test_a_fault_is_found(tmp_path, module, line, fault):
    stems = ["ops.cema.cema", "ops.common.definition", "evaluation.losses", "hf.cache", "cli.data"]
    files = dict.fromkeys([*stems, "inference.decoder", "storage.folder"], "")
    files |= {"model.inputs": "from .blocks import MegalodonBlock", "model.blocks": "from ..ops.cema.cema import cema"}
    files |= {"ops.cema.cema_reference": "import math", "reference": "from .ops.cema import cema_reference"}
    for added in {}, {module: line}:
        assert [*faults(tmp_path)] == []
        for name, content in (files | added).items():
            path = tmp_path / "megalodon_ops" / f"{name.replace('.', '/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
            (path.parent / "__init__.py").touch()
    (found,) = faults(tmp_path)
    assert found.startswith(f"{fault}: ")


def test_the_model_is_the_paper_on_few_floors():
    """Files, decoders, samplers, ranks and clients stand above model/; whoever reads it finds the paper alone."""
    folder = Path(megalodon_ops.__file__).parent
    inside, outside = read_imports(folder.parent)
    known = {"collections", "dataclasses", "difflib", "functools", "math", "torch", "typing", "typing_extensions"}
    own = {module: others for module, others in inside.items() if room(module) == "megalodon_ops.model"}
    for module in own:
        assert outside[module] <= {"__future__", *known}, module
        file = folder / "model" / f"{module.rpartition('.')[2]}.py"
        words = r"torch\.(distributed|save|load|multinomial|cuda\.graph)|\bopen\("
        assert module.endswith(".model") or not re.search(words, file.read_text()), module

    def floor(module: str) -> int:
        return 1 + max((floor(other) for other in own[module] if other in own), default=0)

    assert max(map(floor, own)) <= 5


@pytest.mark.parametrize("folder", ["bench", "docs", "tools"])
def test_nothing_imports_from_tests(folder):
    helpers = {path.stem for room in ("support", "cuda") for path in (TESTS / room).iterdir()}
    for path in (ROOT / folder).rglob("*.py"):
        for origin, _ in imported(path.read_text(), ".".join(path.relative_to(ROOT).with_suffix("").parts)):
            assert origin.partition(".")[0] not in {"tests", *helpers}, path
