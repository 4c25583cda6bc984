"""Shared fixtures of all tests, and settings of hypothesis."""

import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import backends
import pytest
import torch
from emulator.device import Emulator
from hypothesis import HealthCheck, settings
from ranks import Ranks

from megalodon_ops import _C

pytest_plugins = ["command_line", "emulator.fixtures"]

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # `pytest &` ignores Ctrl-C, which some tests need
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Every run draws the same examples; HYPOTHESIS_PROFILE=explore draws new ones, and more.
WHOLE_TEST = [HealthCheck.function_scoped_fixture]  # one backend for all examples of a test
settings.register_profile("default", max_examples=15, deadline=None, derandomize=True, suppress_health_check=WHOLE_TEST)
TOO_SLOW = [*WHOLE_TEST, HealthCheck.too_slow]
settings.register_profile("explore", max_examples=300, deadline=None, print_blob=True, suppress_health_check=TOO_SLOW)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(params=backends.DEVICES)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test on the CPU's kernels, on CUDA's in the emulator, and on CUDA's if there is a GPU."""
    if request.param == "cuda-emulated":
        running = Emulator(request.getfixturevalue("emulated_module")).replacing(_C)
    elif request.param == "cuda":
        running = backends.gpu()
    else:
        running = backends.isa(backends.DEFAULT_ISA if request.param == "cpu" else request.param)
    with running:
        yield request.param


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill torch.empty with NaN (or the largest integer), which shows elements that no kernel writes."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def parallelize_runs() -> None:
    """Skip with a torch that `parallelize` refuses."""
    from megalodon_ops.distributed.fsdp import check_torch

    try:
        check_torch()
    except ImportError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def ranks(parallelize_runs: None) -> Iterator[Ranks]:
    """Processes for `ranks.run(function, world_size, *args)`."""
    pool = Ranks()
    yield pool
    pool.close()


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Two threads, whatever torch's default is."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def file_size_limit() -> Callable[[int], AbstractContextManager[None]]:
    """`with file_size_limit(n)`: writing a file beyond n bytes fails, as on a full disk."""

    @contextmanager
    def limited(size: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited
