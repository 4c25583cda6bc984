"""Offsets beyond 2^31 elements in the CUDA kernels: tensors of gigabytes that take no memory, of which the ends are computed."""

from __future__ import annotations

import pytest
import torch
from cuda_emulator.planted_launchers import run

BF16, F32, C64 = torch.bfloat16, torch.float32, torch.complex64
D = 2**16
T = 2**31 // D + 72  # tokens: the last rows lie beyond 2^31 elements


@pytest.fixture
def large(emulator, monkeypatch):
    """large(*shape): a tensor of any size. Workspaces are such tensors as well; the two ends of each grid run.

    An offset that has lost its upper half is off by 4 GiB, and must not end in another tensor.
    """
    monkeypatch.setattr(emulator, "empty", lambda *shape, dtype, name: emulator.sparse(*shape, dtype=dtype, name=name))
    with emulator.only_bounds(apart=2**33, ends=1):
        yield lambda *shape, dtype=F32: emulator.sparse(*shape, dtype=dtype, name=str(shape))


def cema_parameters(large, channels):
    return [large(channels, 1, dtype=dtype) for dtype in (F32, C64, C64)] + [large(channels)]


def test_cema_scans_offsets_beyond_31_bits(emulator, large):
    x, y = large(1, T, D, dtype=BF16), large(1, T, D, dtype=BF16)
    emulator.launch("cema_fwd", x, *cema_parameters(large, D), None, None, None, y, None)


def test_cema_steps_at_offsets_beyond_31_bits(emulator, large):
    """Sequences of one step take a kernel of their own."""
    channels, count = 2**20, 2**11 + 8
    x, y = large(count, 1, channels, dtype=BF16), large(count, 1, channels, dtype=BF16)
    emulator.launch("cema_fwd", x, *cema_parameters(large, channels), None, None, None, y, None)


def test_cema_differentiates_at_offsets_beyond_31_bits(emulator, large):
    x, dy, dx = (large(1, T, D, dtype=BF16) for _ in range(3))
    gradients = cema_parameters(large, D)
    emulator.launch("cema_bwd", x, *cema_parameters(large, D), None, None, None, dy, None, dx, *gradients, None)


def test_end_states_of_cema_at_offsets_beyond_31_bits(emulator, large):
    x, dx, state = large(1, T, D, dtype=BF16), large(1, T, D, dtype=BF16), large(1, D, 1, dtype=C64)
    p, q, dp, dq = large(D, 1), large(D, 1, dtype=C64), large(D, 1), large(D, 1, dtype=C64)
    emulator.launch("cema_end_state_fwd", x, p, q, None, None, state)
    emulator.launch("cema_end_state_bwd", x, p, q, None, None, state, dx, dp, dq)


GROUPS = 2**10


def test_timestep_norm_at_offsets_beyond_31_bits(emulator, large):
    x, y, stats = large(1, T, D, dtype=BF16), large(1, T, D, dtype=BF16), large(3, 1, T, GROUPS)
    nothing = [None] * 6
    emulator.launch("timestep_norm_fwd", x, large(D), large(D), GROUPS, 1e-5, *nothing, y, stats, *[None] * 4)


def test_timestep_norm_differentiates_at_offsets_beyond_31_bits(emulator, large):
    x, dy, dx = (large(1, T, D, dtype=BF16) for _ in range(3))
    inputs = x, large(D), large(D), GROUPS, 1e-5, *[None] * 6, large(3, 1, T, GROUPS), dy, None, None
    emulator.launch("timestep_norm_bwd", *inputs, dx, large(D), large(D), None, None)


def test_end_states_of_timestep_norm_at_offsets_beyond_31_bits(emulator, large):
    x, dx, mean, residual = large(1, T, D, dtype=BF16), large(1, T, D, dtype=BF16), large(1, GROUPS), large(1, 2, GROUPS)
    state = mean, large(1, GROUPS), residual, large(1, dtype=torch.int64)
    emulator.launch("timestep_norm_end_state_fwd", x, GROUPS, None, None, *state)
    emulator.launch("timestep_norm_end_state_bwd", x, GROUPS, None, None, mean, residual, mean, mean, dx)


def test_a_sparse_tensor_has_bounds(emulator):
    x, y = emulator.sparse(2**31 + 1024, name="x"), emulator.empty(1024)
    x[-1] = 7
    run(emulator, "strided_copy", x[-1024:], y, 1, 1)
    assert y[-1] == 7 and (y[:-1] == 0).all()
    with pytest.raises(emulator.Error, match=r"out of bounds: read of 4 bytes at 0 bytes past the end of buffer 'x'"):
        run(emulator, "strided_copy", x[-1023:], y, 1, 1)
    with pytest.raises(emulator.Error, match=r"out of bounds: write of 4 bytes at .* buffer 'x'"):
        run(emulator, "strided_copy", emulator.tensor(torch.zeros(1024)), x[-1023:], 1, 1)
