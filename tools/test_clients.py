"""Run the tests that transformers and PEFT have for models, and short programs of others, on every class of ours.

    python tools/test_clients.py [options of pytest that select cases, such as -k test_sft]

Needs `pip install -r tools/clients/requirements.txt` and a package index: source distributions hold the tests of the
installed versions. clients/exceptions.tsv names the cases that fail, with reasons. It is an error if another case fails,
if one of these passes, or, without options, if none fails for a line.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from importlib.metadata import version
from pathlib import Path

CLIENTS = Path(__file__).resolve().parent / "clients"
VARIABLES = dict(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive")
# The lists of models in PEFT's tests, and how the names of the classes end that are tested instead.
PEFT_LISTS = {
    "PEFT_DECODER_MODELS_TO_TEST": "ForCausalLM",
    "SMALL_GRID_MODELS": "ForCausalLM",
    "PEFT_SEQ_CLS_MODELS_TO_TEST": "ForSequenceClassification",
    "PEFT_TOKEN_CLS_MODELS_TO_TEST": "ForTokenClassification",
    "PEFT_FEATURE_EXTRACTION_MODELS_TO_TEST": "Model",
}
# Modules that transformers' tests import and its source distribution lacks.
ABSENT = {
    "exporters/test_export.py": "class ExportTesterMixin: pass",
    "generation/test_utils.py": "class GenerationTesterMixin: pass",
    "utils/test_configuration_utils.py": "config_common_kwargs = dict(dtype='float16', id2label={0: 'a'})",
}


def main(options: list[str]) -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(CLIENTS, folder, dirs_exist_ok=True)
        python(folder, "client_models.py", check=True)
        fetch_tests("transformers", folder)
        fetch_tests("peft", folder)
        for path, text in ABSENT.items():
            module = folder / "transformers_tests" / path
            module.parent.mkdir()
            module.write_text(text)
        tests = ["test_programs.py", "test_mixins.py", *name_our_models(folder)]
        python(folder, "-m", "pytest", "-c", "pytest.ini", "--junitxml=results.xml", *tests, *options)
        return compare(folder / "results.xml", has_run_all=not options)


def python(folder: Path, *arguments: str, check: bool = False) -> None:
    subprocess.run([sys.executable, *arguments], cwd=folder, env={**os.environ, **VARIABLES}, check=check)


def fetch_tests(package: str, folder: Path) -> None:
    """Put the tests of the package's installed version into `<package>_tests`."""
    release = version(package)
    download = ("pip", "download", "-q", "--no-deps", "--no-binary", ":all:", f"{package}=={release}")
    python(folder, "-m", *download, check=True)
    with tarfile.open(folder / f"{package}-{release}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    tests = (folder / f"{package}-{release}" / "tests").rename(folder / f"{package}_tests")
    (tests / "__init__.py").touch()


def name_our_models(folder: Path) -> set[str]:
    """Replace the lists of models in PEFT's tests by the folders of ours; return the files."""
    files = {}
    for path in folder.glob("peft_tests/test_*.py"):
        text = path.read_text()
        for name, end in PEFT_LISTS.items():
            ours = sorted(config.parent.name for config in folder.glob(f"Megalodon*{end}/config.json"))
            text, count = re.subn(f"(?m)^{name} = ", f"{name} = {ours}\n_ = ", text)
            if count:
                files[name] = f"peft_tests/{path.name}"
        path.write_text(text)
    assert files.keys() == PEFT_LISTS.keys(), f"PEFT's tests lack {PEFT_LISTS.keys() - files.keys()}"
    return set(files.values())


def compare(results: Path, has_run_all: bool) -> int:
    """Print how the results differ from the exceptions; return 1 if they do."""
    exceptions = dict(line.split("\t") for line in (CLIENTS / "exceptions.tsv").read_text().splitlines())
    counts, wrong = Counter(), []
    for case in ElementTree.parse(results).iter("testcase"):
        name = f"{case.get('classname').rpartition('.')[2]}.{case.get('name')}"
        messages = {part.tag: part.get("message") for part in case}
        outcome = next((kind for kind in ("failure", "error", "skipped") if kind in messages), "passed")
        pattern = next((pattern for pattern in exceptions if re.fullmatch(pattern, name)), None)
        counts[pattern if outcome in ("failure", "error") else outcome] += 1
        if outcome in ("failure", "error") and pattern is None:
            wrong.append(f"fails: {name}: {messages[outcome].splitlines()[0]}")
        if outcome == "passed" and pattern is not None:
            wrong.append(f"passes, against {pattern}: {name}")
    for pattern, reason in exceptions.items():
        print(f"{counts[pattern]:4} expected to fail: {reason} ({pattern})")
        if has_run_all and not counts[pattern]:
            wrong.append(f"nothing fails for {pattern}")
    print(f"{counts['passed']:4} pass, {counts['skipped']} are skipped", *wrong, sep="\n")
    return int(bool(wrong) or not counts["passed"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
