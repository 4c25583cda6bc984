"""adaptive_working_memory: forward and backward.

Work per head for n chunks of C positions, without an initial state. Each of these takes 2 C K V flops:
    forward   n - 1 reads of the memory, n - 1 writes, and n - 2 comparisons of a chunk with the memory before its write
              (the op compares by matrices (K, K) and needs fewer)
    backward  twice the flops of reads, and three times those of writes and comparisons
    bytes: q, k, v in, o out; with gradients q, k, v twice, do in, dq, dk, dv out
"""

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
    q, k = (3 * torch.randn(B, L, 1, K).to(dtype) for _ in range(2))  # standard deviation as in a new model
    v, do = (torch.randn(B, L, 1, V).to(dtype) for _ in range(2))

    def call(op, tensors=(q, k, v), do=do):
        return way(partial(op, chunk_size=C), tensors, [do], backward=backward)

    reads = writes = L // C - 1
    comparisons = writes - 1
    products = reads + writes + comparisons + (2 * reads + 3 * (writes + comparisons) if backward else 0)
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
        flops=2 * products * B * C * K * V,
        bytes=B * L * q.element_size() * ((6 * K + 4 * V) if backward else (2 * K + 2 * V)),
        cold=False,
    )
