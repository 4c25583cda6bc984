"""adaptive_working_memory: forward and backward.

Of n chunks of C steps and a head, without a state: n - 1 are read, n - 1 written, and n - 2 of these compared with what
the memory knows, 2 C K V flops each.
    backward  twice those of the reads, and three times those of writes and comparisons
    bytes: q, k, v in, o out; with gradients q, k, v twice, do in, dq, dk, dv out
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

import megalodon_ops as mo

from . import baselines
from .harness import DTYPES, OURS, Case, Path, way

TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 5e-2}


def cases(quick: bool, gpu: bool) -> Iterator[Case]:
    short = 8 if quick else 1
    for dtype in DTYPES:
        for backward in (False, True):
            yield _rows(1, 8192 // short, C=2048 // short, K=256, V=2048 // short, dtype=dtype, backward=backward)
    for backward in (False, True):
        yield _rows(4, 2048 // short, C=256 // short, K=64, V=256, dtype=torch.float32, backward=backward)


def _rows(B: int, L: int, *, C: int, K: int, V: int, dtype: torch.dtype, backward: bool) -> Case:
    torch.manual_seed(0)
    q, k = (3 * torch.randn(B, L, 1, K).to(dtype) for _ in range(2))  # as large as a model's at the start
    v, do = (torch.randn(B, L, 1, V).to(dtype) for _ in range(2))

    def call(op, tensors=(q, k, v), do=do):
        return way(partial(op, chunk_size=C), tensors, [do], backward=backward)

    reads = writes = L // C - 1
    known, steps = writes - 1, B * C
    products = reads + writes + known + (2 * reads + 3 * (writes + known) if backward else 0)
    return Case(
        name="adaptive_working_memory " + ("forward + backward" if backward else "forward"),
        shape=f"B {B} L {L} C {C} K {K} V {V}",
        dtype=DTYPES[dtype],
        paths=[
            Path(OURS, call(mo.adaptive_working_memory)),
            Path("loop over chunks", call(baselines.working_memory)),
        ],
        expected=call(baselines.working_memory, [t.float() for t in (q, k, v)], do.float()),
        tolerance=TOLERANCE[dtype],
        units=v.numel(),
        flops=2 * products * steps * K * V,
        bytes=B * L * q.element_size() * ((6 * K + 4 * V) if backward else (2 * K + 2 * V)),
        cold=False,
    )
