"""Streams of 10^7 positions: distance of the final float32 states from those of float64.

Pieces of the stream go through timestep_norm and cema one after another, each starting from the states of the piece before.
The values have standard deviation 1 and a mean that rises from 3 to 6 during the stream. CEMA's poles reach from 0.5 to
1 - 1e-5, so its slowest states sum over about 10^5 positions. The expected states are computed in float64 from the same
float32 inputs and coefficients. Each state of CEMA is compared by itself, because slow states are larger than fast ones.

Work per element: that of `bench_timestep_norm` and `bench_cema`. `stream_memory` measures the memory of a stream.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import megalodon_ops as mo

from .harness import OURS, Case, Outputs, Path

LENGTH, DIM, GROUPS, N = 10**7, 32, 4, 16
TOLERANCE = 1e-3
_BLOCK = 1 << 16  # positions drawn at once


def cases(quick: bool, gpu: bool) -> Iterator[Case]:
    if gpu:
        return
    for piece in (8192, 64):
        yield _case(LENGTH // (500 if quick else 1), piece)


def _case(length: int, piece: int) -> Case:
    torch.manual_seed(0)
    radius = 1 - torch.logspace(-0.3, -5, N).expand(DIM, N)
    poles = torch.polar(radius, torch.rand(DIM, N) * torch.logspace(0, -4, N))
    coefficients = (1 - radius, poles, torch.randn(DIM, N, dtype=torch.complex64), torch.ones(DIM))
    run = partial(_stream, length, piece, coefficients)
    return Case(
        name=f"{length:,} positions in pieces of {piece}",
        shape=f"D {DIM} G {GROUPS} N {N}",
        dtype="fp32",
        paths=[Path(OURS, partial(run, torch.float32))],
        expected=partial(run, torch.float64),
        tolerance=TOLERANCE,
        units=length * DIM,
        cold=False,
        fewer_threads=False,
    )


@torch.no_grad()
def _stream(length: int, piece: int, coefficients: tuple[Tensor, ...], dtype: torch.dtype) -> Outputs:
    """Final states: mean, variance, and each of CEMA's."""
    wide = {torch.float32: torch.complex64, torch.float64: torch.complex128}[dtype]
    coefficients = [c.to(wide if c.is_complex() else dtype) for c in coefficients]
    weight = bias = torch.zeros(DIM, dtype=dtype)
    norm = h = None
    for x in _values(length, piece):
        x = x.to(dtype)
        _, norm = mo.timestep_norm(x, weight, bias, num_groups=GROUPS, state=norm, return_state=True)
        _, h = mo.cema(x, *coefficients, state=h, return_state=True)
    return (norm.mean, norm.var, *h.unbind(-1))


def _values(length: int, piece: int) -> Iterator[Tensor]:
    """Pieces (1, L, D) of the stream, in float32."""
    random = torch.Generator().manual_seed(1)
    for start in range(0, length, _BLOCK):
        size = min(_BLOCK, length - start)
        block = torch.randn(1, size, DIM, generator=random) + (3 + 3 * start / length)
        yield from block.split(piece, 1)
