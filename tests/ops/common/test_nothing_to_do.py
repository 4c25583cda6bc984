"""Calls on empty tensors with very many rows return at once or are refused."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

import megalodon_ops as mo
from megalodon_ops import reference

ROWS = 2**33
SECONDS = 2  # a loop over the rows takes more than 8


@contextmanager
def at_once() -> Iterator[None]:
    start = time.perf_counter()
    yield
    assert time.perf_counter() - start < SECONDS


def calls(ops) -> dict[str, Callable[..., object]]:
    """Each op on very many rows of length 0, with gradients of its parameters."""
    x, heads = torch.empty(ROWS, 0, 4, requires_grad=True), torch.empty(ROWS, 0, 2, 2, requires_grad=True)
    channels, affine = torch.zeros(4, requires_grad=True), torch.zeros(2, 4, requires_grad=True)
    p, q = torch.zeros(4, 3, requires_grad=True), torch.zeros(4, 3, dtype=torch.complex64, requires_grad=True)
    sizes = dict(num_heads=2, chunk_size=8)
    return {
        "cema": lambda **options: ops.cema(x, p, q, q, channels, **options),
        "timestep_norm": lambda **options: ops.timestep_norm(x, channels, channels, num_groups=2, **options),
        "cema_end_state": lambda: ops.cema_end_state(x, p, q),
        "timestep_norm_end_state": lambda: ops.timestep_norm_end_state(x, num_groups=2),
        "normalized_qk": lambda: torch.cat(ops.normalized_qk(x, affine, affine, **sizes)),
        "chunked_attention": lambda **options: ops.chunked_attention(heads, heads, heads, chunk_size=8, **options),
        "normalized_attention": lambda **options: ops.normalized_attention(x, x, affine, affine, **sizes, **options),
    }


END_STATES = ("cema_end_state", "timestep_norm_end_state")


@pytest.mark.parametrize("op", [op for op in calls(mo) if op not in END_STATES])
def test_very_many_empty_rows_take_no_time(op):
    with at_once():
        y: Tensor = calls(mo)[op]()
        y.sum().backward()
    assert y.numel() == 0


@pytest.mark.parametrize("op", [op for op in calls(mo) if op != "normalized_qk"])
def test_states_of_very_many_rows_are_out_of_memory(op):
    with at_once(), pytest.raises((MemoryError, RuntimeError), match="memory|bad_alloc|^$"):
        calls(mo)[op](**({} if op in END_STATES else {"return_state": True}))


@pytest.mark.parametrize("op", calls(mo))
def test_the_reference_refuses_very_many_rows(op):
    with at_once(), pytest.raises(ValueError, match="reference: `B` must be at most"):
        calls(reference)[op]()


@pytest.mark.parametrize("ops", [mo, reference], ids=["kernels", "reference"])
def test_very_large_chunks_take_no_time(ops):
    q, z, affine = torch.randn(1, 5, 1, 4), torch.randn(1, 5, 4), torch.zeros(2, 4)
    chunk_size = 2**31 - 1 if ops is mo else 2**62
    with at_once():
        o = ops.chunked_attention(q, q, q, chunk_size=chunk_size)
        qk = ops.normalized_qk(z, affine, affine, num_heads=1, chunk_size=chunk_size)
    assert o.equal(ops.chunked_attention(q, q, q, chunk_size=8))
    assert qk[0].equal(ops.normalized_qk(z, affine, affine, num_heads=1, chunk_size=8)[0])
