"""Emulated kernels under AddressSanitizer and UndefinedBehaviorSanitizer: local arrays and integers of a thread."""

from pathlib import Path

import pytest
from emulator import sanitized
from emulator.device import FOLDER, build

OVERRUNS = {
    "local_array": "index 4 out of bounds for type 'float [4]'",
    "local_array_by_pointer": "AddressSanitizer: stack-buffer-overflow",
    "row_of_local_array": "index 4 out of bounds for type 'float [4]'",
    "int_overflow": "signed integer overflow",
}


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def library() -> Path:
    if sanitized.runtime() is None:
        pytest.skip("g++ has no libasan on this machine")
    return build(sanitized.TARGET)


@pytest.mark.parametrize("name", OVERRUNS)
def test_an_overrun_is_reported_at_its_line(library, name):
    done = sanitized.run(library, "plant", name)
    source = (FOLDER / "planted" / "overruns.cu").read_text().split("\n")
    (line,) = (i for i, text in enumerate(source, start=1) if text.endswith(f"// at {name}"))
    assert done.returncode != 0
    assert OVERRUNS[name] in done.stderr and f"overruns.cu:{line}" in done.stderr, done.stderr


def test_correct_kernels_raise_no_alarm(library):
    done = sanitized.run(library, "correct", *OVERRUNS)
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_every_kernel_of_the_ops_is_clean(library):
    done = sanitized.run(library, "ops", timeout=900)
    assert done.returncode == 0, done.stderr[-6000:]
