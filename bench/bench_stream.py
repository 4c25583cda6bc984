"""Streams of 10^7 steps: how far the states of float32 are from those of float64 at the end.

The steps come in pieces, as a program that streams feeds them; each piece goes through timestep_norm and cema, on states
that the piece before has left. Values have a mean of 3 groups' spreads that moves by as much again while the stream runs;
CEMA's poles reach from 0.5 to 1 - 1e-5, so that its slowest states sum up 10^5 steps. Expected is the same in float64, with
the same float32 inputs and coefficients. Each state of CEMA is compared by itself, as slow ones are larger than fast ones.

Work an element: that of `bench_timestep_norm` and `bench_cema`. What memory a stream takes is in `stream_memory`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import megalodon_ops as mo

from .harness import OURS, Case, Outputs, Path

STEPS, DIM, GROUPS, N = 10**7, 32, 4, 16
TOLERANCE = 1e-3
_BLOCK = 1 << 16  # steps that are drawn at once


def cases(quick: bool, gpu: bool) -> Iterator[Case]:
    if gpu:
        return
    for piece in (8192, 64):
        yield _case(STEPS // (500 if quick else 1), piece)


def _case(steps: int, piece: int) -> Case:
    torch.manual_seed(0)
    radius = 1 - torch.logspace(-0.3, -5, N).expand(DIM, N)
    poles = torch.polar(radius, torch.rand(DIM, N) * torch.logspace(0, -4, N))
    coefficients = (1 - radius, poles, torch.randn(DIM, N, dtype=torch.complex64), torch.ones(DIM))
    run = partial(_stream, steps, piece, coefficients)
    return Case(
        name=f"{steps:,} steps in pieces of {piece}", shape=f"D {DIM} G {GROUPS} N {N}", dtype="fp32",
        paths=[Path(OURS, partial(run, torch.float32))], expected=partial(run, torch.float64), tolerance=TOLERANCE,
        units=steps * DIM, cold=False, fewer_threads=False,
    )  # fmt: skip


@torch.no_grad()
def _stream(steps: int, piece: int, coefficients: tuple[Tensor, ...], dtype: torch.dtype) -> Outputs:
    """The states at the end: mean, variance, and each of CEMA's."""
    wide = {torch.float32: torch.complex64, torch.float64: torch.complex128}[dtype]
    coefficients = [c.to(wide if c.is_complex() else dtype) for c in coefficients]
    weight = bias = torch.zeros(DIM, dtype=dtype)
    norm, h = None, None
    for x in _values(steps, piece):
        x = x.to(dtype)
        t, norm = mo.timestep_norm(x, weight, bias, num_groups=GROUPS, state=norm, return_state=True)
        _, h = mo.cema(x, *coefficients, state=h, return_state=True)
    return (norm.mean, norm.var, *h.unbind(-1))


def _values(steps: int, piece: int) -> Iterator[Tensor]:
    """Pieces (1, L, D) of the stream, in float32."""
    random = torch.Generator().manual_seed(1)
    for start in range(0, steps, _BLOCK):
        length = min(_BLOCK, steps - start)
        block = torch.randn(1, length, DIM, generator=random) + (3 + 3 * start / steps)
        yield from block.split(piece, 1)
