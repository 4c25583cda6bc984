"""timestep_norm: forward and backward.

Work per element. The op is bound by memory bandwidth; statistics, G numbers a position, are not counted.
    forward   flops 8 (sum, squared distance from the group's mean: 4; subtract, scale, gain, bias: 4)
              bytes: x in, y out
    backward  flops 14 (two sums with gains: 6; dbias and dweight: 3; dx: 5)
              bytes: x and dy in, dx out
"""

from collections.abc import Iterator
from functools import partial

import torch

import megalodon_ops as mo

from . import baselines
from .harness import DTYPES, OURS, Case, Path, way

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2}


def cases(quick: bool, gpu: bool) -> Iterator[Case]:
    length = 1024 if quick else 8192
    # Each case: rows, positions, channels, groups, dtype.
    if gpu:
        for batch, dim, groups in ((8, 1024, 32), (1, 4096, 64), (4, 2048, 64)):
            for backward in (False, True):
                yield _case(batch, length // 4, dim, groups, torch.bfloat16, backward=backward, compiled=True)
        yield _case(8, length // 4, 1024, 32, torch.float32, backward=True, compiled=True)
        return
    for dtype in (torch.float32, torch.bfloat16):
        yield _case(1, length, 1024, 32, dtype, compiled=dtype == torch.float32)
        yield _case(1, length, 1024, 32, dtype, backward=True, compiled=dtype == torch.float32)
    yield _case(8, length // 4, 512, 32, torch.float32)
    yield _case(8, length // 4, 512, 32, torch.float32, backward=True)
    yield _case(1, 256, 256, 8, torch.float32)
    yield _case(1, 256, 256, 8, torch.float32, backward=True)


def _case(
    batch: int,
    length: int,
    dim: int,
    groups: int,
    dtype: torch.dtype,
    *,
    backward: bool = False,
    compiled: bool = False,
) -> Case:
    torch.manual_seed(0)
    x, dy = (torch.randn(batch, length, dim, dtype=dtype) for _ in range(2))
    inputs = (x, 0.1 * torch.randn(dim), 0.1 * torch.randn(dim))
    plain = partial(baselines.timestep_norm, num_groups=groups)

    def call(op, tensors=inputs, dy=dy):
        return way(op, tensors, [dy], backward=backward)

    paths = [Path(OURS, call(partial(mo.timestep_norm, num_groups=groups))), Path("cumulative sums", call(plain))]
    if compiled:
        paths.append(Path("the same, torch.compile", call(torch.compile(plain)), compiled=True))
    elements, size = x.numel(), x.element_size()
    return Case(
        name="forward + backward" if backward else "forward",
        shape=f"B {batch} L {length} D {dim} G {groups}",
        dtype=DTYPES[dtype],
        paths=paths,
        expected=call(plain, [t.float() for t in inputs], dy.float()),
        tolerance=TOLERANCE[dtype],
        units=elements,
        flops=elements * (22 if backward else 8),
        bytes=elements * size * (5 if backward else 2),
    )
