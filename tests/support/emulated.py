"""Calls of ops on the emulated device, and what tests of every op's CUDA kernels assert about them."""

from collections.abc import Callable
from typing import Any

from assertions import assert_bit_equal
from calls import evaluate
from cases import Case, Tensors
from emulator.device import Emulator

import megalodon_ops as mo
from megalodon_ops import _C

ORDERS = ("forward", "reverse", "random")
A100 = 163 * 1024  # bytes of shared memory of a block; with less, cema takes the scan instead of tensor cores


def run_emulated(emulator: Emulator, case: Case, run: Callable[..., Any] = evaluate, *, offset: Any = 0) -> Any:
    """Call `run(op, case)` with emulated kernels, on tensors `offset` elements past an aligned address."""
    with emulator.replacing(_C, offset=offset):
        return run(getattr(mo, case.op), case)


def assert_equal_in_every_order(emulator: Emulator, run: Callable[[], Tensors]) -> Tensors:
    """Assert that `run()` gives the same bits for each order of threads, and return them."""
    results = []
    for order in ORDERS:
        emulator.set_order(order, seed=2)
        results.append(run())
        assert_bit_equal(results[-1], results[0])
    return results[0]


def assert_no_bank_conflicts(emulator: Emulator, *kernels: str) -> None:
    """Assert that each kernel accesses shared memory, in as few wavefronts as possible."""
    for kernel in kernels:
        sites = [site for site in emulator.sites(kernel) if site["shared"]]
        assert sites, kernel
        assert [site for site in sites if site["transactions"] != site["ideal"]] == []
