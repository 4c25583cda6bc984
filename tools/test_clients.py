"""Run the tests that transformers and PEFT have for models, and short programs of others, on every class of ours.

    python tools/test_clients.py [options of pytest that select cases, such as -k test_sft]

Needs `pip install -r tools/clients/requirements.txt` and a package index: source distributions hold the tests of the
installed versions. clients/conftest.py gives PEFT's tests our models. clients/exceptions.tsv names the cases that fail,
with reasons: it is an error if another case fails, if one of these passes, or if a line names no case.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

CLIENTS = Path(__file__).resolve().parent / "clients"
VARIABLES = dict(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive")
PEFT_TESTS = ("decoder_models", "feature_extraction_models", "seq_classifier", "token_classification_qa")
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
        python(folder, "client_models.py").check_returncode()
        fetch_tests("transformers", folder)
        fetch_tests("peft", folder)
        for path, text in ABSENT.items():
            module = folder / "transformers_tests" / path
            module.parent.mkdir()
            module.write_text(text)
        tests = ["test_programs.py", "test_mixins.py", *(f"peft_tests/test_{name}.py" for name in PEFT_TESTS)]
        return python(folder, "-m", "pytest", "-c", "pytest.ini", *tests, *options).returncode


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], cwd=folder, env={**os.environ, **VARIABLES})


def fetch_tests(package: str, folder: Path) -> None:
    """Put the tests of the package's installed version into `<package>_tests`."""
    release = version(package)
    download = ("pip", "download", "-q", "--no-deps", "--no-binary", ":all:", f"{package}=={release}")
    python(folder, "-m", *download).check_returncode()
    shutil.unpack_archive(folder / f"{package}-{release}.tar.gz", folder, filter="data")
    tests = (folder / f"{package}-{release}" / "tests").rename(folder / f"{package}_tests")
    (tests / "__init__.py").touch()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
